"""Colours of a batch: jitter in each image's own order, grayscale, blur, solarise, and normalisation if asked for.

Every form gives the same bytes: sums over an image are whole numbers, the blur's weights are whole numbers of
1 / 2^14, and fp32 is added and multiplied in one order, without contraction, and cut to bytes after each operation as
torchvision does it for bytes.
"""

import numpy as np
import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor

from fastpmae_kernels import backend
from fastpmae_kernels.backend import operation, written_on
from fastpmae_kernels.cpu import photometric as on_cpu
from fastpmae_kernels.patch_tokens import IMAGENET_MEAN, IMAGENET_STD, affine
from fastpmae_kernels.photometric_numbers import (
    BLURRED,
    BRIGHTNESS,
    CHOICES,
    CONTRAST,
    FACTORS,
    GRAY,
    JITTER,
    ONE,
    RADIUS,
    SATURATION,
    SCALE,
    SIGMA,
    SOLARISED,
    blur_weights,
)


@torch.no_grad()
def photometric(
    images: UInt8[Tensor, "batch 3 height width"],
    factors: Float[Tensor, "batch 5"],
    choices: UInt8[Tensor, "batch 9"],
    threshold: int = 128,
    dtype: torch.dtype = torch.uint8,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Num[Tensor, "batch 3 height width"]:
    """DINO's colour changes, each image with its own factors, order and coins.

    Args:
        images: bytes; any strides; left as they are.
        factors: brightness, contrast, saturation (1 changes nothing), hue (-0.5 to 0.5 of the circle), and the blur's
            sigma in pixels; best in float64.
        choices: four columns, a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue: which comes first,
            second, ...; then whether to jitter, turn gray, blur, solarise; the last column is not read.
        threshold: solarise turns bytes from here on upside down, 0 to 255.
        dtype: uint8 gives bytes; fp32, bf16 or fp16 gives them normalised.
        mean, std: of pixel values between 0 and 1, a channel; ImageNet's by default; for normalised results only.

    Raises:
        ValueError: for tensors of another kind or shape, or a threshold out of range.
    """
    _check(images, factors, choices, threshold)
    if backend.runs_plain(images) or dtype == torch.float64:
        return photometric_ref(images, factors, choices, threshold, dtype, mean, std)
    return torch.ops.fastpmae.photometric(images, factors, choices, threshold, dtype, list(mean), list(std))


def photometric_ref(
    images: UInt8[Tensor, "batch 3 height width"],
    factors: Float[Tensor, "batch 5"],
    choices: UInt8[Tensor, "batch 9"],
    threshold: int = 128,
    dtype: torch.dtype = torch.uint8,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Num[Tensor, "batch 3 height width"]:
    """The plain form of `photometric`: one image and one operation after the other."""
    _check(images, factors, choices, threshold)
    changed = torch.empty_like(images, memory_format=torch.contiguous_format)
    for i, (factor, choice) in enumerate(zip(factors.tolist(), choices.tolist(), strict=True)):
        pixels = images[i].float()
        if choice[JITTER]:
            for which in choice[:JITTER]:
                pixels = _jitter_ref(pixels, which, factor[which])
        if choice[GRAY]:
            pixels = _luma_ref(pixels).expand_as(pixels)
        if choice[BLURRED]:
            pixels = _blur_ref(pixels, factor[SIGMA])
        if choice[SOLARISED]:
            pixels = torch.where(pixels >= threshold, 255 - pixels, pixels)
        changed[i] = pixels.to(torch.uint8)
    if dtype == torch.uint8:
        return changed
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    of_channels = [written_on(images.device, numbers, exact)[:, None, None] * 255 for numbers in (mean, std)]
    return ((changed.to(exact) - of_channels[0]) / of_channels[1]).to(dtype)


def _byte_ref(pixels: Tensor) -> Tensor:
    return pixels.clamp(0, 255).trunc()


def _luma_ref(pixels: Float[Tensor, "3 height width"]) -> Float[Tensor, "height width"]:
    return (pixels[0] * 0.2989 + pixels[1] * 0.587 + pixels[2] * 0.114).trunc()


def _jitter_ref(pixels: Float[Tensor, "3 height width"], which: int, factor: float) -> Tensor:
    if which == BRIGHTNESS:
        return _byte_ref(pixels * factor)
    if which == CONTRAST:
        return _byte_ref(pixels * factor + _luma_ref(pixels).double().mean().float() * (1.0 - factor))
    if which == SATURATION:
        return _byte_ref(pixels * factor + _luma_ref(pixels) * (1.0 - factor))
    red, green, blue = pixels
    high, low = pixels.amax(0), pixels.amin(0)
    spread = high - low
    part = 1 / spread.clamp(min=1)
    of_green = torch.where(high == green, (blue - red) * part + 2, (red - green) * part + 4)
    hue = torch.where(high == red, (green - blue) * part, of_green)
    hue = torch.where(hue < 0, hue + 6, hue) + (factor - np.floor(factor)) * 6.0
    hue = torch.where(hue >= 6, hue - 6, hue)
    turned = []
    for offset in (5, 3, 1):
        place = torch.where(hue + offset >= 6, hue + offset - 6, hue + offset)
        turned.append((high - spread * torch.minimum(place, 4 - place).clamp(0, 1)) * SCALE)
    return _byte_ref(torch.stack(turned))


def _blur_ref(pixels: Float[Tensor, "3 height width"], sigma: float) -> Tensor:
    weights = blur_weights(torch.tensor([sigma], dtype=torch.float64, device="cpu"))[0].tolist()
    for axis in (2, 1):
        size = pixels.shape[axis]
        lines = pixels.unbind(axis)
        blurred = []
        for x in range(size):
            total = lines[x] * weights[0]
            for k in range(1, RADIUS + 1):
                total = total + (lines[mirrored(x - k, size)] + lines[mirrored(x + k, size)]) * weights[k]
            blurred.append(((total + ONE // 2) / ONE).floor())
        pixels = torch.stack(blurred, axis)
    return pixels


def mirrored(place: int, size: int) -> int:
    """The place that a place beyond the edge shows, the edge itself not repeated."""
    place = place % max(2 * size - 2, 1)
    return place if place < size else 2 * size - 2 - place


def _check(images: Tensor, factors: Tensor, choices: Tensor, threshold: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be bytes [batch, 3, height, width], not {images.dtype} {tuple(images.shape)}")
    if factors.shape != (len(images), FACTORS) or not factors.is_floating_point():
        raise ValueError(
            f"factors must be floats [{len(images)}, {FACTORS}], not {factors.dtype} {tuple(factors.shape)}"
        )
    if choices.shape != (len(images), CHOICES) or choices.dtype != torch.uint8:
        raise ValueError(
            f"choices must be bytes [{len(images)}, {CHOICES}], not {choices.dtype} {tuple(choices.shape)}"
        )
    if not 0 <= threshold <= 255:
        raise ValueError(f"the threshold {threshold} is no byte")


# The CPU form, and what torch.compile asks of every form; the Triton form is in `photometric_gpu.py`.


@operation("photometric")
def photometric_op(
    images: Tensor, factors: Tensor, choices: Tensor, threshold: int, dtype: torch.dtype,
    mean: list[float], std: list[float],
) -> Tensor:  # fmt: skip
    return on_cpu.photometric(images, factors, choices, threshold, dtype, *affine(tuple(mean), tuple(std)))


@photometric_op.register_fake
def _(images, factors, choices, threshold, dtype, mean, std):
    return torch.empty(images.shape, dtype=dtype, device=images.device)
