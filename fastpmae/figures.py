"""Figures that are still on the device, and how all of a row's come to the host at once."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor


class Figures(NamedTuple):
    """What the device has computed for a row, and how it becomes entries of the row on the host."""

    numbers: Float64[Tensor, " numbers"]
    """On the device."""
    named: Callable[[list[float], list[Tensor]], dict[str, float]]
    """Makes the entries of the numbers and the matrices. May take the host a while, but waits for nothing."""
    matrices: tuple[Float64[Tensor, "dim dim"], ...] = ()
    """What the host is to work on itself."""


def bring(*parts: Figures) -> Callable[[], dict[str, float]]:
    """Wait for the device, once for all figures; the work that the host has to do on them is left to the call."""
    # Into pinned memory and without waiting: before the numbers, so that they are there when the numbers are.
    matrices = [[matrix.to("cpu", non_blocking=True) for matrix in part.matrices] for part in parts]
    numbers = torch.cat([part.numbers for part in parts]).tolist()

    def named() -> dict[str, float]:
        entries: dict[str, float] = {}
        start = 0
        for part, theirs in zip(parts, matrices, strict=True):
            stop = start + len(part.numbers)
            entries |= part.named(numbers[start:stop], theirs)
            start = stop
        return entries

    return named
