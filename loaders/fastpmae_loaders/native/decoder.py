"""A whole JPEG to RGB pixels, or those parts of it that are wanted: entropy decoding, inverse DCT, colours, row by row.

What is decoded here comes out to the bit as Pillow decodes it. What is not ordinary, or not sound in every respect, is
not decoded here at all: Pillow then has the word.
"""

from typing import Final, NamedTuple

import numpy as np

from fastpmae_loaders.jit.compiled import helper, kernel
from fastpmae_loaders.jit.memory import copy_bytes
from fastpmae_loaders.native import colours, idct
from fastpmae_loaders.native.colours import PIXELS
from fastpmae_loaders.native.data import STEP, copy_segment
from fastpmae_loaders.native.headers import BLOCK, EOI, Header, Tables, make_tables, read_header
from fastpmae_loaders.native.huffman import ENTRIES, PLACES, SLACK, Codes, build_codes, decode_block, make_codes

MARGIN: Final = 32
"""Bytes before and behind each row of a plane."""
PAIR: Final = 2 * BLOCK
"""Coefficients of two blocks side by side."""
NARROWEST: Final = 5
"""Pixels of a row from which on libjpeg's upsampling is what it is; narrower pictures are left to Pillow."""
_RESTART: Final = 0xD0
_SPARSE: Final = 9
"""The last coefficient in zigzag order up to which all lie within the first four rows and columns."""
_ROWS: Final = 4
"""Rows of blocks in a row of MCUs, over all components, at most."""
_AHEAD: Final = np.uint64(8)
"""Bytes behind a segment's end that a window may hold."""
_NOTHING: Final = np.uint64(0)


class Workspace(NamedTuple):
    """Memory of one thread for decoding.

    data: a segment's bytes. coefficients int16: a row of MCUs, component by component and row by row of blocks, in
    pairs of blocks; the first pair is for blocks that nobody wants. ends uint8: each block's last coefficient.
    quantisation uint16 [3, 128]: the components' tables, as pairs of blocks lie. planes uint8: the components.
    spare: pixels that do not fit. before int64 [3]: each component's last DC value. windows int64 [3, 2]: the blocks
    across that are wanted. blocks int64 [6, 6]: an MCU's blocks (see `lay_out`). parts int64 [3, 5]: the components
    (likewise).
    """

    data: np.ndarray
    coefficients: np.ndarray
    ends: np.ndarray
    quantisation: np.ndarray
    planes: np.ndarray
    spare: np.ndarray
    before: np.ndarray
    windows: np.ndarray
    blocks: np.ndarray
    parts: np.ndarray
    tables: Tables
    codes: Codes
    places: np.ndarray


class Position(NamedTuple):
    """Where a scan's decoding stands: the next byte of the segment, the window's bits and how many of them are good;
    the segment's length, the marker behind it, and where in the file it ends; MCUs left before the next restart, and
    that restart's number."""

    at: np.uint64
    bits: np.uint64
    count: np.uint64
    length: int
    marker: int
    following: int
    left: int
    number: int


def make_workspace(height: int, width: int, stored: int, planes: int | None = None) -> Workspace:
    """Memory for JPEGs up to `height`, `width` and `stored` bytes, whose planes take `planes` bytes at most.

    The operating system hands out a page only when it is touched.
    """
    pairs = _ROWS * ((width + 15) // 16 + 1) + 1
    return Workspace(
        data=np.empty(stored + SLACK + STEP, np.uint8),
        coefficients=np.empty(pairs * PAIR, np.int16),
        ends=np.empty(2 * pairs, np.uint8),
        quantisation=np.empty((3, PAIR), np.uint16),
        planes=np.empty(planes_size(height, width) if planes is None else planes, np.uint8),
        spare=np.empty(3 * PIXELS, np.uint8),
        before=np.zeros(3, np.int64),
        windows=np.zeros((3, 2), np.int64),
        blocks=np.zeros((6, 6), np.int64),
        parts=np.zeros((3, 5), np.int64),
        tables=make_tables(),
        codes=make_codes(),
        places=PLACES.copy(),
    )


def planes_size(height, width):
    """Bytes that the planes of an image take at most; of each where the sides are arrays."""
    return 3 * ((height + 15) // 16 * 16) * ((width + 31) // 32 * 32 + 2 * MARGIN)


@helper(_nrt=False)
def lay_out(header, work):
    """Where everything of a JPEG lies: (blocks of an MCU, MCUs across, MCUs down).

    Of each block: its component, the place of its row of blocks, in pairs; how many blocks across the component has in
    an MCU, and which of these it is; the places of its tables' first entries, DC and AC. Of each component: its first
    block row's place, the pairs of such a row, the rows in an MCU row, the plane's place and its row's length.
    """
    across, down = header.across, header.down
    mcus = (header.width + 8 * across - 1) // (8 * across)
    rows = (header.height + 8 * down - 1) // (8 * down)
    count, place, plane = 0, PAIR, 0
    for part in range(header.components):
        wide, high = (across, down) if part == 0 else (1, 1)
        pairs = (mcus * wide + 1) // 2
        stride = 16 * pairs + 2 * MARGIN
        work.parts[part, 0] = place
        work.parts[part, 1] = pairs
        work.parts[part, 2] = high
        work.parts[part, 3] = plane
        work.parts[part, 4] = stride
        plane += stride * 8 * high * rows
        for row in range(high):
            for column in range(wide):
                block = work.blocks[count]
                block[0], block[1], block[2], block[3] = part, place // PAIR + row * pairs, wide, column
                block[4] = work.tables.chosen[part, 1] * ENTRIES
                block[5] = work.tables.chosen[part, 2] * ENTRIES
                count += 1
        place += high * pairs * PAIR
        table = work.tables.quantisation[work.tables.chosen[part, 0]]
        for k in range(BLOCK):
            work.quantisation[part, work.places[k]] = table[k]
            work.quantisation[part, work.places[k] + 8] = table[k]
    return count, mcus, rows


@helper(_nrt=False)
def decode_row(data, header, count, mcus, position, work):
    """A row of MCUs to coefficients; a Position of length -1 where the data are not sound."""
    at, bits, good, length, marker, following, left, number = position
    before, codes, blocks = work.before, work.codes, work.blocks
    wrong = Position(at, bits, good, -1, marker, following, left, number)
    for x in range(mcus):
        if left == 0:
            if marker != _RESTART + number or np.int64(at) * 8 - np.int64(good) > 8 * length:
                return wrong
            length, marker, following = copy_segment(data, following, work.data)
            at = bits = good = _NOTHING
            before[:] = 0
            left, number = header.interval, (number + 1) & 7
        left -= 1
        for block in range(count):
            part = blocks[block, 0]
            column = x * blocks[block, 2] + blocks[block, 3]
            place = column & 1
            if work.windows[part, 0] <= column < work.windows[part, 1]:
                place += 2 * (blocks[block, 1] + (column >> 1))
            at, bits, good, value, last = decode_block(
                work.data, at, bits, good, np.uint64(blocks[block, 4]), np.uint64(blocks[block, 5]), before[part],
                work.coefficients,
                np.uint64((place >> 1) * PAIR + (place & 1) * 8), codes, work.places,
            )  # fmt: skip
            if last < 0 or at > np.uint64(length) + _AHEAD or abs(value) > 32767:
                return wrong
            before[part] = value
            work.ends[place] = last
    return Position(at, bits, good, length, marker, following, left, number)


@helper(_nrt=False)
def ends_soundly(data, position, work):
    """Whether a scan that was decoded up to here had the bytes for it, and ends with the picture's end."""
    if np.int64(position.at) * 8 - np.int64(position.count) > 8 * position.length:
        return False
    marker, following = position.marker, position.following
    while _RESTART <= marker <= _RESTART + 7:
        _, marker, following = copy_segment(data, following, work.data)
    return marker == EOI


@helper(_nrt=False)
def _transform(header, row, work):
    """A row of MCUs from coefficients to samples, as far as they are wanted."""
    coefficients, planes = np.int64(work.coefficients.ctypes.data), np.int64(work.planes.ctypes.data)
    for part in range(header.components):
        first, pairs, high, plane, stride = work.parts[part]
        quantisation = np.int64(work.quantisation[part].ctypes.data)
        begin, end = work.windows[part, 0], work.windows[part, 1]
        for line in range(high):
            start = first // PAIR + line * pairs
            out = planes + plane + (row * high + line) * 8 * stride + MARGIN
            for pair in range(begin >> 1, (end + 1) >> 1):
                place = start + pair
                if max(work.ends[2 * place], work.ends[2 * place + 1]) <= _SPARSE:
                    idct.two_sparse_blocks(coefficients + 2 * PAIR * place, quantisation, out + 16 * pair, stride)
                else:
                    idct.two_blocks(coefficients + 2 * PAIR * place, quantisation, out + 16 * pair, stride)
        if part > 0 and header.across == 2:
            # libjpeg has the outermost samples stand beside themselves
            last = (header.width + 1) // 2 - 1
            for line in range(8 * row * high, 8 * (row + 1) * high):
                at = plane + line * stride + MARGIN
                work.planes[at - 1] = work.planes[at]
                work.planes[at + last + 1] = work.planes[at + last]


@helper(_nrt=False)
def _chroma_rows(header, y, work):
    """Addresses of the rows of Cb and of Cr that pixel row y is made from: the nearer one and the other."""
    planes = np.int64(work.planes.ctypes.data) + MARGIN
    near = far = y
    if header.down == 2:
        near = y >> 1
        far = min(max(near + 2 * (y & 1) - 1, 0), (header.height + 1) // 2 - 1)
    blue, red, stride = planes + work.parts[1, 3], planes + work.parts[2, 3], work.parts[1, 4]
    return blue + near * stride, blue + far * stride, red + near * stride, red + far * stride


@helper(_nrt=False)
def _colour(header, y, begin, end, target, work):
    """Pixels `begin` to `end` (or a few more) of row y."""
    luma = np.int64(work.planes.ctypes.data) + MARGIN + y * work.parts[0, 4]
    kind = 0 if header.components == 1 else header.across + 2 * (header.down - 1)
    near_blue = far_blue = near_red = far_red = luma
    if kind:
        near_blue, far_blue, near_red, far_red = _chroma_rows(header, y, work)
    width, spare = header.width, np.int64(work.spare.ctypes.data)
    for x in range(begin // PIXELS * PIXELS, end, PIXELS):
        # what is too much of a row is written over by the next one
        whole = y * width + x + PIXELS <= header.height * width
        out = target + 3 * (y * width + x) if whole else spare
        if kind == 0:
            colours.store_gray(out, luma + x)
        elif kind == 1:
            colours.store_pixels(out, luma + x, colours.chroma(near_blue + x, near_red + x))
        elif kind == 2:
            colours.store_pixels(out, luma + x, colours.chroma_across(near_blue + x // 2, near_red + x // 2))
        elif kind == 4:
            half = x // 2
            samples = colours.chroma_both_ways(near_blue + half, far_blue + half, near_red + half, far_red + half)
            colours.store_pixels(out, luma + x, samples)
        elif y & 1:
            samples = colours.chroma_down_lower(near_blue + x, far_blue + x, near_red + x, far_red + x)
            colours.store_pixels(out, luma + x, samples)
        else:
            samples = colours.chroma_down(near_blue + x, far_blue + x, near_red + x, far_red + x)
            colours.store_pixels(out, luma + x, samples)
        if not whole:
            copy_bytes(target + 3 * (y * width + x), spare, 3 * (width - x))


@helper(_nrt=False)
def _span(boxes, top, bottom):
    """The columns, begin and end, that any of the boxes which touch rows `top` to `bottom` covers; (0, 0) for none."""
    begin, end = 1 << 30, 0
    for box in range(boxes.shape[0]):
        if boxes[box, 0] < bottom and boxes[box, 0] + boxes[box, 2] > top:
            begin = min(begin, np.int64(boxes[box, 1]))
            end = max(end, np.int64(boxes[box, 1]) + np.int64(boxes[box, 3]))
    return (begin, end) if end else (0, 0)


@helper(_nrt=False)
def last_row(boxes):
    """The row of pixels from which on nothing is wanted, and nothing is needed for what is."""
    last = 0
    for box in range(boxes.shape[0]):
        last = max(last, np.int64(boxes[box, 0]) + np.int64(boxes[box, 2]))
    return last + 2


@helper(_nrt=False)
def choose_blocks(header, row, boxes, mcus, work):
    """Set the windows of a row of MCUs and clear its coefficients; False where none of it is wanted."""
    step = 8 * header.down
    begin, end = _span(boxes, row * step - 2, (row + 1) * step + 2)
    for part in range(header.components):
        across = mcus * header.across if part == 0 else mcus
        size = 8 if part == 0 else 8 * header.across
        work.windows[part, 0] = max(begin - 2, 0) // size
        work.windows[part, 1] = min((end + 2 + size - 1) // size, across) if end else 0
    if end:
        last = header.components - 1
        used = work.parts[last, 0] // PAIR + work.parts[last, 1] * work.parts[last, 2]
        work.coefficients[: used * PAIR] = 0
        work.ends[: 2 * used] = 0
    return end > 0


@helper(_nrt=False)
def show_row(header, row, is_last, wanted, shown, boxes, target, work):
    """Make a row of MCUs pixels where it is wanted; `shown` rows were made before, and so many are afterwards."""
    if wanted:
        _transform(header, row, work)
    # the last row of pixels may wait for the next row of chroma
    ready = header.height if is_last else (row + 1) * 8 * header.down - header.down + 1
    begin, end = _span(boxes, shown, ready)
    for y in range(shown, ready):
        _colour(header, y, begin, end, target, work)
    return ready


@helper(_nrt=False)
def begin_scan(data, header, mcus, work):
    """The Position at a scan's first byte."""
    length, marker, following = copy_segment(data, header.scan, work.data)
    work.before[:] = 0
    left = header.interval if header.interval else mcus
    return Position(_NOTHING, _NOTHING, _NOTHING, length, marker, following, left, 0)


@helper(_nrt=False)
def read_jpeg(data, height, width, work):
    """The Header of a JPEG (of height 0 where it is not taken), its tables made."""
    header = read_header(data, height, width, work.tables)
    sound = header.height > 0 and (header.across == 1 or width >= NARROWEST)
    for part in range(header.components):
        for kind in range(1, 3):
            which = work.tables.chosen[part, kind]
            sound = sound and build_codes(data, work.tables.codes[which], which, work.codes)
    return header if sound else Header(0, 0, 0, 0, 0, 0, 0)


@kernel(_nrt=False)
def decode(data, height, width, boxes, target, work):
    """Decode the JPEG in `data` uint8 [n] to uint8 [height, width, 3] at the address `target`: whether it was done.

    It is not where the JPEG is not an ordinary one, sound, and of height x width pixels; then `target` may hold parts.
    Only what the `boxes` int [m, 4] (top, left, height, width; within the picture) cover is sure to be there, and what
    no more than these need is left out. No byte is read outside `data`. `work` is a Workspace made for pictures of this
    size and data of this length.
    """
    header = read_jpeg(data, height, width, work)
    if header.height == 0:
        return False
    count, mcus, rows = lay_out(header, work)
    position = begin_scan(data, header, mcus * rows, work)
    last, shown = last_row(boxes), 0
    for row in range(rows):
        if row * 8 * header.down >= last:
            break
        wanted = choose_blocks(header, row, boxes, mcus, work)
        position = decode_row(data, header, count, mcus, position, work)
        if position.length < 0:
            return False
        shown = show_row(header, row, row + 1 == rows, wanted, shown, boxes, target, work)
    return ends_soundly(data, position, work)


def decode_jpeg(
    payload: bytes | np.ndarray, height: int, width: int, boxes: np.ndarray | None = None
) -> np.ndarray | None:
    """An ordinary JPEG of height x width pixels as uint8 [height, width, 3]; None for what is left to Pillow.

    Of pixels outside the `boxes` int [m, 4] (see `decode`), where there are any, nothing is promised.
    """
    data = np.frombuffer(payload, np.uint8) if isinstance(payload, bytes) else payload
    if boxes is None:
        boxes = np.array([[0, 0, height, width]], np.int32)
    pixels = np.empty((height, width, 3), np.uint8)
    work = make_workspace(height, width, len(data))
    # an array that may not be written to is another type to numba
    done = decode(np.require(data, requirements="W"), height, width, boxes, pixels.ctypes.data, work)
    return pixels if done else None


@kernel(_nrt=False)
def _spans_its_data(data, height, width, work):
    """Whether the codes of the JPEG in `data` are sound, and fill their data up to the picture's end."""
    header = read_jpeg(data, height, width, work)
    if header.height == 0:
        return False
    count, mcus, rows = lay_out(header, work)
    position = begin_scan(data, header, mcus * rows, work)
    work.windows[:] = 0
    for _ in range(rows):
        position = decode_row(data, header, count, mcus, position, work)
        if position.length < 0:
            return False
    left = 8 * position.length - (np.int64(position.at) * 8 - np.int64(position.count))
    return left < 8 and ends_soundly(data, position, work)


def is_sound(payload: bytes | np.ndarray, height: int, width: int) -> bool | None:
    """Whether a JPEG of the kind that is decoded here is sound to its end; Pillow passes over much damage in silence.

    None for every other kind, of which nothing is known here. No pixels are made.
    """
    data = np.require(np.frombuffer(payload, np.uint8), requirements="W")
    header = read_header(data, height, width, make_tables())
    if header.height == 0 or (header.across == 2 and width < NARROWEST):
        return None
    return bool(_spans_its_data(data, height, width, make_workspace(height, width, len(data))))
