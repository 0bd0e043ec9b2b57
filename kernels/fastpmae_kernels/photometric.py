"""Colours of a batch: jitter in each image's own order, grayscale, blur, solarise, and normalisation if asked for.

Every form gives the same bytes: sums over an image are whole numbers, the blur's weights are whole numbers of
1 / 2^14, and fp32 is added and multiplied in one order, without contraction, and cut to bytes after each operation as
torchvision does it for bytes.
"""

import numpy as np
import torch
from jaxtyping import Float, Int, Num, UInt8
from numpy import float32, int32, int64, uint8
from torch import Tensor

from fastpmae_kernels import backend
from fastpmae_kernels.backend import operation, written_on
from fastpmae_kernels.cpu.compiled import compiled
from fastpmae_kernels.cpu.rows import share_out
from fastpmae_kernels.patch_tokens import IMAGENET_MEAN, IMAGENET_STD, affine

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""What the first four columns of `choices` name; the columns of `factors` with the same numbers go with them."""
SIGMA = 4
"""The column of `factors` after them."""
JITTER, GRAY, BLURRED, SOLARISED = range(4, 8)
"""The columns of `choices` after the order."""
FACTORS, CHOICES = 5, 9
RADIUS = 11
"""The blur has 23 taps."""
ONE = 1 << 14
"""The blur's weights sum to this."""
SCALE = 255.999 / 255.0


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


def blur_weights(sigma: Float[Tensor, " batch"]) -> Int[Tensor, "batch taps"]:
    """The middle's weight and those of 1 to 11 pixels away, in units of 1 / ONE."""
    distance = torch.arange(1, RADIUS + 1, device=sigma.device, dtype=torch.float64)
    shares = (-(distance**2) / (2.0 * sigma.double().unsqueeze(1) ** 2)).clamp(min=-600.0).exp()
    shares = shares / (1.0 + 2.0 * shares.sum(dim=1, keepdim=True))
    sides = (shares * ONE + 0.5).floor()
    return torch.cat([ONE - 2 * sides.sum(dim=1, keepdim=True), sides], dim=1).to(torch.int32)


def fp32_numbers(factors: Tensor) -> Float[Tensor, "batch 8"]:
    """In fp32: each factor, with the hue as a turn of 0 to 6; then what is left of 1 beside each."""
    exact = factors.double()[:, :SIGMA]
    exact = torch.cat([exact[:, :HUE], (exact[:, HUE:] - exact[:, HUE:].floor()) * 6.0, 1.0 - exact], dim=1)
    return exact.float()


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


# The CPU form.


@operation("photometric")
def photometric_op(
    images: Tensor, factors: Tensor, choices: Tensor, threshold: int, dtype: torch.dtype,
    mean: list[float], std: list[float],
) -> Tensor:  # fmt: skip
    changed = images.clone(memory_format=torch.contiguous_format)
    values = torch.empty(images.shape, dtype=torch.float32, device="cpu") if dtype != torch.uint8 else None
    if images.numel():
        pixels, written = changed.numpy(), None if values is None else values.numpy()
        numbers, taps = fp32_numbers(factors.cpu()).numpy(), blur_weights(factors.cpu()[:, SIGMA]).numpy()
        coins = choices.cpu().contiguous().numpy()
        scale, shift = (np.array(channel, np.float32) for channel in affine(tuple(mean), tuple(std)))

        def work(block: int, start: int, stop: int) -> None:
            for i in range(start, stop):
                _change(pixels[i], numbers[i], coins[i], taps[i], threshold)
                if written is not None:
                    _normalise(pixels[i], scale, shift, written[i])

        share_out([(start, min(start + 4, len(images))) for start in range(0, len(images), 4)], work)
    return changed if values is None else values.to(dtype)


@compiled()
def _byte(x):
    low = x if x > float32(0) else float32(0)
    return uint8(low if low < float32(255) else float32(255))


@compiled()
def _luma(red, green, blue):
    return int32(
        (float32(red) * float32(0.2989) + float32(green) * float32(0.587)) + float32(blue) * float32(0.114)
    )  # fmt: skip


@compiled()
def _ramp(place):
    place = place - float32(6) if place >= float32(6) else place
    back = float32(4) - place
    low = place if place < back else back
    low = low if low > float32(0) else float32(0)
    return low if low < float32(1) else float32(1)


@compiled(error_model="numpy")
def _turn(red, green, blue, turn):
    for i in range(red.size):
        r, g, b = float32(red[i]), float32(green[i]), float32(blue[i])
        high = r if r > g else g
        high = high if high > b else b
        low = r if r < g else g
        low = low if low < b else b
        spread = high - low
        part = float32(1) / (spread if spread > float32(0) else float32(1))
        hue = (b - r) * part + float32(2) if high == g else (r - g) * part + float32(4)
        hue = (g - b) * part if high == r else hue
        hue = (hue + float32(6) if hue < float32(0) else hue) + turn
        hue = hue - float32(6) if hue >= float32(6) else hue
        red[i] = _byte((high - spread * _ramp(hue + float32(5))) * float32(SCALE))
        green[i] = _byte((high - spread * _ramp(hue + float32(3))) * float32(SCALE))
        blue[i] = _byte((high - spread * _ramp(hue + float32(1))) * float32(SCALE))


@compiled()
def _fade(red, green, blue, which, weight, rest):
    """Brightness, contrast or saturation."""
    if which == SATURATION:
        for i in range(red.size):
            other = float32(_luma(red[i], green[i], blue[i])) * rest
            red[i] = _byte(float32(red[i]) * weight + other)
            green[i] = _byte(float32(green[i]) * weight + other)
            blue[i] = _byte(float32(blue[i]) * weight + other)
        return
    other = float32(0)
    if which == CONTRAST:
        total = int64(0)
        for i in range(red.size):
            total += _luma(red[i], green[i], blue[i])
        other = float32(total / red.size) * rest
    for channel in (red, green, blue):
        for i in range(channel.size):
            channel[i] = _byte(float32(channel[i]) * weight + other)


@compiled()
def _mirror(place, size):
    place = place % max(2 * size - 2, 1)
    return place if place < size else 2 * size - 2 - place


@compiled("contract")
def _add_pair(total, one, other, weight):
    """Whole numbers below 2^24 throughout: exact in fp32."""
    for x in range(total.size):
        total[x] += (one[x] + other[x]) * weight


@compiled("contract")
def _blur(plane, taps):
    height, width = plane.shape
    reach = 0
    for k in range(1, RADIUS + 1):
        reach = k if taps[k] else reach
    total, strip = np.empty(width, np.float32), np.empty(width + 2 * RADIUS, np.float32)
    between = np.empty((height, width), np.float32)
    for y in range(height):
        for x in range(width):
            strip[RADIUS + x] = plane[y, x]
            total[x] = float32(plane[y, x]) * float32(taps[0])
        for k in range(1, reach + 1):
            strip[RADIUS - k] = plane[y, _mirror(-k, width)]
            strip[RADIUS + width - 1 + k] = plane[y, _mirror(width - 1 + k, width)]
        for k in range(1, reach + 1):
            left, right = strip[RADIUS - k : RADIUS - k + width], strip[RADIUS + k : RADIUS + k + width]
            _add_pair(total, left, right, float32(taps[k]))
        for x in range(width):
            between[y, x] = int32(total[x] * float32(1 / ONE) + float32(0.5))
    for y in range(height):
        for x in range(width):
            total[x] = between[y, x] * float32(taps[0])
        for k in range(1, reach + 1):
            _add_pair(total, between[_mirror(y - k, height)], between[_mirror(y + k, height)], float32(taps[k]))
        for x in range(width):
            plane[y, x] = uint8(int32(total[x] * float32(1 / ONE) + float32(0.5)))


@compiled()
def _change(image, numbers, choices, taps, threshold):
    flat = image.reshape(3, -1)
    red, green, blue = flat[0], flat[1], flat[2]
    if choices[JITTER]:
        for turn in range(4):
            which = choices[turn]
            if which == HUE:
                _turn(red, green, blue, numbers[HUE])
            else:
                _fade(red, green, blue, which, numbers[which], numbers[4 + which])
    if choices[GRAY]:
        for i in range(red.size):
            red[i] = uint8(_luma(red[i], green[i], blue[i]))
        green[:] = red
        blue[:] = red
    if choices[BLURRED]:
        for channel in range(3):
            _blur(image[channel], taps)
    if choices[SOLARISED]:
        every, bound = image.reshape(-1), uint8(threshold)
        for i in range(every.size):
            every[i] = ~every[i] if every[i] >= bound else every[i]


@compiled("contract", "nsz")
def _normalise(image, scale, shift, values):
    for channel in range(3):
        source, target = image[channel].reshape(-1), values[channel].reshape(-1)
        by, plus = scale[channel], shift[channel]
        for i in range(source.size):
            target[i] = float32(source[i]) * by + plus


@photometric_op.register_fake
def _(images, factors, choices, threshold, dtype, mean, std):
    return torch.empty(images.shape, dtype=dtype, device=images.device)
