"""What stands before a JPEG's only scan, read in compiled code: is it a JPEG that is decoded here, and how.

Everything that is not ordinary is left to Pillow: several scans, progressive or arithmetic coding, 12 bits, colours
that are not YCbCr, samplings that hardly anybody writes, and what makes no sense. No byte outside the array is read,
and what is kept of it has been checked against the tables it will index.

Source: ITU-T T.81, annex B; which colours a JPEG has is decided in libjpeg's order: JFIF, Adobe, the components' names.
"""

from typing import NamedTuple

import numpy as np

from fastpmae_loaders.jit.compiled import helper, kernel

TABLES = 4
"""Tables of each kind that a JPEG may define."""
BLOCK = 64
COUNTS = 16
"""Bytes of a Huffman table's definition before its symbols: how many codes there are of each length."""
LARGEST_SIDE = 65500

SOI, EOI, SOS, DQT, DHT, DRI = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xDD
_BASELINE, _EXTENDED = 0xC0, 0xC1
_APP0, _APP14, _COMMENT = 0xE0, 0xEE, 0xFE


class Header(NamedTuple):
    """The frame, and where its parts lie.

    `components` is 1 or 3; `across` and `down` say how many luma samples there are for each chroma sample. `interval`:
    MCUs between two restarts, 0 for none. `scan`: the first byte of the scan's data.
    """

    height: int
    width: int
    components: int
    across: int
    down: int
    interval: int
    scan: int


class Tables(NamedTuple):
    """What a header defines. quantisation uint16 [4, 64] in zigzag order; codes int64 [8], where the definition of each
    Huffman table lies in the file (DC 0-3, AC 4-7; 0 for none); chosen int64 [3, 3], which of them each component
    takes: quantisation, DC, AC (4-7)."""

    quantisation: np.ndarray
    codes: np.ndarray
    chosen: np.ndarray


def make_tables() -> Tables:
    """Room for one JPEG's tables."""
    return Tables(np.zeros((TABLES, BLOCK), np.uint16), np.zeros(2 * TABLES, np.int64), np.zeros((3, 3), np.int64))


@helper(_nrt=False)
def _word(data, at):
    return np.int64(data[at]) * 256 + np.int64(data[at + 1])


@helper(_nrt=False)
def _quantisation(data, at, end, tables):
    """A DQT segment's content: bits of the tables that it defines; -1 where it is not 8 bits wide or makes no sense."""
    found = 0
    while at < end:
        kind = np.int64(data[at])
        if kind >= TABLES or at + 1 + BLOCK > end:
            return -1
        for place in range(BLOCK):
            tables.quantisation[kind, place] = data[at + 1 + place]
        found |= 1 << kind
        at += 1 + BLOCK
    return found


@helper(_nrt=False)
def _huffman(data, at, end, tables):
    """A DHT segment's content: whether it makes sense."""
    while at < end:
        kind, rest = np.int64(data[at]) >> 4, np.int64(data[at]) & 15
        if kind > 1 or rest >= TABLES or at + 1 + COUNTS > end:
            return False
        codes = 0
        for length in range(COUNTS):
            codes += np.int64(data[at + 1 + length])
        if codes > 256 or at + 1 + COUNTS + codes > end:
            return False
        tables.codes[TABLES * kind + rest] = at + 1
        at += 1 + COUNTS + codes
    return True


@helper(_nrt=False)
def _sampling(data, frame, components):
    """(across, down) of a frame header's components; (0, 0) for what is not decoded here."""
    if components == 1:
        # the only component fills a scan of its own, one block after another, whatever it says
        factor = np.int64(data[frame + 7])
        return (1, 1) if 1 <= factor >> 4 <= 4 and 1 <= factor & 15 <= 4 else (0, 0)
    across, down = np.int64(data[frame + 7]) >> 4, np.int64(data[frame + 7]) & 15
    if across < 1 or across > 2 or down < 1 or down > 2 or data[frame + 10] != 0x11 or data[frame + 13] != 0x11:
        return 0, 0
    return across, down


@helper(_nrt=False)
def _starts_with(data, at, end, a, b, c, d, e):
    if at + 5 > end:
        return False
    return data[at] == a and data[at + 1] == b and data[at + 2] == c and data[at + 3] == d and data[at + 4] == e


@helper(_nrt=False)
def _ycbcr(data, frame, jfif, adobe):
    """Whether libjpeg takes three components for YCbCr."""
    if jfif:
        return True
    if adobe >= 0:
        return adobe == 1
    return not (data[frame + 6] == 0x52 and data[frame + 9] == 0x47 and data[frame + 12] == 0x42)


@helper(_nrt=False)
def _scan(data, at, frame, components, defined, tables):
    """A scan header's content: is it the only scan that a picture of these components has, with tables for all?"""
    if data[at] != components:
        return False
    for part in range(components):
        if data[at + 1 + 2 * part] != data[frame + 6 + 3 * part]:
            return False
        wanted = np.int64(data[at + 2 + 2 * part])
        direct, alternating = wanted >> 4, wanted & 15
        quantisation = np.int64(data[frame + 8 + 3 * part])
        if direct >= TABLES or alternating >= TABLES or quantisation >= TABLES or not defined >> quantisation & 1:
            return False
        if tables.codes[direct] == 0 or tables.codes[TABLES + alternating] == 0:
            return False
        tables.chosen[part, 0] = quantisation
        tables.chosen[part, 1] = direct
        tables.chosen[part, 2] = TABLES + alternating
    # libjpeg warns of others, and reads them as these
    end = at + 1 + 2 * components
    return data[end] == 0 and data[end + 1] == 63 and data[end + 2] == 0


@kernel(_nrt=False)
def read_header(data, height, width, tables):
    """The Header of the JPEG in `data` uint8 [n], of height x width pixels; one of height 0 for what is not taken here.

    `tables` are filled.
    """
    nothing = Header(0, 0, 0, 0, 0, 0, 0)
    stop = len(data)
    if stop < 4 or data[0] != 0xFF or data[1] != SOI:
        return nothing
    tables.codes[:] = 0
    at, frame, defined, interval, components, jfif, adobe = 2, 0, 0, 0, 0, False, -1
    across, down = 0, 0
    while at + 4 <= stop:
        code = np.int64(data[at + 1])
        if data[at] != 0xFF:
            return nothing
        end = at + 2 + _word(data, at + 2)
        at += 4
        if end < at or end > stop:
            return nothing
        if code == DQT:
            found = _quantisation(data, at, end, tables)
            if found < 0:
                return nothing
            defined |= found
        elif code == DHT:
            if not _huffman(data, at, end, tables):
                return nothing
        elif code == DRI:
            if end != at + 2:
                return nothing
            interval = _word(data, at)
        elif code in (_BASELINE, _EXTENDED):
            if frame or end < at + 6 or data[at] != 8 or _word(data, at + 1) != height or _word(data, at + 3) != width:
                return nothing
            components = int(np.int64(data[at + 5]))
            if components not in (1, 3) or end != at + 6 + 3 * components:
                return nothing
            across, down = _sampling(data, at, components)
            if across == 0:
                return nothing
            frame = at
        elif code == SOS:
            if frame == 0 or end != at + 4 + 2 * components:
                return nothing
            if not _scan(data, at, frame, components, defined, tables):
                return nothing
            if components == 3 and not _ycbcr(data, frame, jfif, adobe):
                return nothing
            return Header(height, width, components, across, down, interval, end)
        elif code == _APP0:
            if end >= at + 14 and _starts_with(data, at, end, 0x4A, 0x46, 0x49, 0x46, 0):
                jfif = True
        elif code == _APP14:
            if end >= at + 12 and _starts_with(data, at, end, 0x41, 0x64, 0x6F, 0x62, 0x65):
                adobe = np.int64(data[at + 11])
        elif not (_APP0 <= code <= _APP0 + 15 or code == _COMMENT):
            return nothing
        at = end
    return nothing
