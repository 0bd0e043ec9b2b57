"""What every stage is given: the device, the sizes, the images and where to write."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.record import Record


@dataclass(frozen=True)
class Sizes:
    """How large everything is: as in the aims, or so small that a CPU is through in seconds."""

    models: tuple[str, ...]
    batch: int
    """Images a step."""
    table6_batch: int
    network: dict[str, Any]
    """Settings that make the networks smaller."""
    steps: int
    """Steps that are timed."""
    prototypes: int
    masked: int
    dim: int
    kernel_batch: int
    """Images whose patches the kernels are timed on."""
    check_rows: int
    """Rows of the largest matrix that kernels are checked on."""
    train_steps: int
    epoch_images: int
    """Images of the epoch that the trainer and the loaders are timed on: the originals, repeated."""
    seconds: float
    """That a loader is timed."""


FULL = Sizes(
    models=("vit_small", "vit_base"), batch=256, table6_batch=96, network={}, steps=12, prototypes=4096, masked=147,
    dim=768, kernel_batch=768, check_rows=9408, train_steps=160, epoch_images=24_000, seconds=5.0,
)  # fmt: skip
TINY = Sizes(
    models=("vit_tiny",), batch=4, table6_batch=2,
    network={"depth": 1, "decoder_depth": 1, "prototypes": 64, "image_size": 64}, steps=2, prototypes=64, masked=9,
    dim=24, kernel_batch=2, check_rows=96, train_steps=4, epoch_images=16, seconds=0.2,
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One stage's work."""

    device: torch.device
    tiny: bool
    record: Record
    data: Path
    """The folder with `originals.beton`, `train.beton` and `val.beton`."""
    folder: Path
    """For files that nobody keeps."""
    out: Path
    """For files that come back."""
    deadline: float
    """When the stage must be done, by `time.monotonic()`."""
    methods: tuple[str, ...]
    """That the learning stage trains."""
    epochs: int
    """That it trains each for."""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def sizes(self) -> Sizes:
        return TINY if self.tiny else FULL

    def has(self, seconds: float, name: str) -> bool:
        """Whether so much time is left; where it is not, that is noted as the reason why `name` was left out."""
        left = self.deadline - time.monotonic()
        if left < seconds:
            self.record.note(name, left_out=f"it takes about {seconds:.0f} s, and {max(left, 0):.0f} s were left")
        return left >= seconds

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def median(self, run: Callable[[], Any]) -> float:
        """Seconds of a run, the median; on a GPU by its own clock, with the cache emptied before each."""
        if self.cuda:
            from triton.testing import do_bench

            return do_bench(run, warmup=20, rep=120, return_mode="median") / 1e3  # pyright: ignore[reportOperatorIssue]
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)
