"""What a run tells: a progress bar in a terminal, plain lines elsewhere, metrics.jsonl, TensorBoard, W&B."""

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from fastpmae.config import Config
from fastpmae.distributed.ranks import mean_over_ranks
from fastpmae.run.checkpoint import CheckpointError
from fastpmae.run.device_metrics import Figures
from fastpmae.run.images import sources
from fastpmae.run.trackers import TensorBoard, WandB
from fastpmae_loaders.cli.progress import Bar
from fastpmae_loaders.cli.terminal import say
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import atomic_write
from fastpmae_loaders.printable import printable_lines
from fastpmae_loaders.sources.reading import read_file

_BOUND = 1e100
"""No figure that is finite is larger, and none of a picture's axes can be much longer."""
TIMINGS = ("images_per_second", "data_wait", "mfu", "peak_memory_gib")
"""The figures of a row that differ from run to run."""


class Meter:
    """Running sums of a step's figures, kept on the device so that no step waits for the host.

    It also remembers the first step whose update was skipped, and that step's samples.

    Args:
        batch_size: this rank's samples in a step.
        labels: whether there are label losses; else the rows leave them out.
    """

    names = ("loss", "loss_m", "loss_c", "loss_p", "grad_norm")

    def __init__(self, device: torch.device, batch_size: int, *, labels: bool = True):
        self.left_out = () if labels else ("loss_c", "loss_p")
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.bad_index = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def add(
        self,
        step: int,
        losses: Float[Tensor, " losses"],
        norm: Float[Tensor, ""],
        skipped: Float[Tensor, ""],
        index: Int[Tensor, " batch"],
    ) -> None:
        """Take in a step's losses (in the order of `Losses`), gradient norm, whether it was skipped, its samples."""
        self.sums += torch.cat([losses, norm.unsqueeze(0)]).double()
        self.count += 1
        first = (skipped > 0) & (self.bad_step < 0)
        self.bad_step = torch.where(first, step, self.bad_step)
        self.bad_index = torch.where(first, index, self.bad_index)

    def is_bad(self) -> bool:
        """Whether any step since the start was skipped; waits for the device."""
        return self.bad_step.item() >= 0

    def means(self, group: dist.ProcessGroup | None = None, *, anew: bool = True) -> Figures:
        """The mean of each figure since it last started anew, over all ranks."""
        means = mean_over_ranks(self.sums, group) / self.count
        if anew:
            self.sums.zero_()
            self.count.zero_()

        def named(found: list[float], _: object) -> dict[str, float]:
            return {name: value for name, value in zip(self.names, found, strict=True) if name not in self.left_out}

        return Figures(means, named)

    def state(self, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
        """The sums, as a checkpoint holds them: a run that is resumed between two rows writes the same row, on any
        number of ranks."""
        return {"log.sums": mean_over_ranks(self.sums, group), "log.count": self.count}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take the sums of a checkpoint. Raises CheckpointError where it holds none."""
        own = {"sums": self.sums, "count": self.count}
        told, wanted = ({name: (t.shape, t.dtype) for name, t in held.items()} for held in (state, own))
        if told != wanted:
            raise CheckpointError("the checkpoint holds no sound sums of the log")
        self.sums.copy_(state["sums"])
        self.count.copy_(state["count"])


@dataclass(frozen=True)
class About:
    """What a log is told of its training.

    Attributes:
        images: the training images, as a sentence names them.
        batch_size: images of a step, over all ranks.
        settings: for those who keep them beside the rows.
        tell: takes the sentences, where a caller shows its own progress.
        images_at_peak: images a second that the GPUs could take at most, where that is known.
    """

    images: str
    batch_size: int
    epochs: int
    settings: dict[str, Any]
    tensorboard: bool = False
    wandb: bool = False
    tell: Callable[[str], None] | None = None
    images_at_peak: float | None = None


def about_run(config: Config, images_at_peak: float | None = None) -> About:
    """What the log of a pretraining is told."""
    optimizer, run = config.optimizer, config.run
    return About(
        " ".join(sources(config)), optimizer.batch_size, optimizer.epochs, config.flat(), run.tensorboard, run.wandb,
        images_at_peak=images_at_peak,
    )  # fmt: skip


class Log:
    """The run's rows and sentences. On other ranks than the first it says nothing.

    Args:
        folder: the run's.
        about: the training.
        first_step: steps that are done already; rows past it are dropped.
        last_step: where this start of the run ends.
        is_main: whether this is the first rank.
    """

    def __init__(self, folder: Path, about: About, first_step: int, last_step: int, *, is_main: bool = True):
        self.folder, self.about, self.is_main, self.images_at_peak = folder, about, is_main, about.images_at_peak
        shown = is_main and self.about.tell is None
        self.bar = Bar(last_step, "training", done=first_step, stays=True, shown=shown)
        self.writers: list[Any] = []
        self.reported: set[int] = set()
        self._owed: Callable[[], None] | None = None
        if is_main:
            if self.about.tensorboard:
                self.writers.append(TensorBoard(folder, first_step))
            if self.about.wandb:
                self.writers.append(WandB(folder, self.about.settings))
            _drop_rows_past(folder / "metrics.jsonl", first_step)
            self.metrics = (folder / "metrics.jsonl").open("a")

    def __enter__(self) -> "Log":
        self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.settle()
        finally:
            self._end()

    def _end(self) -> None:
        self.bar.stop()
        if self.is_main:
            self.metrics.close()
            for writer in self.writers:
                with contextlib.suppress(Exception):  # nothing of the run hangs on it
                    writer.close()

    def say(self, sentence: str) -> None:
        """A line for the user and for train.log. Where it cannot be written, the run goes on without it."""
        self.settle()
        if not self.is_main:
            return
        sentence = printable_lines(sentence)  # a log is looked at in a terminal
        with (
            contextlib.suppress(OSError),
            (self.folder / "train.log").open("a", encoding="utf-8", errors="backslashreplace") as file,
        ):
            file.write(sentence + "\n")
        (self.about.tell or self.bar.tell)(sentence)

    def start_clock(self, step: int, images_at_peak: float | None = None) -> None:
        """Rates in the next row count from now and from this step.

        Args:
            images_at_peak: as in `About`, where that is another from here on.
        """
        self.clock, self.clock_step = time.perf_counter(), step
        self.images_at_peak = images_at_peak or self.images_at_peak

    def step(self, step: int, epoch: int, failed: list[int]) -> None:
        """Move the progress bar, write the row that is owed, and report the samples that did not decode."""
        self.settle()
        for index in sorted(set(failed) - self.reported):
            self.reported.add(index)
            sentence = f"warning: image {index} of {self.about.images} does not decode; the next good one stands in"
            if self.is_main:
                self.say(sentence)
            else:  # each rank sees other images
                say(sentence)
        self.bar.update(step, words=f"epoch {epoch + 1}/{self.about.epochs}")

    def row(self, row: dict[str, float], rest: Callable[[], dict[str, float]], waited: float, *, partial: bool) -> None:
        """A row of metrics, written wherever this run writes them when the next step is under way.

        Until `settle`, that is, which whatever is said or saved later calls.

        Args:
            row: its figures; rates are added here.
            rest: finds further figures, on the host alone: a GPU has the next step to work on meanwhile.
            waited: seconds that the device has waited for data since the last row.
            partial: the row stands off the grid of --log-every because the run stops here. A resumed run drops it,
                and writes the rows that a run without the stop would have written.
        """
        self.settle()
        seconds = time.perf_counter() - self.clock
        images = (row["step"] - self.clock_step) * self.about.batch_size
        rates = {"images_per_second": images / seconds, "data_wait": waited / seconds}
        if self.images_at_peak is not None:
            rates["mfu"] = images / seconds / self.images_at_peak
        self.start_clock(int(row["step"]))
        if self.is_main:
            self._owed = lambda: self._write(row | rest() | rates | ({"partial": True} if partial else {}))

    def settle(self) -> None:
        """Write the row that is owed."""
        owed, self._owed = self._owed, None
        if owed is not None:
            owed()

    def _write(self, row: dict[str, float]) -> None:
        self._keep(row)
        parts = _of_labels(row, {"c": "loss_c", "p": "loss_p"})
        taught = _of_labels(row, {"c": "class_divergence", "p": "patch_divergence"})
        parts = f" (m {row['loss_m']:.3f}{parts}{', KL' if taught else ''}{taught})" if parts else ""
        figures = f"loss {row['loss']:.3f}{parts}  {row['images_per_second']:.0f} images/s"
        self.bar.update(note=figures)
        if not self.bar.live:
            used = f", {row['mfu']:.0%} of peak FLOPs" if "mfu" in row else ""
            waiting = f", waiting for data {row['data_wait']:.0%}"
            size = f"  {row['image_size']:.0f} px" if "image_size" in row else ""
            self.say(f"step {row['step']:.0f}  epoch {row['epoch']:.2f}{size}  {figures}{used}{waiting}")

    def _pass_on(self, row: dict[str, float]) -> None:
        """Give a row to TensorBoard and W&B. One that fails is left out from then on: metrics.jsonl is the record."""
        for writer in list(self.writers):
            try:
                writer.row(row)
            except Exception as error:  # a full disk, a server that is gone: each of their own kind
                self.writers.remove(writer)
                self.say(f"warning: {writer.name} takes no more rows and is left out: {error}")

    def evaluation(self, step: int, epoch: int, evaluate: Callable[[], dict[str, float]]) -> None:
        """A row of its own for what is evaluated; the time it takes counts for no rate."""
        self.settle()
        began = time.perf_counter()
        figures = evaluate()
        self.clock += time.perf_counter() - began
        words = "; ".join(
            filter(None, (_of_networks(figures, *kind) for kind in (("knn_", "k-NN"), ("linear_", "linear probe"))))
        )
        self.row_of_epoch({"step": step, "epoch": epoch} | figures, f"after epoch {epoch}: {words}")

    def row_of_epoch(self, row: dict[str, float], sentence: str) -> None:
        """A row whose figures are known already, and the sentence that tells it."""
        self.settle()
        if self.is_main:
            self._keep(row)
            self.say(sentence)

    def _keep(self, row: dict[str, float]) -> None:
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()
        self._pass_on(row)


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl. A torn last line is passed over, as is what is no number that a run could write.

    Raises:
        UserError: where the file is there and cannot be read.
    """
    return [
        {name: value for name, value in row.items() if _is_figure(value)}
        for row in map(_parsed, _lines(path))
        if row is not None
    ]


def _drop_rows_past(path: Path, step: int) -> None:
    """Keep the full rows up to `step`: what came after it is computed again, and a torn last line goes."""
    if not path.exists():
        return
    kept = []
    for line in _lines(path):
        row = _parsed(line)
        if row is not None and row["step"] <= step and not row.get("partial"):
            kept.append(line + "\n")
    with atomic_write(path) as beside:
        beside.write_text("".join(kept))


def _lines(path: Path) -> list[str]:
    try:
        return read_file(path).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UserError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _parsed(line: str) -> dict[str, Any] | None:
    """What a line says of a step; None where it says nothing of one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    step = row.get("step")
    return row if isinstance(step, int | float) and 0 <= step < 2**63 else None


def _is_figure(value: Any) -> bool:
    """Whether a value can be counted with, drawn and shown: the file may be a stranger's. A loss may be infinite."""
    return isinstance(value, int | float) and (abs(value) < _BOUND or value in (math.inf, -math.inf) or value != value)


def _of_labels(row: dict[str, float], names: dict[str, str]) -> str:
    """The figures of a row that it has, each behind its letter."""
    return "".join(f" {letter} {row[name]:.3f}" for letter, name in names.items() if name in row)


def _of_networks(figures: dict[str, float], prefix: str, words: str) -> str:
    """What one kind of evaluation has found of each network, in percent; empty where it was not made."""
    found = [
        f"{name.removeprefix(prefix).replace('_', ' ')} {value:.1f} %"
        for name, value in figures.items()
        if name.startswith(prefix)
    ]
    return f"{words} {', '.join(found)}" if found else ""
