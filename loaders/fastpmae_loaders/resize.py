"""Crop and resize: Pillow's antialiased bicubic in 14-bit fixed point, interleaved RGB in, three planes out.

What lies between the two passes is rounded and clamped to bytes, and the order of the passes is Pillow's
(since its version 13 the vertical pass goes first where the height shrinks by far more pixels than the
width): at hard black and white edges, where the filter overshoots, another order gives other pictures.
A flip costs nothing: the table of the columns is written backwards.
"""

import numpy as np

from . import vectors as v
from .compiled import helper, kernel
from .vectors import WEIGHT_BITS

ONE = 1 << WEIGHT_BITS
SLACK = 64
"""Bytes that may be read past the end of what a row needs."""


@helper
def bicubic(x):
    """The cubic convolution kernel with a = -0.5 (Keys), Pillow's BICUBIC."""
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@helper
def fill_table(source, target, offset, count, backwards, first, weights):
    """Weights of `count` output pixels, from number `offset` on, of a resize from `source` to `target` pixels.

    `first[i]` becomes the first input pixel of output i, `weights[i]` int16 its weights (they sum to 2^14
    exactly, so flat areas stay flat). Returns how many weights are used, a multiple of four; `weights` must
    have at least that many columns (see `table_width`).
    """
    scale = source / target
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    inverse = 1.0 / stretch
    widest = 0
    for i in range(count):
        center = (offset + i + 0.5) * scale
        low = max(np.int64(center - support + 0.5), 0)
        high = min(np.int64(center + support + 0.5), source)
        widest = max(widest, high - low)
    widest = (widest + 3) // 4 * 4
    for i in range(count):
        row = count - 1 - i if backwards else i
        center = (offset + i + 0.5) * scale
        low = max(np.int64(center - support + 0.5), 0)
        high = min(np.int64(center + support + 0.5), source)
        first[row] = low
        total = 0.0
        for k in range(high - low):
            total += bicubic((low + k - center + 0.5) * inverse)
        left = ONE
        largest = 0
        for k in range(widest):
            weight = 0
            if k < high - low:
                weight = np.int64(np.floor(bicubic((low + k - center + 0.5) * inverse) / total * ONE + 0.5))
            weights[row, k] = weight
            left -= weight
            if weight > weights[row, largest]:
                largest = k
        weights[row, largest] += left
    return widest


def table_width(source: int, target: int) -> int:
    """Columns that `fill_table` needs for its weights at most."""
    return (int(np.ceil(2 * max(source / target, 1.0))) * 2 + 1 + 3) // 4 * 4


@helper
def _expand(weights, count, taps, table):
    """Repeat each four weights as `four_pixels` lays its pixels out."""
    for i in range(count):
        for quad in range(taps // 4):
            for pair in range(2):
                for lane in range(4):
                    at = quad * 16 + pair * 8 + lane * 2
                    table[i, at] = weights[i, quad * 4 + pair * 2]
                    table[i, at + 1] = weights[i, quad * 4 + pair * 2 + 1]


@helper
def _horizontal(rows, first, table, table_stride, quads, count, out, out_stride):
    """Four rows of interleaved pixels, at the four addresses `rows`, to `count` pixels each at `out`."""
    row0, row1, row2, row3 = rows
    for x in range(count):
        start = 3 * np.int64(first[x])
        weights = table + x * table_stride
        sum0 = v.rounding_half()
        sum1 = v.rounding_half()
        sum2 = v.rounding_half()
        sum3 = v.rounding_half()
        for quad in range(quads):
            at = start + 12 * quad
            w = v.load_shorts(weights + 32 * quad)
            sum0 = v.add_products(sum0, v.four_pixels(v.load_bytes(row0 + at)), w)
            sum1 = v.add_products(sum1, v.four_pixels(v.load_bytes(row1 + at)), w)
            sum2 = v.add_products(sum2, v.four_pixels(v.load_bytes(row2 + at)), w)
            sum3 = v.add_products(sum3, v.four_pixels(v.load_bytes(row3 + at)), w)
        at = out + 3 * x
        v.store_pixel(at, sum0)
        v.store_pixel(at + out_stride, sum1)
        v.store_pixel(at + 2 * out_stride, sum2)
        v.store_pixel(at + 3 * out_stride, sum3)


@helper
def _vertical(source, stride, first, weights, weights_stride, pairs, count, width, out, plane):
    """Weighted sums of rows of `width` interleaved pixels (at least 16) to `count` rows of three planes."""
    for y in range(count):
        top = source + np.int64(first[y]) * stride
        row_weights = weights + y * weights_stride
        x = 0
        while x < width:
            # the last sixteen pixels overlap the ones before them rather than run past the row
            x = min(x, width - 16)
            at = top + 3 * x
            sum0 = v.rounding()
            sum1 = v.rounding()
            sum2 = v.rounding()
            sum3 = v.rounding()
            sum4 = v.rounding()
            sum5 = v.rounding()
            for pair in range(pairs):
                w = v.load_pair(row_weights + 4 * pair)
                upper = at + 2 * pair * stride
                lower = upper + stride
                a = v.load_bytes(upper)
                b = v.load_bytes(lower)
                sum0 = v.add_products(sum0, v.interleave_low(a, b), w)
                sum1 = v.add_products(sum1, v.interleave_high(a, b), w)
                a = v.load_bytes(upper + 16)
                b = v.load_bytes(lower + 16)
                sum2 = v.add_products(sum2, v.interleave_low(a, b), w)
                sum3 = v.add_products(sum3, v.interleave_high(a, b), w)
                a = v.load_bytes(upper + 32)
                b = v.load_bytes(lower + 32)
                sum4 = v.add_products(sum4, v.interleave_low(a, b), w)
                sum5 = v.add_products(sum5, v.interleave_high(a, b), w)
            v.store_planes(out + y * width + x, plane, v.pack(sum0, sum1), v.pack(sum2, sum3), v.pack(sum4, sum5))
            x += 16


@helper
def _vertical_rows(source, stride, first, weights, weights_stride, taps, last, count, width, out, out_stride):
    """Weighted sums of rows of `width` bytes (at least 16), none below row `last`, to `count` rows."""
    for y in range(count):
        top = np.int64(first[y])
        pairs = (min(taps, last + 1 - top) + 1) // 2
        row_weights = weights + y * weights_stride
        x = 0
        while x < width:
            x = min(x, width - 16)
            sum0 = v.rounding()
            sum1 = v.rounding()
            for pair in range(pairs):
                upper = top + 2 * pair
                w = v.load_pair(row_weights + 4 * pair)
                a = v.load_bytes(source + upper * stride + x)
                # where the last pair is half a pair its second weight is 0
                b = v.load_bytes(source + min(upper + 1, last) * stride + x)
                sum0 = v.add_products(sum0, v.interleave_low(a, b), w)
                sum1 = v.add_products(sum1, v.interleave_high(a, b), w)
            v.store_bytes(out + y * out_stride + x, v.pack(sum0, sum1))
            x += 16


@helper
def _vertical_slowly(source, stride, first, weights, taps, last, count, width, out, out_stride):
    """The same for rows of fewer than 16 bytes, one number at a time; source and out are arrays' addresses."""
    for y in range(count):
        for x in range(width):
            total = np.int64(ONE // 2)
            for k in range(min(taps, last + 1 - np.int64(first[y]))):
                total += v.load_byte(source + (first[y] + k) * stride + x) * np.int64(weights[y, k])
            v.store_byte(out + y * out_stride + x, min(max(total >> WEIGHT_BITS, 0), 255))


@helper
def _split(source, stride, count, width, out):
    """Rows of interleaved pixels to three planes."""
    for y in range(count):
        if width >= 16:
            x = 0
            while x < width:
                x = min(x, width - 16)
                at = source + y * stride + 3 * x
                v.store_planes(
                    out.ctypes.data + y * width + x,
                    np.int64(count * width),
                    v.load_bytes(at),
                    v.load_bytes(at + 16),
                    v.load_bytes(at + 32),
                )
                x += 16
        else:
            for x in range(width):
                for channel in range(3):
                    out[channel, y, x] = v.load_byte(source + y * stride + 3 * x + channel)


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
    taps_x = fill_table(box_width, full_width, across, columns, flip, first_x, scratch.weights_x)
    taps_y = fill_table(box_height, full_height, down, rows, False, first_y, weights_y)
    _expand(scratch.weights_x, columns, taps_x, scratch.table)
    inner = scratch.rows.ctypes.data
    mixed = scratch.mixed.ctypes.data
    mixed_stride = np.int64(scratch.stride)

    if vertical_goes_first(box_height, box_width, full_height, full_width):
        source = pixels + 3 * (top * width + left)
        inner_stride = 3 * (box_width + taps_x) + SLACK
        vertical = (source, 3 * width, first_y, weights_y, taps_y, box_height - 1, rows, 3 * box_width)
        _vertical_any(vertical, inner, inner_stride)
        # the rows lie in scratch, with room behind each
        end = inner + rows * inner_stride + SLACK
        horizontal = (inner, inner_stride, rows, 3 * (box_width + taps_x) + 16, 3 * box_width, end)
        _horizontal_rows(horizontal, first_x, scratch.table, taps_x, columns, mixed, mixed_stride, scratch.edge)
        _split(mixed, mixed_stride, rows, columns, out)
        return

    begin = np.int64(first_y[0])
    end_row = min(np.int64(first_y[rows - 1]) + taps_y, box_height)
    source = pixels + 3 * ((top + begin) * width + left)
    rightmost = max(np.int64(first_x[0]), np.int64(first_x[columns - 1]))
    # how far the last load of a row may reach: past the crop where the window is padded with zero weights
    reach = 3 * (rightmost + taps_x) + 16
    last_byte = pixels + 3 * height * width
    horizontal = (source, 3 * width, end_row - begin, reach, 3 * box_width, last_byte)
    _horizontal_rows(horizontal, first_x, scratch.table, taps_x, columns, inner, mixed_stride, scratch.edge)
    for y in range(rows):
        first_y[y] -= begin
    if columns >= 16:
        _vertical(
            inner, mixed_stride, first_y, weights_y.ctypes.data, np.int64(weights_y.strides[0]),
            taps_y // 2, rows, columns, out.ctypes.data, np.int64(rows * columns),
        )  # fmt: skip
    else:
        vertical = (inner, mixed_stride, first_y, weights_y, taps_y, end_row - begin - 1, rows, 3 * columns)
        _vertical_any(vertical, mixed, mixed_stride)
        _split(mixed, mixed_stride, rows, columns, out)


@helper
def _vertical_any(job, out, out_stride):
    source, stride, first, weights, taps, last, count, width = job
    if width >= 16:
        _vertical_rows(
            source, stride, first, weights.ctypes.data, np.int64(weights.strides[0]),
            taps, last, count, width, out, out_stride,
        )  # fmt: skip
    else:
        _vertical_slowly(source, stride, first, weights, taps, last, count, width, out, out_stride)


@helper
def _horizontal_rows(job, first, table, taps, columns, out, out_stride, edge):
    """All rows of a crop, four at a time; `edge` takes a copy of a row whose loads would pass `last_byte`."""
    source, stride, count, reach, used, last_byte = job
    table_address = table.ctypes.data
    table_stride = np.int64(table.strides[0])
    row = 0
    while row < count:
        # the last four overlap the ones before them; fewer than four rows repeat the last one
        row = max(min(row, count - 4), 0)
        a = _safe_row(source + row * stride, reach, used, last_byte, edge[0])
        b = _safe_row(source + min(row + 1, count - 1) * stride, reach, used, last_byte, edge[1])
        c = _safe_row(source + min(row + 2, count - 1) * stride, reach, used, last_byte, edge[2])
        d = _safe_row(source + min(row + 3, count - 1) * stride, reach, used, last_byte, edge[3])
        at = out + row * out_stride
        _horizontal((a, b, c, d), first, table_address, table_stride, taps // 4, columns, at, out_stride)
        row += 4


@helper
def _safe_row(address, reach, used, last_byte, edge):
    if address + reach <= last_byte:
        return address
    v.copy_bytes(edge.ctypes.data, address, used)
    return np.int64(edge.ctypes.data)
