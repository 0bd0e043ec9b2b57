"""The two passes of a separable filter: eight rows at a time across, and down as soon as a window of rows is there.

Eight rows are turned into columns of 16-bit pairs of neighbouring pixels, so that one instruction weighs eight rows.
What the pass across makes are pairs of neighbouring rows, which the pass down weighs likewise. Between the two lie
bytes, rounded and clamped. Rows are kept between them only as long as they are needed, which is in the cache.
"""

import numpy as np

from fastpmae_loaders.jit import memory
from fastpmae_loaders.jit import vectors as v
from fastpmae_loaders.jit.compiled import helper, kernel

SLACK = 64
"""Bytes that may be read or written past the end of what a row needs."""
ROOM = 20
"""Pairs of rows that are kept between the passes beside those of one window."""
GROUP = 32
"""Output pixels that the vertical pass makes at a time."""


@helper
def _turn(rows, pairs, columns):
    """Eight rows of interleaved pixels, at the eight addresses `rows`, to columns of pairs of pixels: 96 bytes each.

    Two pairs, 12 bytes of a row, are read at a time as 16 bytes.
    """
    a, b, c, d, e, f, g, h = rows
    for step in range((pairs + 1) // 2):
        at = 12 * step
        ae = v.two_rows(a + at, e + at)
        bf = v.two_rows(b + at, f + at)
        cg = v.two_rows(c + at, g + at)
        dh = v.two_rows(d + at, h + at)
        target = columns + 192 * step
        v.store_columns(target, v.first_pixels(ae), v.first_pixels(bf), v.first_pixels(cg), v.first_pixels(dh))
        v.store_columns(target + 96, v.next_pixels(ae), v.next_pixels(bf), v.next_pixels(cg), v.next_pixels(dh))


@helper
def _turn_plane(rows, pairs, columns):
    """Eight rows of one plane to columns of pairs, 96 bytes apart: sixteen bytes of a row at a time."""
    a, b, c, d, e, f, g, h = rows
    for step in range((pairs + 7) // 8):
        at = 16 * step
        ae = v.two_rows(a + at, e + at)
        bf = v.two_rows(b + at, f + at)
        cg = v.two_rows(c + at, g + at)
        dh = v.two_rows(d + at, h + at)
        target = columns + 768 * step
        v.store_plane_columns(target, v.widen_low(ae), v.widen_low(bf), v.widen_low(cg), v.widen_low(dh))
        v.store_plane_columns(target + 384, v.widen_high(ae), v.widen_high(bf), v.widen_high(cg), v.widen_high(dh))


@helper
def _horizontal(columns, first, weights, pairs, count, out, out_stride, plane):
    """Eight rows, turned, to four rows of pairs in three planes; `count` is a multiple of four."""
    for x in range(0, count, 4):
        at0 = columns + 48 * memory.load_int(first + 4 * x)
        at1 = columns + 48 * memory.load_int(first + 4 * x + 4)
        at2 = columns + 48 * memory.load_int(first + 4 * x + 8)
        at3 = columns + 48 * memory.load_int(first + 4 * x + 12)
        weights0 = weights + 4 * pairs * x
        weights1 = weights0 + 4 * pairs
        weights2 = weights1 + 4 * pairs
        weights3 = weights2 + 4 * pairs
        red0 = red1 = red2 = red3 = v.rounding()
        green0 = green1 = green2 = green3 = v.rounding()
        blue0 = blue1 = blue2 = blue3 = v.rounding()
        for pair in range(pairs):
            here = 4 * pair
            there = 96 * pair
            w = v.load_pair(weights0 + here)
            red0 = v.add_products(red0, v.load_shorts(at0 + there), w)
            green0 = v.add_products(green0, v.load_shorts(at0 + there + 32), w)
            blue0 = v.add_products(blue0, v.load_shorts(at0 + there + 64), w)
            w = v.load_pair(weights1 + here)
            red1 = v.add_products(red1, v.load_shorts(at1 + there), w)
            green1 = v.add_products(green1, v.load_shorts(at1 + there + 32), w)
            blue1 = v.add_products(blue1, v.load_shorts(at1 + there + 64), w)
            w = v.load_pair(weights2 + here)
            red2 = v.add_products(red2, v.load_shorts(at2 + there), w)
            green2 = v.add_products(green2, v.load_shorts(at2 + there + 32), w)
            blue2 = v.add_products(blue2, v.load_shorts(at2 + there + 64), w)
            w = v.load_pair(weights3 + here)
            red3 = v.add_products(red3, v.load_shorts(at3 + there), w)
            green3 = v.add_products(green3, v.load_shorts(at3 + there + 32), w)
            blue3 = v.add_products(blue3, v.load_shorts(at3 + there + 64), w)
        target = out + 4 * x
        v.store_row_pairs(target, out_stride, red0, red1, red2, red3)
        v.store_row_pairs(target + plane, out_stride, green0, green1, green2, green3)
        v.store_row_pairs(target + 2 * plane, out_stride, blue0, blue1, blue2, blue3)


@helper
def _vertical(source, stride, plane, first, weights, pairs, start, stop, count, width, out, spare):
    """Weighted sums of rows of pairs to rows `start` to `stop` of `count` of `width` bytes in three planes.

    Where fewer than 32 pixels of a row are left, they are made in `spare` and copied.
    """
    for y in range(start, stop):
        top = source + memory.load_int(first + 4 * y) // 2 * stride
        row_weights = weights + 4 * pairs * y
        target = out + y * width
        for x in range(0, width, GROUP):
            at = top + 4 * x
            red0 = red1 = red2 = red3 = v.rounding()
            green0 = green1 = green2 = green3 = v.rounding()
            blue0 = blue1 = blue2 = blue3 = v.rounding()
            for pair in range(pairs):
                w = v.load_pair(row_weights + 4 * pair)
                here = at + pair * stride
                red0 = v.add_products(red0, v.load_shorts(here), w)
                red1 = v.add_products(red1, v.load_shorts(here + 32), w)
                red2 = v.add_products(red2, v.load_shorts(here + 64), w)
                red3 = v.add_products(red3, v.load_shorts(here + 96), w)
                here += plane
                green0 = v.add_products(green0, v.load_shorts(here), w)
                green1 = v.add_products(green1, v.load_shorts(here + 32), w)
                green2 = v.add_products(green2, v.load_shorts(here + 64), w)
                green3 = v.add_products(green3, v.load_shorts(here + 96), w)
                here += plane
                blue0 = v.add_products(blue0, v.load_shorts(here), w)
                blue1 = v.add_products(blue1, v.load_shorts(here + 32), w)
                blue2 = v.add_products(blue2, v.load_shorts(here + 64), w)
                blue3 = v.add_products(blue3, v.load_shorts(here + 96), w)
            if x + GROUP <= width:
                v.store_clamped(target + x, red0, red1, red2, red3)
                v.store_clamped(target + x + count * width, green0, green1, green2, green3)
                v.store_clamped(target + x + 2 * count * width, blue0, blue1, blue2, blue3)
            else:
                v.store_clamped(spare, red0, red1, red2, red3)
                v.store_clamped(spare + GROUP, green0, green1, green2, green3)
                v.store_clamped(spare + 2 * GROUP, blue0, blue1, blue2, blue3)
                for channel in range(3):
                    memory.copy_bytes(target + x + channel * count * width, spare + channel * GROUP, width - x)


@kernel
def weigh(source, stride, plane, last_byte, begin, end, width, tables, out, scratch):
    """Both passes, across and then down.

    Rows `begin` to `end` (`begin` is even), `stride` bytes apart, of `width` pixels each: interleaved ones at the
    address `source` where `plane` is 0, otherwise three planes `plane` bytes apart. Nothing is read from the address
    `last_byte` on. `tables` are first, weights and pairs as `fill_table` leaves them, of the columns and of the rows;
    the latter count from `begin`. `out` is uint8 [3, rows, columns]. It may be the source where every output row's
    window holds the input row of the same number: that has been read when the output is written.
    """
    first_x, weights_x, pairs_x, first_y, weights_y, pairs_y = tables
    rows, columns = out.shape[1], out.shape[2]
    # the columns are made four at a time
    for x in range(columns, (columns + 3) // 4 * 4):
        first_x[x] = 0
    used = np.int64(0)
    for x in range(columns):
        used = max(used, np.int64(first_x[x]) // 2 + pairs_x)
    mixed, turned = np.int64(scratch.mixed.ctypes.data), np.int64(scratch.turned.ctypes.data)
    across = 4 * ((columns + GROUP - 1) // GROUP * GROUP)
    down = 3 * across
    # how far the loads of a row reach: past its end where weights are zero
    reach = 12 * ((used + 1) // 2) + 4 if plane == 0 else 16 * ((used + 7) // 8)
    length = 3 * width if plane == 0 else width
    # pairs of rows lie in `mixed` from number `bottom` on; there is room for one window and `ROOM` more
    bottom = np.int64(0)
    done = 0
    for row in range(begin, end, 8):
        place = (row - begin) // 2
        if place + 4 - bottom > pairs_y + ROOM:
            needed = np.int64(first_y[done]) // 2
            memory.move_bytes(mixed, mixed + (needed - bottom) * down, (place - needed) * down)
            bottom = needed
        final = end - 1 - row
        at = source + row * stride
        if plane == 0:
            _turn(_eight_rows(at, stride, final, reach, length, last_byte, scratch.edge), used, turned)
        else:
            for channel in range(3):
                eight = _eight_rows(at + channel * plane, stride, final, reach, length, last_byte, scratch.edge)
                _turn_plane(eight, used, turned + 32 * channel)
        _horizontal(
            turned, np.int64(first_x.ctypes.data), np.int64(weights_x.ctypes.data), pairs_x, (columns + 3) // 4 * 4,
            mixed + (place - bottom) * down, down, across,
        )  # fmt: skip
        ready = done
        while ready < rows and (first_y[ready] // 2 + pairs_y <= place + 4 or row + 8 >= end):
            ready += 1
        _vertical(
            mixed - bottom * down, down, across, np.int64(first_y.ctypes.data), np.int64(weights_y.ctypes.data),
            pairs_y, done, ready, rows, columns, np.int64(out.ctypes.data), np.int64(scratch.spare.ctypes.data),
        )  # fmt: skip
        done = ready


@helper
def _eight_rows(address, stride, final, reach, length, last_byte, edge):
    """Addresses of eight rows, the one numbered `final` in place of those after it."""
    return (
        _safe_row(address, reach, length, last_byte, edge[0]),
        _safe_row(address + min(1, final) * stride, reach, length, last_byte, edge[1]),
        _safe_row(address + min(2, final) * stride, reach, length, last_byte, edge[2]),
        _safe_row(address + min(3, final) * stride, reach, length, last_byte, edge[3]),
        _safe_row(address + min(4, final) * stride, reach, length, last_byte, edge[4]),
        _safe_row(address + min(5, final) * stride, reach, length, last_byte, edge[5]),
        _safe_row(address + min(6, final) * stride, reach, length, last_byte, edge[6]),
        _safe_row(address + min(7, final) * stride, reach, length, last_byte, edge[7]),
    )


@helper
def _safe_row(address, reach, length, last_byte, edge):
    if address + reach <= last_byte:
        return address
    memory.copy_bytes(edge.ctypes.data, address, length)
    return np.int64(edge.ctypes.data)
