"""What the loaders ask of an engine, and what an engine is given to fill."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from .beton import Beton
from .scratch import Scratch
from .settings import ViewSettings
from .views import Rows

ATTEMPTS = 64
"""How many samples in a row are tried before a row is given up."""


@dataclass(frozen=True)
class Source:
    """What the rows are made from: a file, the settings, and for evaluation the shorter side (else 0)."""

    beton: Beton
    settings: ViewSettings
    seed: int
    shorter: int = 0


@dataclass
class Job:
    """One batch in the making. Threads take its rows one by one from `counter` until none is left.

    `rows` are views of `tensors`. `left` counts the rows that are not yet done; the stream keeps it.
    """

    epoch: int
    indices: np.ndarray
    tensors: dict[str, torch.Tensor]
    rows: Rows
    counter: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    left: int = 0


class Engine(Protocol):
    """Turns jobs into batches. `fill` is called by several threads at once, each with its own scratch."""

    def fill(self, job: Job, scratch: Scratch) -> int:
        """Do rows of the job until none is left to take; how many this call did."""
        ...


def make_job(indices: np.ndarray, epoch: int, settings: ViewSettings, pair: bool = True) -> Job:
    """A job with memory of its own, pinned where CUDA is there, so that a batch belongs to who takes it."""
    count, side, visible = len(indices), settings.image_size, settings.visible
    pinned = torch.cuda.is_available()

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=pinned and 0 not in shape)

    twice = count if pair else 0
    tensors = {
        "simple": empty(count, 3, side, side, dtype=torch.uint8),
        "complex": empty(twice, 3, side, side, dtype=torch.uint8),
        "visible": empty(twice, visible, dtype=torch.int64),
        "folds": empty(twice, settings.patches - visible, dtype=torch.int64),
        "boxes": empty(count, 2, 4, dtype=torch.int32),
        "flips": empty(count, 2, dtype=torch.bool),
        "size": empty(count, 2, dtype=torch.int32),
        "index": empty(count, dtype=torch.int64),
    }
    rows = Rows(**{name: tensor.numpy() for name, tensor in tensors.items()})
    return Job(epoch, np.ascontiguousarray(indices, np.int64), tensors, rows, left=count)
