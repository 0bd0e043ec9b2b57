"""What a loader hands over."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastpmae_loaders.engines.base import Job

if TYPE_CHECKING:  # the loaders alone need numpy, numba, torch and Pillow, no more
    from jaxtyping import Bool, Float64, Int32, Int64, UInt8


@dataclass
class Batch:
    """B samples, each as n views and a mask. The tensors are the taker's own; views are bytes, not normalised.

    Attributes:
        views: the views, each with its own side S. Of the pair, `simple` is the first and `complex` the second.
        visible: patches that the student sees.
        folds: the hidden patches, fold after fold; `fold_sizes` tells where one ends.
        label: -1 where the file has none. index: the sample in the file; `samples` are the same numbers on the
            host, whatever the device.
        boxes: top, left, height, width of each crop in source pixels (before the flip, which `flips` tells).
        factors, choices: what was drawn for the colours of each view (see `SampleDraws`).
        source_size: the source's height and width in pixels.
        failed: samples that were asked for and did not decode; the next good one stands in their place.
        number: which of its epoch's global batches it is, or a part of, from 0.
    """

    views: tuple[UInt8[Tensor, "batch 3 _side _side"], ...]
    visible: Int64[Tensor, "batch visible"]
    folds: Int64[Tensor, "batch masked"]
    fold_sizes: tuple[int, ...]
    label: Int64[Tensor, " batch"]
    index: Int64[Tensor, " batch"]
    boxes: Int32[Tensor, "batch views 4"]
    flips: Bool[Tensor, "batch views"]
    factors: Float64[Tensor, "batch views 5"]
    choices: UInt8[Tensor, "batch views 9"]
    source_size: Int32[Tensor, "batch 2"]
    samples: np.ndarray
    failed: list[int]
    number: int = 0

    def __len__(self) -> int:
        return len(self.index)

    @property
    def simple(self) -> UInt8[Tensor, "batch 3 side side"]:
        """The first view: of the pair, MAE's."""
        return self.views[0]

    @property
    def complex(self) -> UInt8[Tensor, "batch 3 side side"]:
        """The second view: of the pair, DINO's."""
        return self.views[1]

    @property
    def simple_box(self) -> Int32[Tensor, "batch 4"]:
        """The first view's crop."""
        return self.boxes[:, 0]

    @property
    def complex_box(self) -> Int32[Tensor, "batch 4"]:
        """The second view's crop."""
        return self.boxes[:, 1]

    @property
    def simple_flip(self) -> Bool[Tensor, " batch"]:
        """Whether the first view was mirrored."""
        return self.flips[:, 0]

    @property
    def complex_flip(self) -> Bool[Tensor, " batch"]:
        """Whether the second view was mirrored."""
        return self.flips[:, 1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        views = tuple(view.to(device, non_blocking=non_blocking) for view in self.views)
        return replace(self, views=views, **moved)

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator of every tensor that `stream` uses it too (see `torch.Tensor.record_stream`)."""
        for tensor in (*self.views, *(getattr(self, f.name) for f in fields(self))):
            if isinstance(tensor, Tensor):
                tensor.record_stream(stream)


def batch_of(job: Job, fold_sizes: tuple[int, ...], failed: list[int]) -> Batch:
    """A finished job as a Batch; copies nothing."""
    tensors = job.tensors
    return Batch(
        views=tuple(job.views),
        visible=tensors["visible"],
        folds=tensors["folds"],
        fold_sizes=fold_sizes,
        label=tensors["label"],
        index=tensors["index"],
        boxes=tensors["boxes"],
        flips=tensors["flips"],
        factors=tensors["factors"],
        choices=tensors["choices"],
        source_size=tensors["size"],
        samples=job.rows.index,
        failed=failed,
    )
