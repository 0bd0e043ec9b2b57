"""Colours of a batch on the CPU: all of an image's changes on one thread, in place."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy import float32, int32, int64, uint8
from torch import Tensor

from fastpmae_kernels.cpu.compiled import compiled
from fastpmae_kernels.cpu.rows import share_out
from fastpmae_kernels.photometric_numbers import (
    BLURRED,
    CONTRAST,
    GRAY,
    HUE,
    JITTER,
    ONE,
    RADIUS,
    SATURATION,
    SCALE,
    SIGMA,
    SOLARISED,
    blur_weights,
    fp32_numbers,
)


def photometric(
    images: Tensor, factors: Tensor, choices: Tensor, threshold: int, dtype: torch.dtype,
    channel_factors: Sequence[float], channel_summands: Sequence[float],
) -> Tensor:  # fmt: skip
    """The images with their colours changed, as bytes, or each channel times its factor and with its summand."""
    changed = images.clone(memory_format=torch.contiguous_format)
    values = torch.empty(images.shape, dtype=torch.float32, device="cpu") if dtype != torch.uint8 else None
    if images.numel():
        pixels, written = changed.numpy(), None if values is None else values.numpy()
        numbers, taps = fp32_numbers(factors.cpu()).numpy(), blur_weights(factors.cpu()[:, SIGMA]).numpy()
        coins = choices.cpu().contiguous().numpy()
        scale, shift = (np.array(channel, np.float32) for channel in (channel_factors, channel_summands))

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
