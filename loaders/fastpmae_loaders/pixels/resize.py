"""Crop and resize: Pillow's antialiased bicubic in 14-bit fixed point, interleaved RGB in, three planes out.

What lies between the two passes is rounded and clamped to bytes, and the order of the passes is Pillow's
(since its version 13 the vertical pass goes first where the height shrinks by far more pixels than the
width): at hard black and white edges, where the filter overshoots, another order gives other pictures.
A flip costs nothing: the table of the columns is written backwards.
"""

import numpy as np

from fastpmae_loaders.jit import memory
from fastpmae_loaders.jit import vectors as v
from fastpmae_loaders.jit.compiled import helper, kernel
from fastpmae_loaders.jit.vectors import WEIGHT_BITS
from fastpmae_loaders.pixels.separable import SLACK, weigh

ONE = 1 << WEIGHT_BITS


@helper
def _bicubic(x):
    """The cubic convolution kernel with a = -0.5 (Keys), Pillow's BICUBIC."""
    x = abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    value = near if x < 1.0 else far
    return value if x < 2.0 else 0.0


@helper
def _fill_terms(source, target, offset, count, work):
    """Where each output pixel's weights begin, the weights before they are rounded, and their sum.

    They begin at an even input pixel, and there is an even number of them. Each loop runs over the output pixels,
    which are what LLVM puts side by side; to that end places are floats as well. Returns the number of pairs.
    """
    center, begin, low, high, total = work.center, work.begin, work.low, work.high, work.total
    scale = source / target
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    inverse = 1.0 / stretch
    for i in range(count):
        center[i] = (offset + i + 0.5) * scale
    for i in range(count):
        low[i] = max(np.floor(center[i] - support + 0.5), 0.0)
        high[i] = min(np.floor(center[i] + support + 0.5), np.float64(source))
        begin[i] = 2.0 * np.floor(0.5 * low[i])
        total[i] = 0.0
    widest = 0.0
    for i in range(count):
        widest = max(widest, high[i] - begin[i])
    pairs = (np.int64(widest) + 1) // 2
    for k in range(2 * pairs):
        row = work.terms[k]
        for i in range(count):
            place = begin[i] + np.float64(k)
            value = _bicubic((place - center[i] + 0.5) * inverse)
            value = value if low[i] <= place else 0.0
            value = value if place < high[i] else 0.0
            row[i] = value
            total[i] += value
    return pairs


@kernel(error_model="numpy")
def fill_table(source, target, offset, count, backwards, first, weights, work):
    """Weights of `count` output pixels, from number `offset` on, of a resize from `source` to `target` pixels.

    `first[i]` becomes the first input pixel of output i, an even number, and `weights` int16 [count x 2 x pairs] the
    weights, output by output (they sum to 2^14 exactly, so flat areas stay flat). Returns the number of pairs;
    `weights` must have room for `table_width` of them. `work` is a Scratch.
    """
    begin, total, terms, whole = work.begin, work.total, work.terms, work.whole
    pairs = _fill_terms(source, target, offset, count, work)
    left, best, largest = work.left, work.best, work.largest
    for i in range(count):
        left[i] = ONE
        best[i] = np.int32(-ONE)
        largest[i] = 0
    for k in range(2 * pairs):
        row, numbers = terms[k], whole[k]
        for i in range(count):
            weight = np.int32(np.floor(row[i] / total[i] * ONE + 0.5))
            numbers[i] = weight
            left[i] -= weight
            larger = weight > best[i]
            best[i] = weight if larger else best[i]
            largest[i] = np.int32(k) if larger else largest[i]
    for i in range(count):
        row = count - 1 - i if backwards else i
        first[row] = np.int32(begin[i])
        line = weights[2 * pairs * row : 2 * pairs * (row + 1)]
        for k in range(2 * pairs):
            line[k] = whole[k, i]
        line[largest[i]] += left[i]
    return pairs


def table_width(source: int, target: int) -> int:
    """Columns that `fill_table` needs for its weights at most."""
    return (int(np.ceil(2 * max(source / target, 1.0))) * 2 + 2 + 3) // 4 * 4


@helper
def _vertical_bytes(source, stride, first, weights, pairs, last, count, width, out, out_stride):
    """Weighted sums of rows of `width` bytes (at least 32), none below row `last`, to `count` rows."""
    for y in range(count):
        top = np.int64(first[y])
        used = min(pairs, (last + 2 - top) // 2)
        row_weights = weights + 4 * pairs * y
        x = 0
        while x < width:
            # the last bytes overlap the ones before them rather than run past the row
            x = min(x, width - 32)
            upper = source + top * stride + x
            sum0 = sum1 = sum2 = sum3 = v.rounding()
            for pair in range(used):
                w = v.load_pair(row_weights + 4 * pair)
                # where the last pair is half a pair its second weight is 0
                lower = upper + (stride if top + 2 * pair < last else 0)
                low, high = v.interleave_rows(upper, lower)
                sum0 = v.add_products(sum0, v.widen_low(low), w)
                sum1 = v.add_products(sum1, v.widen_high(low), w)
                sum2 = v.add_products(sum2, v.widen_low(high), w)
                sum3 = v.add_products(sum3, v.widen_high(high), w)
                upper += 2 * stride
            v.store_halves(out + y * out_stride + x, sum0, sum1, sum2, sum3)
            x += 32


@helper
def _vertical_slowly(source, stride, first, weights, pairs, last, count, width, out, out_stride):
    """The same for rows of fewer than 32 bytes, one number at a time; source and out are arrays' addresses."""
    for y in range(count):
        for x in range(width):
            total = np.int64(ONE // 2)
            for k in range(min(2 * pairs, last + 1 - np.int64(first[y]))):
                total += memory.load_byte(source + (first[y] + k) * stride + x) * np.int64(weights[2 * pairs * y + k])
            memory.store_byte(out + y * out_stride + x, min(max(total >> WEIGHT_BITS, 0), 255))


@helper
def vertical_goes_first(height, width, full_height, full_width):
    """Pillow's choice (version 13) between the two orders."""
    return height - full_height > max(0, 2 * (width - full_width))


@kernel
def resize(pixels, height, width, box, full_height, full_width, down, across, flip, out, scratch):
    """Resize the crop `box` of an image to full_height x full_width and keep a window of it.

    Args:
        pixels: address of uint8 [height, width, 3].
        box: (top, left, height, width) of the crop in source pixels; nothing outside it is looked at.
        down, across: the window's first row and column within the resized crop; it is as large as `out`.
        flip: mirror the window left to right.
        out: uint8 [3, rows, columns], contiguous.
        scratch: a Scratch made for images of this size and views of this side.
    """
    top, left, box_height, box_width = np.int64(box[0]), np.int64(box[1]), np.int64(box[2]), np.int64(box[3])
    rows, columns = out.shape[1], out.shape[2]
    first_x, first_y, weights_y = scratch.first_x, scratch.first_y, scratch.weights_y
    pairs_x = fill_table(box_width, full_width, across, columns, np.int64(flip), first_x, scratch.weights_x, scratch)
    pairs_y = fill_table(box_height, full_height, down, rows, np.int64(0), first_y, weights_y, scratch)
    source = pixels + 3 * (top * width + left)
    weights_address = np.int64(weights_y.ctypes.data)

    if vertical_goes_first(box_height, box_width, full_height, full_width):
        inner = np.int64(scratch.rows.ctypes.data)
        inner_stride = 3 * box_width + SLACK
        if 3 * box_width >= 32:
            _vertical_bytes(
                source, 3 * width, first_y, weights_address, pairs_y, box_height - 1, rows, 3 * box_width,
                inner, inner_stride,
            )  # fmt: skip
        else:
            _vertical_slowly(
                source, 3 * width, first_y, weights_y, pairs_y, box_height - 1, rows, 3 * box_width, inner, inner_stride
            )
        # the rows lie in scratch, with room behind each, and are left as they are
        source, stride, begin, end = inner, inner_stride, np.int64(0), rows
        last_byte = inner + rows * inner_stride + SLACK
        pairs_y = 1
        for y in range(rows):
            first_y[y] = y - y % 2
            weights_y[2 * y + y % 2] = ONE
            weights_y[2 * y + 1 - y % 2] = 0
    else:
        stride = 3 * width
        begin = np.int64(first_y[0])
        end = min(np.int64(first_y[rows - 1]) + 2 * pairs_y, box_height)
        last_byte = pixels + 3 * height * width
        for y in range(rows):
            first_y[y] -= begin

    tables = (first_x, scratch.weights_x, pairs_x, first_y, weights_y, pairs_y)
    weigh(source, stride, np.int64(0), last_byte, begin, end, box_width, tables, out, scratch)
