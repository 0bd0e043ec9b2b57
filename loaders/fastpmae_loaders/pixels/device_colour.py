"""A batch's colour operations in plain torch, on any device with float64: the same bytes as `colour.py` image by image.

Every operation is computed for every image and kept where the image's draws ask for it, so nothing waits for the
device and no shape depends on a coin. Pixels are fp32 that hold whole numbers; products and sums are rounded to
bytes where `colour.py` rounds them, in its order of additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.pixels.colour import ONE, RADIUS
from fastpmae_loaders.sampling import BLURRED, CHOICES, FACTORS, GRAY, JITTER, ORDER, SIGMA, SOLARISED

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from torch import Tensor

CHUNK = 1 << 22
"""Bytes of images that are changed at a time; some ten times as many fp32 numbers live meanwhile."""
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""What the first four columns of `choices` name, and the columns of `factors` that go with them."""


@torch.no_grad()
def change_colours(
    images: UInt8[Tensor, "batch 3 height width"],
    factors: Float[Tensor, "batch 5"],
    choices: UInt8[Tensor, "batch 9"],
    threshold: int,
) -> UInt8[Tensor, "batch 3 height width"]:
    """Jitter in each image's own order, grayscale, blur, solarise, each where its coin fell so.

    Args:
        images: left as they are.
        factors, choices: rows of a batch's draws (see `SampleDraws`), on any device.
        threshold: solarise turns bytes from here on upside down, 0 to 255.

    Raises:
        UserError: for tensors of another kind or shape.
    """
    _check(images, factors, choices, threshold)
    factors = factors.to(images.device, torch.float64, non_blocking=True)
    choices = choices.to(images.device, non_blocking=True)
    changed = torch.empty(images.shape, dtype=torch.uint8, device=images.device)
    if images.numel() == 0:
        return changed
    for rows in _chunks(images):
        pixels = images[rows].to(torch.float32)
        pixels = _jittered(pixels, factors[rows], choices[rows])
        pixels = torch.where(_coin(choices[rows], GRAY), _luma(pixels), pixels)
        pixels = torch.where(_coin(choices[rows], BLURRED), _blurred(pixels, factors[rows, SIGMA]), pixels)
        solarised = _coin(choices[rows], SOLARISED) & (pixels >= threshold)
        changed[rows] = torch.where(solarised, 255 - pixels, pixels).to(torch.uint8)
    return changed


@torch.no_grad()
def normalise(
    images: UInt8[Tensor, "batch 3 height width"],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "batch 3 height width"]:
    """Bytes to `(value / 255 - mean) / std`, computed in fp32 and rounded once to `dtype`.

    Args:
        mean, std: of pixel values between 0 and 1, one number a channel.

    Raises:
        UserError: for tensors of another kind or shape, or not one number a channel.
    """
    _check_images(images)
    if len(mean) != 3 or len(std) != 3 or not all(std):
        raise UserError(f"normalise: mean {mean} and std {std} must be three numbers each, no std of them 0")
    values = torch.empty(images.shape, dtype=dtype, device=images.device)
    if images.numel() == 0:
        return values
    for rows in _chunks(images):
        for channel in range(3):
            # numbers of Python and no tensor of them: that would have to wait for the device
            shifted = images[rows, channel].to(torch.float32) - 255 * mean[channel]
            values[rows, channel] = (shifted / (255 * std[channel])).to(dtype)
    return values


def _chunks(images: Tensor) -> list[slice]:
    count = max(1, CHUNK // images[0].numel())
    return [slice(start, start + count) for start in range(0, len(images), count)]


def _coin(choices: Tensor, column: int) -> Tensor:
    return (choices[:, column] != 0).view(-1, 1, 1, 1)


def _byte(pixels: Tensor) -> Tensor:
    return pixels.clamp_(0, 255).trunc_()


def _luma(pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 1 height width"]:
    red, green, blue = pixels.split(1, dim=1)
    return ((red * 0.2989 + green * 0.587) + blue * 0.114).trunc_()


def _jittered(pixels: Tensor, factors: Tensor, choices: Tensor) -> Tensor:
    """The four in each image's order: what comes before its hue, the hue, and what comes after.

    The three others are one blend, so that the hue, which costs most, is computed once and not at each turn.
    """
    order = choices[:, ORDER : ORDER + 4].long()
    jitter = _coin(choices, JITTER).view(-1, 1)
    turn = torch.arange(4, device=pixels.device)
    turn_of_hue = ((order == HUE) * turn).sum(dim=1, keepdim=True)
    before = torch.where(jitter & (turn < turn_of_hue), order, HUE)
    after = torch.where(jitter & (turn > turn_of_hue), order, HUE)

    one = torch.ones_like(factors[:, :1])
    weights = torch.cat([factors[:, :HUE], one], dim=1).to(torch.float32)
    rests = torch.cat([one - 1, 1.0 - factors[:, CONTRAST:HUE], one - 1], dim=1).to(torch.float32)
    for place in range(3):
        pixels = _blended(pixels, before[:, place : place + 1], weights, rests)
    pixels = torch.where(jitter.view(-1, 1, 1, 1), _turned(pixels, factors[:, HUE]), pixels)
    for place in range(1, 4):
        pixels = _blended(pixels, after[:, place : place + 1], weights, rests)
    return pixels


def _blended(pixels: Tensor, which: Tensor, weights: Tensor, rests: Tensor) -> Tensor:
    """Brightness, contrast or saturation of each image, or (`which` = HUE) nothing: pixels and what they fade to."""
    luma = _luma(pixels)
    # whole numbers: the same sum in any order
    total = luma.sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    mean = (total / luma[0].numel()).to(torch.float32)
    other = torch.where((which == CONTRAST).view(-1, 1, 1, 1), mean, luma)
    weight, rest = (numbers.gather(1, which).view(-1, 1, 1, 1) for numbers in (weights, rests))
    return _byte(pixels * weight + other * rest)


def _turned(pixels: Tensor, hue: Float[Tensor, " batch"]) -> Tensor:
    """The hue turned by `hue` of the circle."""
    turn = ((hue - hue.floor()) * 6.0).to(torch.float32).view(-1, 1, 1)
    red, green, blue = pixels.unbind(dim=1)
    high = torch.maximum(torch.maximum(red, green), blue)
    spread = high - torch.minimum(torch.minimum(red, green), blue)
    part = 1 / spread.clamp(min=1)
    from_red = (green - blue) * part
    from_green = (blue - red) * part + 2
    from_blue = (red - green) * part + 4
    place = torch.where(high == red, from_red, torch.where(high == green, from_green, from_blue))
    place = torch.where(place < 0, place + 6, place) + turn
    place = torch.where(place >= 6, place - 6, place)
    channels = [high - spread * _ramp(place + offset) for offset in (5, 3, 1)]
    return _byte(torch.stack(channels, dim=1) * (255.999 / 255.0))


def _ramp(place: Tensor) -> Tensor:
    place = torch.where(place >= 6, place - 6, place)
    return torch.minimum(place, 4 - place).clamp_(0, 1)


def _blurred(pixels: Tensor, sigma: Float[Tensor, " batch"]) -> Tensor:
    """Rows, then columns. The weights are whole numbers of 1 / ONE, so every sum here is exact in fp32."""
    weights = _taps(sigma).to(torch.float32).view(-1, RADIUS + 1, 1, 1, 1)
    for axis in (3, 2):
        size = pixels.shape[axis]
        around = pixels.index_select(axis, _mirrored(size, pixels.device))
        total = pixels * weights[:, 0]
        for k in range(1, RADIUS + 1):
            pair = around.narrow(axis, RADIUS - k, size) + around.narrow(axis, RADIUS + k, size)
            total.addcmul_(pair, weights[:, k])
        pixels = total.add_(ONE // 2).mul_(1 / ONE).floor_()
    return pixels


def _taps(sigma: Float[Tensor, " batch"]) -> Float[Tensor, "batch taps"]:
    """The middle's weight and those of 1 to 11 pixels away, in units of 1 / ONE (`colour.fill_taps`)."""
    distance = torch.arange(1, RADIUS + 1, device=sigma.device, dtype=torch.float64)
    shares = (-(distance**2) / (2.0 * sigma.unsqueeze(1) ** 2)).clamp(min=-600.0).exp()
    shares = shares / (1.0 + 2.0 * shares.sum(dim=1, keepdim=True))
    sides = (shares * ONE + 0.5).floor()
    return torch.cat([ONE - 2 * sides.sum(dim=1, keepdim=True), sides], dim=1)


def _mirrored(size: int, device: torch.device) -> Tensor:
    """The place each of size + 22 places shows, from RADIUS before the first on; the edge itself is not repeated."""
    period = max(2 * size - 2, 1)
    place = torch.arange(-RADIUS, size + RADIUS, device=device).remainder(period)
    return torch.where(place >= size, period - place, place)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"images must be bytes [batch, 3, height, width], not {images.dtype} {list(images.shape)}")


def _check(images: Tensor, factors: Tensor, choices: Tensor, threshold: int) -> None:
    _check_images(images)
    if list(factors.shape) != [len(images), FACTORS] or not factors.is_floating_point():
        raise UserError(
            f"factors must be float64 [{len(images)}, {FACTORS}], not {factors.dtype} {list(factors.shape)}"
        )
    if list(choices.shape) != [len(images), CHOICES] or choices.dtype != torch.uint8:
        raise UserError(f"choices must be bytes [{len(images)}, {CHOICES}], not {choices.dtype} {list(choices.shape)}")
    if not 0 <= threshold <= 255:
        raise UserError(f"the solarise threshold {threshold} must be between 0 and 255")
