"""A segmentation of a whole image by windows of the size that the network was trained on."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from fastpmae.evaluate.dense.pyramid import padded
from fastpmae.evaluate.dense.upernet import upsampled

Network = Callable[[Float[Tensor, "batch 3 height width"]], Float[Tensor, "batch classes rows columns"]]


def window_starts(extent: int, window: int, stride: int) -> list[int]:
    """Where windows begin along an axis: every `stride` pixels, the last one flush with the end."""
    last = max(0, extent - window)
    return [*range(0, last, stride), last]


def sliding_logits(
    network: Network,
    image: Float[Tensor, "1 3 height width"],
    *,
    window: int,
    stride: int,
    patch_size: int,
    least: int,
    batch_size: int = 8,
) -> Float[Tensor, "1 classes height width"]:
    """The mean of the logits of all windows that cover a pixel, as mmsegmentation's `slide` mode has it.

    An image that is smaller than a window is one window. What is no multiple of the patches is padded to one, and cut
    again.

    Args:
        network: logits of normalised images, at any resolution.
        window, stride: in pixels.
        patch_size: of which both sides of what the network is given are multiples.
        least: the smallest side that the network takes.
        batch_size: windows at a time.
    """
    height, width = image.shape[-2:]
    rows, columns = min(window, height), min(window, width)
    places = [
        (top, left) for top in window_starts(height, rows, stride) for left in window_starts(width, columns, stride)
    ]
    total = times = None
    for first in range(0, len(places), batch_size):
        some = places[first : first + batch_size]
        parts = torch.cat([image[:, :, top : top + rows, left : left + columns] for top, left in some])
        given = padded(parts, patch_size, least)
        found = upsampled(network(given).float(), given.shape[-2:])[:, :, :rows, :columns]
        if total is None or times is None:
            if len(places) == 1:
                return found
            total = found.new_zeros(1, found.shape[1], height, width)
            times = found.new_zeros(height, width)
        for logits, (top, left) in zip(found, some, strict=True):
            total[0, :, top : top + rows, left : left + columns] += logits
            times[top : top + rows, left : left + columns] += 1
    assert total is not None
    assert times is not None
    return total / times
