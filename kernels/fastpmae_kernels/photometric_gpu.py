"""The Triton form of `photometric`: the contrast's sums, what is done pixel by pixel, the blur along and down.

A program whose image needs nothing ends at once.
"""

from typing import Any

import torch
from torch import Tensor

from fastpmae_kernels.backend import ceil_div, constexpr, tl, triton
from fastpmae_kernels.patch_tokens import affine
from fastpmae_kernels.photometric import photometric_op
from fastpmae_kernels.photometric_numbers import RADIUS, SIGMA, blur_weights, fp32_numbers

PIXELS, LINES, COLUMNS = 2048, 16, 128
"""A program's tile: pixels in a row, or lines and columns of a plane; 16 bytes a thread."""


def photometric_meta(warp_size: int = 64 if torch.version.hip else 32) -> dict[str, Any]:
    """Threads of every kernel here, and no contraction: each product and sum is rounded, as on a CPU."""
    return {"num_warps": 128 // warp_size, "enable_fp_fusion": False}


@photometric_op.register_kernel("cuda")
def photometric_triton(
    images: Tensor, factors: Tensor, choices: Tensor, threshold: int, dtype: torch.dtype,
    mean: list[float], std: list[float],
) -> Tensor:  # fmt: skip
    images = images.contiguous()
    batch, _, height, width = images.shape
    changed = torch.empty(images.shape, dtype=dtype, device=images.device)
    if images.numel() == 0:
        return changed
    factors, choices = factors.to(images.device), choices.to(images.device).contiguous()
    numbers, taps = fp32_numbers(factors), blur_weights(factors[:, SIGMA])
    as_bytes = dtype == torch.uint8
    unblurred = changed if as_bytes else torch.empty_like(images)
    between = torch.empty_like(images)
    last = (threshold, *(number for channel in affine(tuple(mean), tuple(std)) for number in channel))
    pixels, meta = height * width, photometric_meta()
    tiles = ceil_div(pixels, PIXELS)
    sums = torch.empty(batch, tiles, dtype=torch.int32, device=images.device)
    luma_kernel[(batch, tiles)](images, numbers, choices, sums, pixels, PIXELS=PIXELS, **meta)
    means = (sums.sum(dim=1, dtype=torch.int64).double() / pixels).float()
    point_kernel[(batch, tiles)](
        images, numbers, choices, means, unblurred, changed, pixels, *last,
        NORMALISED=not as_bytes, PIXELS=PIXELS, **meta,
    )  # fmt: skip
    # Within the blur's reach of both edges one mirror is not enough: they face each other.
    tiny = min(height, width) <= RADIUS
    meta |= {"TINY": tiny, "RADIUS": RADIUS, "LINES": LINES, "COLUMNS": COLUMNS}
    grid = (batch, ceil_div(3 * height, LINES), ceil_div(width, COLUMNS))
    size = (height, width, *last)
    blur_kernel[grid](unblurred, between, choices, taps, *size, DOWN=False, NORMALISED=False, **meta)
    blur_kernel[grid](between, changed, choices, taps, *size, DOWN=True, NORMALISED=not as_bytes, **meta)
    return changed


@triton.jit
def luma_kernel(images, numbers, choices, sums, pixels, PIXELS: constexpr):
    """The sum of the luma of one tile of one image, as it is when the contrast's turn comes."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = place < pixels
    total = 0
    if tl.load(choices + image * 9 + 4) != 0:
        start = images + image * 3 * pixels + place
        red = tl.load(start, mask=inside, other=0).to(tl.float32)
        green = tl.load(start + pixels, mask=inside, other=0).to(tl.float32)
        blue = tl.load(start + 2 * pixels, mask=inside, other=0).to(tl.float32)
        waits = True
        for turn in range(4):
            which = tl.load(choices + image * 9 + turn)
            waits = waits & (which != 1)
            if waits:
                red, green, blue = _tile_jittered(red, green, blue, which, numbers + image * 8, 0.0)
        total = tl.sum(tl.where(inside, _tile_luma(red, green, blue), 0.0).to(tl.int32))
    tl.store(sums + image * tl.num_programs(1) + tl.program_id(1), total)


@triton.jit
def point_kernel(
    images, numbers, choices, means, unblurred, changed, pixels,
    threshold, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    NORMALISED: constexpr, PIXELS: constexpr,
):  # fmt: skip
    """Jitter and grayscale of one tile of one image; where no blur comes after, also what comes last."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = place < pixels
    first = image * 3 * pixels + place
    red = tl.load(images + first, mask=inside, other=0).to(tl.float32)
    green = tl.load(images + first + pixels, mask=inside, other=0).to(tl.float32)
    blue = tl.load(images + first + 2 * pixels, mask=inside, other=0).to(tl.float32)
    coins = choices + image * 9
    if tl.load(coins + 4) != 0:
        mean = tl.load(means + image)
        for turn in range(4):
            red, green, blue = _tile_jittered(red, green, blue, tl.load(coins + turn), numbers + image * 8, mean)
    if tl.load(coins + 5) != 0:
        red = _tile_luma(red, green, blue)
        green = red
        blue = red
    if tl.load(coins + 6) != 0:
        tl.store(unblurred + first, _tile_bytes(red), mask=inside)
        tl.store(unblurred + first + pixels, _tile_bytes(green), mask=inside)
        tl.store(unblurred + first + 2 * pixels, _tile_bytes(blue), mask=inside)
    else:
        bound = tl.where(tl.load(coins + 7) != 0, threshold, 256)
        _store_last(changed + first, red, inside, bound, scale_r, shift_r, NORMALISED)
        _store_last(changed + first + pixels, green, inside, bound, scale_g, shift_g, NORMALISED)
        _store_last(changed + first + 2 * pixels, blue, inside, bound, scale_b, shift_b, NORMALISED)


@triton.jit
def blur_kernel(
    source, target, choices, taps, height, width,
    threshold, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    DOWN: constexpr, NORMALISED: constexpr, TINY: constexpr, RADIUS: constexpr, LINES: constexpr, COLUMNS: constexpr,
):  # fmt: skip
    """One tile of a blur along the rows, or down the columns, after which comes what comes last."""
    image = tl.program_id(0).to(tl.int64)
    coins = choices + image * 9
    if tl.load(coins + 6) != 0:
        line = tl.program_id(1) * LINES + tl.arange(0, LINES)
        x = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (line < 3 * height)[:, None] & (x < width)[None, :]
        channel = line // height
        y = line % height
        plane = (image * 3 + channel) * height * width
        here = (plane + y * width)[:, None] + x[None, :]
        weights = taps + image * (RADIUS + 1)
        total = tl.load(source + here, mask=inside, other=0).to(tl.int32) * tl.load(weights) + 8192
        for k in range(1, RADIUS + 1):
            weight = tl.load(weights + k)
            if weight != 0:
                if DOWN:
                    one = (plane + _mirrored(y - k, height, TINY) * width)[:, None] + x[None, :]
                    other = (plane + _mirrored(y + k, height, TINY) * width)[:, None] + x[None, :]
                else:
                    one = (plane + y * width)[:, None] + _mirrored(x - k, width, TINY)[None, :]
                    other = (plane + y * width)[:, None] + _mirrored(x + k, width, TINY)[None, :]
                pair = tl.load(source + one, mask=inside, other=0).to(tl.int32)
                pair += tl.load(source + other, mask=inside, other=0).to(tl.int32)
                total += pair * weight
        value = (total >> 14).to(tl.float32)
        if DOWN:
            bound = tl.where(tl.load(coins + 7) != 0, threshold, 256)
            scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))[:, None]
            shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))[:, None]
            _store_last(target + here, value, inside, bound, scale, shift, NORMALISED)
        else:
            tl.store(target + here, _tile_bytes(value), mask=inside)


@triton.jit
def _mirrored(place, size, TINY: constexpr):
    if TINY:
        period = tl.maximum(2 * size - 2, 1)
        place = (place % period + period) % period
    place = tl.abs(place)
    return tl.where(place >= size, 2 * size - 2 - place, place)


@triton.jit
def _tile_bytes(value):
    return value.to(tl.int32).to(tl.uint8)


@triton.jit
def _tile_cut(value):
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32).to(tl.float32)


@triton.jit
def _tile_luma(red, green, blue):
    return ((red * 0.2989 + green * 0.587) + blue * 0.114).to(tl.int32).to(tl.float32)


@triton.jit
def _tile_ramp(place):
    place = tl.where(place >= 6.0, place - 6.0, place)
    return tl.minimum(tl.maximum(tl.minimum(place, 4.0 - place), 0.0), 1.0)


@triton.jit
def _tile_jittered(red, green, blue, which, numbers, mean):
    weight = tl.load(numbers + which)
    if which == 3:
        high = tl.maximum(tl.maximum(red, green), blue)
        spread = high - tl.minimum(tl.minimum(red, green), blue)
        part = tl.div_rn(tl.full(spread.shape, 1.0, tl.float32), tl.maximum(spread, 1.0))
        hue = tl.where(high == green, (blue - red) * part + 2.0, (red - green) * part + 4.0)
        hue = tl.where(high == red, (green - blue) * part, hue)
        hue = tl.where(hue < 0.0, hue + 6.0, hue) + weight
        hue = tl.where(hue >= 6.0, hue - 6.0, hue)
        red = _tile_cut((high - spread * _tile_ramp(hue + 5.0)) * (255.999 / 255.0))
        green = _tile_cut((high - spread * _tile_ramp(hue + 3.0)) * (255.999 / 255.0))
        blue = _tile_cut((high - spread * _tile_ramp(hue + 1.0)) * (255.999 / 255.0))
    else:
        rest = tl.load(numbers + 4 + which)
        other = tl.where(which == 2, _tile_luma(red, green, blue), mean) * rest
        other = tl.where(which == 0, 0.0, other)
        red = _tile_cut(red * weight + other)
        green = _tile_cut(green * weight + other)
        blue = _tile_cut(blue * weight + other)
    return red, green, blue


@triton.jit
def _store_last(into, value, inside, bound, scale, shift, NORMALISED: constexpr):
    """Solarise, and normalise where that is asked for."""
    value = tl.where(value >= bound, 255.0 - value, value)
    if NORMALISED:
        tl.store(into, (value * scale + shift).to(into.dtype.element_ty), mask=inside)
    else:
        tl.store(into, _tile_bytes(value), mask=inside)
