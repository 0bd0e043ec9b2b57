"""Figures that are still on the device, and how all of a row's come to the host at once."""

from collections.abc import Callable
from itertools import islice
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


def to_host(*parts: Figures) -> Callable[[], dict[str, float]]:
    """Wait for the device, once for all figures; the work that the host has to do on them is left to the call."""
    # Into pinned memory and without waiting: before the numbers, so that they are there when the numbers are.
    matrices = [[matrix.to("cpu", non_blocking=True) for matrix in part.matrices] for part in parts]
    numbers = iter(torch.cat([part.numbers for part in parts]).tolist())
    found = [
        (part.named, list(islice(numbers, len(part.numbers))), mine) for part, mine in zip(parts, matrices, strict=True)
    ]

    def named() -> dict[str, float]:
        entries: dict[str, float] = {}
        for name, theirs, mine in found:
            entries |= name(theirs, mine)
        return entries

    return named
