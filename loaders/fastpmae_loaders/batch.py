"""What a loader hands over."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .engine import Job

if TYPE_CHECKING:  # the loaders alone need numpy, numba, torch and Pillow, no more
    from jaxtyping import Bool, Int32, Int64, UInt8


@dataclass
class Batch:
    """B samples, each as two views and a mask. The tensors are the taker's own; views are bytes, not normalised.

    Attributes:
        simple, complex: the two views, side S.
        visible: patches that the student sees.
        folds: the hidden patches, fold after fold; `fold_sizes` tells where one ends.
        label: -1 where the file has none. index: the sample in the file.
        simple_box, complex_box: top, left, height, width of the crop in source pixels (before the flip).
        source_size: the source's height and width in pixels.
        failed: samples that were asked for and did not decode; the next good one stands in their place.
    """

    simple: UInt8[Tensor, "batch 3 side side"]
    complex: UInt8[Tensor, "batch 3 side side"]
    visible: Int64[Tensor, "batch visible"]
    folds: Int64[Tensor, "batch masked"]
    fold_sizes: tuple[int, ...]
    label: Int64[Tensor, " batch"]
    index: Int64[Tensor, " batch"]
    simple_box: Int32[Tensor, "batch 4"]
    complex_box: Int32[Tensor, "batch 4"]
    simple_flip: Bool[Tensor, " batch"]
    complex_flip: Bool[Tensor, " batch"]
    source_size: Int32[Tensor, "batch 2"]
    failed: list[int]

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


def batch_of(job: Job, label: Tensor, fold_sizes: tuple[int, ...], failed: list[int]) -> Batch:
    """A finished job as a Batch; copies nothing but the small boxes and flips."""
    tensors = job.tensors
    boxes, flips = tensors["boxes"], tensors["flips"]
    return Batch(
        simple=tensors["simple"],
        complex=tensors["complex"],
        visible=tensors["visible"],
        folds=tensors["folds"],
        fold_sizes=fold_sizes,
        label=label,
        index=tensors["index"],
        simple_box=boxes[:, 0].contiguous(),
        complex_box=boxes[:, 1].contiguous(),
        simple_flip=flips[:, 0].contiguous(),
        complex_flip=flips[:, 1].contiguous(),
        source_size=tensors["size"],
        failed=failed,
    )
