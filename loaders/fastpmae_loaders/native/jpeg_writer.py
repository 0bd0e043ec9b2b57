"""From our code of coefficients back to a JPEG of the same coefficients, with the standard's own Huffman tables."""

import io
from functools import cache
from typing import Final

import numpy as np
from PIL import Image

from fastpmae_loaders.jit.compiled import helper, kernel
from fastpmae_loaders.native.coefficients import LARGEST_VALUE, read_packed, unpack_next
from fastpmae_loaders.native.decoder import Workspace, choose_blocks, lay_out, make_workspace
from fastpmae_loaders.native.headers import BLOCK, DHT, DQT, EOI, SOI, SOS

_MOST_BYTES: Final = 2 * 4 * BLOCK
"""A block takes at most, each of its codes of 16 bits with 11 more, every byte of them stuffed."""
_BLANK: Final = np.uint64(0)


@cache
def standard_tables() -> dict[int, bytes]:
    """The tables of annex K, as DHT segments define them, by their class and number: Pillow writes them."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", subsampling=0)
    data, at, found = file.getvalue(), 2, {}
    while data[at + 1] != SOS:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == DHT:
            found[data[at + 4]] = data[at + 5 : end]
        at = end
    return found


@cache
def _codes() -> np.ndarray:
    """uint64 [4, 256], DC and AC of luma and of chroma: of each symbol 256 times its code, and the code's length."""
    found = np.zeros((4, 256), np.uint64)
    for row, kind in enumerate((0x00, 0x10, 0x01, 0x11)):
        table, code, place = standard_tables()[kind], 0, 16
        for length in range(1, 17):
            for _ in range(table[length - 1]):
                found[row, table[place]] = code << 8 | length
                code, place = code + 1, place + 1
            code <<= 1
    return found


@helper(_nrt=False)
def _put(out, at, window, used, code, value, size):
    """A symbol's code and the bits of its value to the window; whole bytes of it go out."""
    length = code & np.uint64(255)
    bits = np.uint64(value if value >= 0 else value + (1 << size) - 1)
    window = (window << length | code >> np.uint64(8)) << np.uint64(size) | bits
    used += np.int64(length) + size
    while used >= 8:
        byte = window >> np.uint64(used - 8) & np.uint64(255)
        out[at] = byte
        at += 1
        if byte == np.uint64(255):
            out[at] = 0
            at += 1
        used -= 8
    return at, window & np.uint64((1 << used) - 1), used


@helper(_nrt=False)
def _size(value):
    """The bits of a value."""
    size, rest = 0, abs(value)
    while rest:
        size, rest = size + 1, rest >> 1
    return size


@kernel(_nrt=False)
def write_scan(data, height, width, boxes, out, codes, work):
    """Write the scan's bytes of a code's picture to `out`: how many; -1 where the code is not sound."""
    header = read_packed(data, height, width, work.tables)
    if header.height == 0:
        return -1
    count, mcus, rows = lay_out(header, work)
    at, window, used = 0, _BLANK, 0
    work.before[:] = 0
    for row in range(rows):
        choose_blocks(header, row, boxes, mcus, work)
        for part in range(header.components):
            work.windows[part, 0], work.windows[part, 1] = 0, mcus * (header.across if part == 0 else 1)
        if not unpack_next(data, header, row, rows, True, work):
            return -1
        for x in range(mcus):
            for block in range(count):
                part = work.blocks[block, 0]
                column = x * work.blocks[block, 2] + work.blocks[block, 3]
                pair = work.blocks[block, 1] + (column >> 1)
                place = pair * 2 * BLOCK + (column & 1) * 8
                tables = codes[0:2] if part == 0 else codes[2:4]
                value = np.int64(work.coefficients[place])
                size = _size(value - work.before[part])
                if size > 11 or not -LARGEST_VALUE - 1 <= value <= LARGEST_VALUE:
                    return -1
                at, window, used = _put(out, at, window, used, tables[0, size], value - work.before[part], size)
                work.before[part] = value
                last, run = np.int64(work.ends[2 * pair + (column & 1)]), 0
                for k in range(1, last + 1):
                    value = np.int64(work.coefficients[place + np.int64(work.places[k])])
                    if value == 0:
                        run += 1
                        continue
                    while run > 15:
                        at, window, used = _put(out, at, window, used, tables[1, 0xF0], 0, 0)
                        run -= 16
                    size = _size(value)
                    if size > 10:
                        return -1
                    at, window, used = _put(out, at, window, used, tables[1, run << 4 | size], value, size)
                    run = 0
                if run or last < BLOCK - 1:
                    at, window, used = _put(out, at, window, used, tables[1, 0], 0, 0)
    if used:
        # what is left of the last byte is filled up with ones
        at, window, used = _put(out, at, window, used, np.uint64(0), (1 << (8 - used)) - 1, 8 - used)
    return at


def to_jpeg(payload: bytes, height: int, width: int) -> bytes | None:
    """The JPEG of a code (see `coefficients`): the same coefficients, tables of quantisation and sampling.

    None where the code is not sound. What a JPEG has beside its picture (Exif, comments) is not in a code.
    """
    data = np.array(np.frombuffer(payload, np.uint8))
    work: Workspace = make_workspace(height, width, 0)
    blocks = (height + 15) // 16 * 2 * ((width + 15) // 16 * 2) * 3
    out = np.empty(blocks * _MOST_BYTES + 16, np.uint8)
    box = np.array([[0, 0, height, width]], np.int32)
    size = write_scan(data, height, width, box, out, _codes(), work)
    if size < 0:
        return None
    header = read_packed(data, height, width, work.tables)
    parts = range(header.components)
    jpeg = [bytes((0xFF, SOI)), _segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")]
    jpeg += [_segment(DQT, bytes([part]) + work.tables.quantisation[part].astype(np.uint8).tobytes()) for part in parts]
    factors = [header.across << 4 | header.down] + 2 * [0x11]
    components = b"".join(bytes((part + 1, factors[part], part)) for part in parts)
    frame = b"\x08" + height.to_bytes(2, "big") + width.to_bytes(2, "big") + bytes([len(parts)]) + components
    jpeg.append(_segment(0xC0, frame))
    jpeg += [_segment(DHT, bytes([kind]) + table) for kind, table in standard_tables().items()]
    chosen = b"".join(bytes((part + 1, 0x11 if part else 0)) for part in parts)
    jpeg += [_segment(SOS, bytes([len(parts)]) + chosen + b"\0\x3f\0"), out[:size].tobytes(), bytes((0xFF, EOI))]
    return b"".join(jpeg)


def _segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2, "big") + content
