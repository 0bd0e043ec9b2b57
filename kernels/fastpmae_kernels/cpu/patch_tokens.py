"""Bytes to tokens on the CPU: line by line of each patch."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy import float32
from torch import Tensor

from fastpmae_kernels.cpu.compiled import compiled
from fastpmae_kernels.cpu.rows import share_out


def patch_tokens(
    images: Tensor, ids: Tensor, patch_size: int, dtype: torch.dtype, factors: Sequence[float],
    summands: Sequence[float],
) -> Tensor:  # fmt: skip
    """The patches `ids` of each image, each channel times its factor and with its summand."""
    batch, _, height, width = images.shape
    count = ids.shape[1]
    patches = (height // patch_size) * (width // patch_size)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < patches:
        raise IndexError(f"ids reach from {int(ids.min())} to {int(ids.max())}, there are {patches} patches")
    tokens = torch.empty(batch, count, 3 * patch_size**2, dtype=torch.float32, device="cpu")
    scale, shift = (np.array(numbers, np.float32) for numbers in (factors, summands))
    pixels, places, written = images.contiguous().numpy(), ids.long().contiguous().numpy(), tokens.numpy()

    def work(block: int, start: int, stop: int) -> None:
        _tokens_block(pixels[start:stop], places[start:stop], patch_size, scale, shift, written[start:stop])

    share_out([(start, min(start + 4, batch)) for start in range(0, batch, 4)], work)
    return tokens if dtype == torch.float32 else tokens.to(dtype)


@compiled("contract", "nsz")
def _tokens_block(images, ids, size, scale, shift, tokens):
    batch, count = ids.shape
    columns = images.shape[3] // size
    for b in range(batch):
        for p in range(count):
            top, left = ids[b, p] // columns * size, ids[b, p] % columns * size
            token = tokens[b, p]
            for c in range(3):
                by, plus = scale[c], shift[c]
                for y in range(size):
                    line = images[b, c, top + y, left : left + size]
                    start = (c * size + y) * size
                    into = token[start : start + size]
                    for x in range(size):
                        into[x] = float32(line[x]) * by + plus
