"""A JPEG's coefficients in a code that is faster to decode than Huffman's: a byte for each of nearly all of them.

The picture is the JPEG's, to the bit: what is stored are its quantised coefficients, its tables of quantisation and its
sampling. Rows of blocks have an index, and blocks that nobody wants are passed over without being looked at.

The format, little-endian: MAGIC with the version; a digest (BLAKE2b, 8 bytes) of all that follows it; height and width
of 16 bits; components, across, down (see `Header`) and a zero, a byte each; 64 bytes of quantisation for each
component, in zigzag order; the index, 32 bits for each row of blocks and one for the end: where its blocks begin behind
the index; and the rows, in the order of a row of MCUs: luma's one or two, Cb's, Cr's.

A block is a byte, whose lower five bits count its groups of GROUP codes and whose upper three bits its exceptions; the
DC value, 16 bits; the codes; the exceptions, three bytes each: a number in zigzag order, and a value of 16 bits. A code
is an advance to the next coefficient, and its value. FILL, which advances by nothing, fills up the first group; SKIP
passes over sixteen coefficients. An exception replaces what a code says. A block of too many exceptions has RAW groups
and, in place of codes, all its values of 16 bits.
"""

import hashlib
from typing import Final

import numpy as np

from fastpmae_loaders.jit.compiled import helper, kernel
from fastpmae_loaders.native.decoder import (
    NARROWEST,
    begin_scan,
    choose_blocks,
    decode_row,
    ends_soundly,
    last_row,
    lay_out,
    make_workspace,
    read_jpeg,
    show_row,
)
from fastpmae_loaders.native.headers import BLOCK, Header
from fastpmae_loaders.native.huffman import PLACES

MAGIC: Final = b"FPC\x01"
DIGEST: Final = 8
FIXED: Final = len(MAGIC) + DIGEST + 8
"""Bytes before the tables of quantisation."""
GROUP: Final = 4
RAW: Final = 31
FILL: Final = 0
SKIP: Final = 1
"""The code that passes over sixteen coefficients."""
_MOST_EXCEPTIONS: Final = 7
LARGEST_BLOCK: Final = 3 + 2 * (BLOCK - 1)
LARGEST_VALUE: Final = 1023
"""Of a coefficient in a baseline JPEG; a DC value's is larger by 1."""
# how large a value may be after so many zeros to have a code: what covers most coefficients of photographs (98.4 %)
_LIMITS: Final = (84, 14, 6, 3, 2, 2, 2, *(14 * (1,)))


def _made_codes() -> tuple[np.ndarray, np.ndarray]:
    """(code of each run and value + 128, 0 where there is none; 256 times the value and the advance of each code)."""
    codes, meanings = np.zeros((len(_LIMITS), 256), np.uint8), np.zeros(256, np.int32)
    meanings[FILL], meanings[SKIP] = 0, 16
    code = 2
    for run, limit in enumerate(_LIMITS):
        for value in (*range(-limit, 0), *range(1, limit + 1)):
            codes[run, value + 128] = code
            meanings[code] = 256 * value + run + 1
            code += 1
    assert code == 256
    return codes, meanings


CODES, MEANINGS = _made_codes()
LIMITS = np.array(_LIMITS, np.int64)
UNFOLDED = np.zeros(128, np.uint8)
UNFOLDED[:BLOCK] = PLACES
"""Places as PLACES has them, and for numbers that no block has the first one's, where the DC value is put last."""


@helper(_nrt=False)
def _put_short(out, at, value):
    out[at] = value & 255
    out[at + 1] = value >> 8 & 255


@helper(_nrt=False)
def _short(data, at):
    return np.int16(np.int64(data[at]) | np.int64(data[at + 1]) << 8)


@helper(_nrt=False)
def _word(data, at):
    return (
        np.int64(data[at]) | np.int64(data[at + 1]) << 8 | np.int64(data[at + 2]) << 16 | np.int64(data[at + 3]) << 24
    )


@helper(_nrt=False)
def _put_block(coefficients, place, last, out, at, line):
    """Write a block, whose last coefficient is number `last`, at `at`; where it ends. `line`: room for its codes.

    Below 0 for values that no baseline JPEG may have, and that to_jpeg could not write.
    """
    codes, exceptions, before = 0, 0, 0
    # so that no two of a picture differ by more than a JPEG's codes can say
    if not -LARGEST_VALUE - 1 <= np.int64(coefficients[place]) <= LARGEST_VALUE:
        return -1
    for k in range(1, last + 1):
        value = np.int64(coefficients[place + np.int64(UNFOLDED[k])])
        if value == 0:
            continue
        if abs(value) > LARGEST_VALUE:
            return -1
        run = k - before - 1
        while run >= len(LIMITS):
            line[codes] = SKIP
            codes, before, run = codes + 1, before + 16, run - 16
        # an exception has a code, too, from whose place the next one counts
        coded = min(max(value, -LIMITS[run]), LIMITS[run])
        line[codes] = CODES[run, coded + 128]
        codes, before = codes + 1, k
        exceptions += coded != value
    _put_short(out, at + 1, np.int64(coefficients[place]))
    if exceptions > _MOST_EXCEPTIONS:
        out[at] = RAW
        for k in range(1, BLOCK):
            _put_short(out, at + 1 + 2 * k, np.int64(coefficients[place + np.int64(UNFOLDED[k])]))
        return at + LARGEST_BLOCK
    groups = (codes + GROUP - 1) // GROUP
    out[at] = groups | exceptions << 5
    at += 3
    for _ in range(groups * GROUP - codes):
        out[at] = FILL
        at += 1
    for code in range(codes):
        out[at + code] = line[code]
    at += codes
    before = 0
    for k in range(1, last + 1):
        value = np.int64(coefficients[place + np.int64(UNFOLDED[k])])
        if value == 0:
            continue
        run = k - before - 1
        while run >= len(LIMITS):
            run -= 16
        if abs(value) > LIMITS[run]:
            out[at] = k
            _put_short(out, at + 1, value)
            at += 3
        before = k
    return at


@kernel(_nrt=False)
def pack(data, height, width, boxes, out, line, work):
    """Write the code of the JPEG in `data` to `out`, all but the digest: its length; 0 where it is not taken here.

    `boxes` is one, the whole picture. `line` uint8 [128] is room; for `out` see `_room`.
    """
    header = read_jpeg(data, height, width, work)
    if header.height == 0:
        return 0
    count, mcus, rows = lay_out(header, work)
    for place in range(len(MAGIC)):
        out[place] = MAGIC[place]
    at = len(MAGIC) + DIGEST
    _put_short(out, at, height)
    _put_short(out, at + 2, width)
    out[at + 4], out[at + 5], out[at + 6], out[at + 7] = header.components, header.across, header.down, 0
    at += 8
    for part in range(header.components):
        for k in range(BLOCK):
            out[at + k] = work.tables.quantisation[work.tables.chosen[part, 0], k]
        at += BLOCK
    index, lines = at, header.down + 2 if header.components == 3 else 1
    start = at = index + 4 * (lines * rows + 1)
    position = begin_scan(data, header, mcus * rows, work)
    for row in range(rows):
        choose_blocks(header, row, boxes, mcus, work)
        for part in range(header.components):
            work.windows[part, 0], work.windows[part, 1] = 0, mcus * (header.across if part == 0 else 1)
        position = decode_row(data, header, count, mcus, position, work)
        if position.length < 0:
            return 0
        for part in range(header.components):
            first, pairs, high = work.parts[part, 0], work.parts[part, 1], work.parts[part, 2]
            for line_of_blocks in range(high):
                index = _put_index(out, index, at - start)
                for column in range(mcus * header.across if part == 0 else mcus):
                    pair = first // (2 * BLOCK) + line_of_blocks * pairs + (column >> 1)
                    last = np.int64(work.ends[2 * pair + (column & 1)])
                    place = pair * 2 * BLOCK + (column & 1) * 8
                    at = _put_block(work.coefficients, place, last, out, at, line)
                    if at < 0:
                        return 0
    _put_index(out, index, at - start)
    return at if ends_soundly(data, position, work) else 0


@helper(_nrt=False)
def _put_index(out, at, value):
    _put_short(out, at, value & 0xFFFF)
    _put_short(out, at + 2, value >> 16)
    return at + 4


@kernel(_nrt=False)
def read_packed(data, height, width, tables):
    """The Header of a code of a picture of height x width pixels; of height 0 where it makes no sense."""
    nothing = Header(0, 0, 0, 0, 0, 0, 0)
    if len(data) < FIXED:
        return nothing
    for place in range(len(MAGIC)):
        if data[place] != MAGIC[place]:
            return nothing
    at = len(MAGIC) + DIGEST
    components, across = int(np.int64(data[at + 4])), int(np.int64(data[at + 5]))
    down = int(np.int64(data[at + 6]))
    sound = np.int64(data[at]) | np.int64(data[at + 1]) << 8 == height
    sound = sound and np.int64(data[at + 2]) | np.int64(data[at + 3]) << 8 == width
    sound = sound and height > 0 and width > 0 and components in (1, 3)
    sound = sound and 1 <= across <= (2 if components == 3 else 1) and 1 <= down <= (2 if components == 3 else 1)
    if not sound or (across == 2 and width < NARROWEST) or len(data) < FIXED + components * BLOCK:
        return nothing
    for part in range(components):
        tables.chosen[part, 0] = part
        for k in range(BLOCK):
            tables.quantisation[part, k] = data[FIXED + part * BLOCK + k]
    return Header(height, width, components, across, down, 0, FIXED + components * BLOCK)


@helper(_nrt=False)
def _unpack_row(data, at, stop, part, pair, work):
    """A row of blocks, in bytes `at` to `stop`, to coefficients from a pair of blocks on: whether it is sound."""
    coefficients, ends = work.coefficients, work.ends
    begin, end = work.windows[part, 0], work.windows[part, 1]
    for column in range(end):
        if at + 3 > stop:
            return False
        head = np.int64(data[at])
        groups, exceptions = head & 31, head >> 5
        size = 3 + GROUP * groups + 3 * exceptions if groups != RAW else LARGEST_BLOCK
        if at + size > stop:
            return False
        if column >= begin:
            here = pair + (column >> 1)
            place = np.uint64(here * 2 * BLOCK + (column & 1) * 8)
            k, code = np.uint64(0), np.uint64(at + 3)
            if groups == RAW:
                for number in range(1, BLOCK):
                    coefficients[place + np.uint64(UNFOLDED[number])] = _short(data, at + 1 + 2 * number)
                k = np.uint64(BLOCK - 1)
            else:
                for _ in range(groups):
                    for part_of_group in range(GROUP):
                        meaning = MEANINGS[data[code + np.uint64(part_of_group)]]
                        k += np.uint64(meaning & 255)
                        coefficients[place + np.uint64(UNFOLDED[k & np.uint64(127)])] = np.int16(meaning >> 8)
                    code += np.uint64(GROUP)
                if k >= np.uint64(BLOCK):
                    return False
                for _ in range(exceptions):
                    number = np.uint64(data[code])
                    if number >= np.uint64(BLOCK):
                        return False
                    coefficients[place + np.uint64(UNFOLDED[number])] = _short(data, np.int64(code) + 1)
                    code += np.uint64(3)
                    k = max(k, number)
            coefficients[place] = _short(data, at + 1)
            ends[2 * here + (column & 1)] = k
        at += size
    return True


@helper(_nrt=False)
def unpack_next(data, header, row, rows, wanted, work):
    """A row of MCUs to coefficients, where they are wanted: whether it is sound."""
    lines = header.down + 2 if header.components == 3 else 1
    index, start = header.scan + 4 * lines * row, header.scan + 4 * (lines * rows + 1)
    if start > len(data):
        return False
    for part in range(header.components):
        pair, pairs, high = work.parts[part, 0] // (2 * BLOCK), work.parts[part, 1], work.parts[part, 2]
        for line in range(high):
            at, stop = start + _word(data, index), start + _word(data, index + 4)
            index += 4
            if stop > len(data) or (wanted and not _unpack_row(data, at, stop, part, pair + line * pairs, work)):
                return False
    return True


@kernel(_nrt=False)
def unpack(data, height, width, boxes, target, work):
    """Decode a code as `decode` does a JPEG: whether it was sound as far as it was looked at."""
    header = read_packed(data, height, width, work.tables)
    if header.height == 0:
        return False
    _, mcus, rows = lay_out(header, work)
    last, shown = last_row(boxes), 0
    for row in range(rows):
        if row * 8 * header.down >= last:
            break
        wanted = choose_blocks(header, row, boxes, mcus, work)
        if not unpack_next(data, header, row, rows, wanted, work):
            return False
        shown = show_row(header, row, row + 1 == rows, wanted, shown, boxes, target, work)
    return True


def _room(height: int, width: int) -> int:
    """Bytes that a picture's code takes at most."""
    rows, columns = (height + 15) // 16 * 2, (width + 15) // 16 * 2
    return FIXED + 3 * BLOCK + 4 * (3 * rows + 1) + 3 * rows * columns * LARGEST_BLOCK


def _whole(height: int, width: int) -> np.ndarray:
    return np.array([[0, 0, height, width]], np.int32)


def pack_jpeg(payload: bytes, height: int, width: int) -> bytes | None:
    """The code of an ordinary JPEG of height x width pixels; None where it is not one, or not sound."""
    data = np.frombuffer(payload, np.uint8).copy()
    out, work = np.empty(_room(height, width), np.uint8), make_workspace(height, width, len(data))
    size = pack(data, height, width, _whole(height, width), out, np.zeros(128, np.uint8), work)
    if not size:
        return None
    begin = len(MAGIC) + DIGEST
    out[len(MAGIC) : begin] = np.frombuffer(_digest(out[begin:size].tobytes()), np.uint8)
    return out[:size].tobytes()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST).digest()


def is_whole(payload: bytes) -> bool:
    """Whether a code is the one that was written, by its digest."""
    begin = len(MAGIC) + DIGEST
    return payload[: len(MAGIC)] == MAGIC and payload[len(MAGIC) : begin] == _digest(payload[begin:])


def unpack_pixels(
    payload: bytes | np.ndarray, height: int, width: int, boxes: np.ndarray | None = None
) -> np.ndarray | None:
    """A code's picture as uint8 [height, width, 3]; None where it is not sound. `boxes`: see `decode_jpeg`."""
    data = np.array(np.frombuffer(payload, np.uint8))
    work = make_workspace(height, width, 0)
    pixels = np.empty((height, width, 3), np.uint8)
    wanted = _whole(height, width) if boxes is None else boxes
    return pixels if unpack(data, height, width, wanted, pixels.ctypes.data, work) else None
