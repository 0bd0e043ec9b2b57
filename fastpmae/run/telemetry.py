"""What a run measures of itself besides its losses: memory, and a trace of some steps; and Python's own clearing up."""

import contextlib
import gc
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import atomic_write

COLLECT_EVERY = 100
"""Steps between two collections of garbage."""
WARM_UP = 4
"""Steps before a trace begins: what is compiled or allocated once is no part of it. The profiler itself starts in the
last of them."""


def peak_memory(device: torch.device) -> float:
    """GiB that this process has held at most: of a GPU's memory what torch has given out, else of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def collect_everything() -> None:
    """Collect garbage among what `garbage_between_steps` found there at its start, too."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def garbage_between_steps() -> Iterator[Callable[[int], None]]:
    """Within it Python looks for garbage where it is told to, and not in the middle of a step; then as before.

    On several ranks each would stop at another moment, and all others wait for it. What is there at the start is not
    looked at again, which makes a collection short.

    Yields:
        What is to be called after each step, with its number: it collects every `COLLECT_EVERY` steps.
    """
    by_itself, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.collect()
    if not frozen:
        gc.freeze()
    gc.disable()

    def after(step: int) -> None:
        if step % COLLECT_EVERY == 0:
            gc.collect()

    try:
        yield after
    finally:
        if not frozen:
            gc.unfreeze()
        if by_itself:
            gc.enable()


class StepTrace:
    """A trace of `steps` steps by torch's profiler, as a file in Chrome's format; `step` is called after each step.

    Nothing is written where a training ends before the first of them, or where the disk does not take it; the log then
    says so, and the training goes on.
    """

    def __init__(self, path: Path, steps: int, tell: Callable[[str], None]):
        self.path, self.steps, self.tell = path, steps, tell
        # not until it is asked for: it is no small import
        from torch.profiler import profile, schedule

        self.profile = profile(
            schedule=schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1), on_trace_ready=self._write
        )

    def __enter__(self) -> "StepTrace":
        self.profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.profile.__exit__(None, None, None)
        done = self.profile.step_num
        if done <= WARM_UP:
            steps = f"{done} step{'s' * (done != 1)}"
            self.tell(f"no trace is written: it begins after {WARM_UP} steps, and this start ends after {steps}")

    def step(self) -> None:
        """A step is done."""
        self.profile.step()

    def _write(self, profile: "torch.profiler.profile") -> None:
        done = min(self.steps, profile.step_num - WARM_UP)
        if done < 1:
            return
        try:
            with atomic_write(self.path) as beside:
                profile.export_chrome_trace(str(beside))
                if not beside.exists():  # the library tells its reason on stderr alone
                    raise UserError(f"{self.path} cannot be written: is the disk full?")
        except UserError as error:
            # steps are worth more than what is told of them
            self.tell(f"no trace is written: {error}")
            return
        steps = f"{done} step{'s' * (done != 1)}"
        self.tell(f"a trace of {steps} lies in {self.path}: https://ui.perfetto.dev or chrome://tracing shows it")
