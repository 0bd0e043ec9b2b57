"""Crop and resize with Pillow's antialiased bilinear filter, to the bit: interleaved RGB in, three planes out.

The weights, their rounding to 22 bits of fraction, the bytes between the two passes and the order of the passes are
Pillow's (its version 13; earlier ones always go across first). SimMIM, I-JEPA and lightly's BYOL crop so. The bicubic
filter of `resize.py` has 16-bit weights, which are faster and up to two steps of 255 away from Pillow's.
"""

import numpy as np

from fastpmae_loaders.jit.compiled import helper, kernel
from fastpmae_loaders.jit.memory import bytes_at, load_byte, load_int
from fastpmae_loaders.pixels.resize import vertical_goes_first

BITS = 22
HALF = 1 << (BITS - 1)


@kernel(error_model="numpy")
def fill_weights(source, target, offset, count, first, taps, weights):
    """Weights of `count` output pixels, from number `offset` on, of a resize from `source` to `target` pixels.

    Output i is the sum of `taps[i]` input pixels from `first[i]` on, weighed by `weights[i * most]` and so on, int32 of
    22 bits of fraction. Returns `most`, which `most_taps` bounds.
    """
    scale = source / target
    stretch = max(scale, 1.0)
    inverse = 1.0 / stretch
    most = 2 * np.int64(np.ceil(stretch)) + 1
    for i in range(count):
        center = (offset + i + 0.5) * scale
        begin = max(np.int64(center - stretch + 0.5), 0)
        end = min(np.int64(center + stretch + 0.5), source)
        total = 0.0
        for k in range(end - begin):
            total += max(1.0 - abs((begin + k - center + 0.5) * inverse), 0.0)
        for k in range(end - begin):
            weight = max(1.0 - abs((begin + k - center + 0.5) * inverse), 0.0) / total
            weights[i * most + k] = np.int32(0.5 + weight * (1 << BITS))
        first[i] = begin
        taps[i] = end - begin
    return most


def most_taps(source: int, target: int) -> int:
    """Weights that `fill_weights` needs for an output pixel at most."""
    return 2 * int(np.ceil(max(source / target, 1.0))) + 1


@helper
def _across(source, stride, rows, columns, most, backwards, out, scratch):
    """Rows of interleaved pixels, `stride` bytes apart from the address `source` on, to uint8 [3, rows, columns]."""
    first, taps, weights = scratch.first_x, scratch.taps_x, np.int64(scratch.weights_across.ctypes.data)
    for y in range(rows):
        row = source + y * stride
        for x in range(columns):
            red = green = blue = np.int64(HALF)
            at, weight = row + 3 * np.int64(first[x]), weights + 4 * most * x
            for _ in range(taps[x]):
                share = load_int(weight)
                red += load_byte(at) * share
                green += load_byte(at + 1) * share
                blue += load_byte(at + 2) * share
                at += 3
                weight += 4
            place = columns - 1 - x if backwards else x
            out[0, y, place] = red >> BITS
            out[1, y, place] = green >> BITS
            out[2, y, place] = blue >> BITS


@helper
def _down(source, stride, rows, width, most, out, scratch):
    """Weighted sums of rows of `width` bytes, `stride` apart from the address `source` on: to uint8 [rows, width]."""
    first, taps, weights, sums = scratch.first_y, scratch.taps_y, scratch.weights_down, scratch.sums
    for y in range(rows):
        sums[:width] = HALF
        for k in range(taps[y]):
            row = bytes_at(source + (first[y] + k) * stride, width)
            weight = weights[y * most + k]
            for x in range(width):
                sums[x] += row[x] * weight
        for x in range(width):
            out[y, x] = sums[x] >> BITS


@kernel
def resize_bilinear(pixels, height, width, box, full_height, full_width, down, across, flip, out, scratch):
    """Resize the crop `box` of an image to full_height x full_width and keep a window of it: arguments of `resize`."""
    top, left, box_height, box_width = np.int64(box[0]), np.int64(box[1]), np.int64(box[2]), np.int64(box[3])
    rows, columns = out.shape[1], out.shape[2]
    most_x = fill_weights(
        box_width, full_width, across, columns, scratch.first_x, scratch.taps_x, scratch.weights_across
    )
    most_y = fill_weights(box_height, full_height, down, rows, scratch.first_y, scratch.taps_y, scratch.weights_down)
    source = pixels + 3 * (top * width + left)
    if vertical_goes_first(box_height, box_width, full_height, full_width):
        between = scratch.between[: rows * 3 * box_width].reshape(rows, 3 * box_width)
        _down(source, 3 * width, rows, 3 * box_width, most_y, between, scratch)
        _across(np.int64(between.ctypes.data), 3 * box_width, rows, columns, most_x, flip, out, scratch)
        return
    begin = np.int64(scratch.first_y[0])
    count = np.int64(scratch.first_y[rows - 1] + scratch.taps_y[rows - 1]) - begin
    between = scratch.between[: 3 * count * columns].reshape(3, count, columns)
    _across(source + begin * 3 * width, 3 * width, count, columns, most_x, flip, between, scratch)
    for y in range(rows):
        scratch.first_y[y] -= begin
    for channel in range(3):
        plane = np.int64(between.ctypes.data) + channel * count * columns
        _down(plane, columns, rows, columns, most_y, out[channel], scratch)
