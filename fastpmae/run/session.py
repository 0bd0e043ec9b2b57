"""One start of a training, as its loop sees it: signals, checkpoints when they are due, rows, and how it ends."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from fastpmae.distributed.ranks import Ranks
from fastpmae.run.checkpoint import checkpoint_path, checkpoints_in
from fastpmae.run.checkpoint_writer import Saver, ShardSaver
from fastpmae.run.deterministic import deterministic
from fastpmae.run.log import Log, Meter
from fastpmae.run.signals import Stop
from fastpmae.run.telemetry import StepTrace, garbage_between_steps
from fastpmae.run.uploads import Uploads
from fastpmae_loaders.errors import Interrupted, RunError
from fastpmae_loaders.stores.address import Address

Entered = TypeVar("Entered")
State = Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]
"""Collects what a checkpoint holds: tensors by name, and plain values besides the step."""


class Session:
    """What a training's loop asks of its surroundings, step by step; `open_session` makes it, `begin` starts it.

    Attributes:
        ranks: the processes that train together.
        stop: the signals that this process has heard.
        step: steps that are done.
        last_step: where this start of the training ends.
        signal: the signal that ends it, as all ranks have agreed after the last step; 0 without one.
        is_due: whether the last step is to be saved.
    """

    folder: Path
    log: Log
    saver: Saver

    def __init__(self, stack: contextlib.ExitStack, stop: Stop, ranks: Ranks):
        self.stack, self.stop, self.ranks = stack, stop, ranks
        self.step = self.last_step = self.signal = 0
        self.is_due = False

    def enter(self, context: AbstractContextManager[Entered]) -> Entered:
        """Enter what is to be left when the session ends, the last first."""
        return self.stack.enter_context(context)

    def lock(self, folder: AbstractContextManager[list[str]]) -> list[str]:
        """The folder as this training's own, by the main rank for all. Returns remarks; raises UserError on all."""
        return self.ranks.broadcast_from_main(lambda: self.enter(folder))

    def begin(
        self,
        folder: Path,
        log: Log,
        *,
        step: int,
        last_step: int,
        keep: int,
        save_every: float,
        save_steps: int = 0,
        saved_step: int | None = None,
        traced: int = 0,
        sharded: bool = False,
        sentences: Sequence[str] = (),
        uploads: Uploads | None = None,
    ) -> None:
        """Open the log, say the sentences, and start the clocks of rows and checkpoints.

        Args:
            step: steps that are done already.
            keep: older checkpoints to keep beside the newest.
            save_every: minutes between two checkpoints.
            save_steps: steps between two checkpoints, besides; 0 saves by the clock alone.
            saved_step: of the folder's newest checkpoint, where this training goes on from it.
            traced: steps of the main rank that torch's profiler is to watch.
            sharded: checkpoints are folders that all ranks write to.
            uploads: takes what is written to a store; the main rank's alone.
        """
        self.folder, self.step, self.last_step = folder, step, last_step
        self.save_every, self.save_steps, self.saved_step = save_every, save_steps, saved_step
        self.log = self.enter(log)
        self.sharded = sharded
        written = {} if uploads is None else {"written": uploads.checkpoint}
        self.uploads = uploads if uploads is None else self.enter(uploads)
        self.ranks.broadcast_from_main(lambda: None if uploads is None else uploads.leave_past(step))
        if sharded:
            self.saver = self.enter(ShardSaver(self.ranks, keep, **written))
        else:
            self.saver = self.enter(Saver(self.ranks.device, keep, is_main=self.ranks.is_main, **written))
        for sentence in sentences:
            self.log.say(sentence)
        self.trace = None
        if traced and self.ranks.is_main:
            self.trace = self.enter(StepTrace(folder / "trace.json", traced, self.log.say))
        self.collect = self.enter(garbage_between_steps())
        self.saved_at = time.monotonic()
        self.log.start_clock(step)

    @property
    def ends(self) -> bool:
        """Whether the last step was this start's last one."""
        return self.step == self.last_step or bool(self.signal)

    def advance(self, epoch: int, failed: Sequence[int] = ()) -> None:
        """A step is done: tell the log, and agree with the other ranks on signals and on whether to save.

        Args:
            epoch: that the step belongs to.
            failed: samples of it that did not decode.

        Raises:
            RunError: when a checkpoint could not be written, on every rank.
        """
        self.step += 1
        if self.trace is not None:
            self.trace.step()
        self.collect(self.step)
        self.log.step(self.step, epoch, list(failed))
        for sentence in [] if self.uploads is None else self.uploads.remarks():
            self.log.say(sentence)
        on_time = time.monotonic() - self.saved_at >= 60 * self.save_every
        self.signal, on_time, saver_failed = self.ranks.max_over_ranks(self.stop.signal, on_time, self.saver.failed)
        if saver_failed:
            self.wait()
        on_steps = self.save_steps > 0 and self.step % self.save_steps == 0
        self.is_due = self.ends or on_steps or bool(on_time)

    def poll(self) -> int:
        """The signal that any rank has heard by now; 0 where none has."""
        (self.signal,) = self.ranks.max_over_ranks(self.stop.signal)
        return self.signal

    def save(self, state: State) -> None:
        """Write a checkpoint of the last step, beside the steps that follow. Raises RunError as `Saver.save`."""
        self.log.settle()
        self.wait()
        tensors, values = state()
        path = checkpoint_path(self.folder, self.step, sharded=self.sharded)
        self.saver.save(path, tensors, {"step": self.step} | values)
        self.saved_step, self.saved_at = self.step, time.monotonic()

    def wait(self) -> None:
        """Until nothing is being written. Raises RunError, on every rank, when the last checkpoint could not be."""
        self.ranks.broadcast_from_main(self.saver.wait)

    def stop_if_signalled(self, state: State) -> None:
        """Raise Interrupted after a signal, once a checkpoint of the last step is written."""
        if self.signal:
            if self.saved_step != self.step:
                self.save(state)
            self.wait()
            self.finish()
            raise Interrupted(self.signal, self.step, self.last_step, self.place)

    @property
    def place(self) -> Path | Address:
        """Where who resumes it says that it lies."""
        return self.folder if self.uploads is None else self.uploads.address

    def finish(self) -> None:
        """Until all that is to be in a store is there. Raises RunError where it could not be taken there."""
        if self.uploads is not None:
            self.uploads.finish(signalled=bool(self.signal))


def stop_if_bad(meter: Meter, session: Session) -> None:
    """Raise RunError, on every rank, when a step since the start was not finite."""
    if meter.is_bad():
        session.wait()
        samples = sorted(set(session.ranks.all_gather(meter.bad_index).tolist()))
        newest = next(iter(checkpoints_in(session.folder)), "none yet")
        raise RunError(
            f"the loss or a gradient of step {int(meter.bad_step) + 1} is not finite (its update was skipped). "
            f"Samples of that step: {samples}. Last good checkpoint: {newest}. "
            "A lower --blr (or --lr), --clip-grad 1 or --precision fp32 usually helps"
        )


@contextlib.contextmanager
def open_session(ranks: AbstractContextManager[Ranks], same_bits: bool) -> Iterator[Session]:
    """A session that hears signals from here on; all that it enters is left with it.

    Args:
        ranks: joins them; entered here.
        same_bits: on a GPU compute the same bits each time (see `deterministic`).
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop())
        joined = stack.enter_context(ranks)
        stack.enter_context(deterministic(same_bits, joined.device))
        yield Session(stack, stop, joined)
