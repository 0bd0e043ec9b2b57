"""Huffman codes to DCT coefficients: several codes to a look-up, out of a window of 64 bits.

The window's first bits index a table whose entries say which coefficients, with the zeros before them, those bits hold:
two where two fit, and never one that is cut off. What is rare goes the slow way, code by code: long codes, the end of a
block, a value that the table's bits do not hold. Data in which anything is wrong are given up, for Pillow to decode.

Sources: ITU-T T.81, annexes C and F. How a window is filled up without a branch: F. Giesen, "Reading bits in far too
many ways", part 2 (2018).
"""

from typing import Final, NamedTuple

import numpy as np

from fastpmae_loaders.jit.compiled import helper, kernel
from fastpmae_loaders.native.headers import COUNTS, TABLES

LOOKUP: Final = 11
"""Bits of the window that index the tables."""
ENTRIES: Final = 1 << LOOKUP
LEAVE: Final = 128
"""What is added to the advance of an entry that ends its block."""
SLOW: Final = 255
"""The advance of an entry that holds nothing: what follows goes the slow way."""
SLACK: Final = 512
"""Zero bytes behind a segment's data: more than one block can use up."""

_ZIGZAG = (
    *(0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21),
    *(28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61),
    *(54, 47, 55, 62, 63),
)
ZIGZAG = np.array(_ZIGZAG, np.uint8)
"""Where the k-th coefficient of a block stands in its 8 x 8."""
PLACES = np.array([(place >> 3) * 16 + (place & 7) for place in _ZIGZAG], np.uint8)
"""The same where two blocks lie side by side, row by row."""

_INDEX: Final = np.uint64(64 - LOOKUP)
_BYTE: Final = np.uint64(255)
_EIGHT: Final = np.uint64(8)
_SIXTEEN: Final = np.uint64(16)
_TOP_VALUE: Final = np.uint64(48)
_LOW_VALUE: Final = np.uint64(32)
_SECOND: Final = np.uint64(24)
_ONE: Final = np.uint64(1)
_THREE: Final = np.uint64(3)
_FULL: Final = np.uint64(63)
_FILLED: Final = np.uint64(56)
_LEFT: Final = np.uint64(64)
_LEAVING: Final = np.uint64(LEAVE)
_SLOWLY: Final = np.uint64(SLOW)
_NOTHING: Final = np.uint64(0)


class Codes(NamedTuple):
    """Tables for decoding, one of each for each Huffman table (DC 0-3, AC 4-7).

    symbols uint16 [8, ENTRIES]: 256 times a code's length, and its symbol; 0 where the code is longer. pairs uint64
    [8 x ENTRIES]: from the lowest bits on eight each for the bits used, the advance, the first coefficient's place and
    the second's, sixteen each for their values; of DC tables the bits used (0 where it goes the slow way) and the
    value. limits int64 [8, 17]: the first 16-bit number behind the codes of each
    length. offsets int64 [8, 17]: what turns a code into its symbol's place. values uint8 [8, 256]. kept uint8 [8,
    272]: the definitions that these were made from. made bool [8].
    """

    symbols: np.ndarray
    pairs: np.ndarray
    limits: np.ndarray
    offsets: np.ndarray
    values: np.ndarray
    kept: np.ndarray
    made: np.ndarray


def make_codes() -> Codes:
    """Room for one JPEG's tables; what is made is kept until another JPEG has other codes."""
    count = 2 * TABLES
    return Codes(
        np.zeros((count, ENTRIES), np.uint16),
        np.zeros(count * ENTRIES, np.uint64),
        np.zeros((count, 17), np.int64),
        np.zeros((count, 17), np.int64),
        np.zeros((count, 256), np.uint8),
        np.zeros((count, COUNTS + 256), np.uint8),
        np.zeros(count, np.bool_),
    )


@helper(_nrt=False)
def _as_before(data, at, which, codes):
    """Whether a definition is the one that the tables were last made from; it is kept."""
    kept, same, total = codes.kept[which], codes.made[which], 0
    for place in range(COUNTS):
        same = same and kept[place] == data[at + place]
        total += np.int64(data[at + place])
    for place in range(COUNTS, COUNTS + total):
        same = same and kept[place] == data[at + place]
    for place in range(COUNTS + total):
        kept[place] = data[at + place]
    return same


@helper(_nrt=False)
def _signed(bits, size):
    """The value that `size` bits stand for."""
    return bits if size == 0 or bits >> (size - 1) else bits - (1 << size) + 1


@kernel(_nrt=False)
def build_codes(data, at, which, codes):
    """Make the tables of the definition at `at` (see `Tables.codes`); False where it makes no sense."""
    if _as_before(data, at, which, codes):
        return True
    codes.made[which] = False
    symbols, limits, offsets, values = (
        codes.symbols[which],
        codes.limits[which],
        codes.offsets[which],
        codes.values[which],
    )
    symbols[:] = 0
    code, place, filled = 0, 0, 0
    for length in range(1, COUNTS + 1):
        count = np.int64(data[at + length - 1])
        offsets[length] = place - code
        if code + count > 1 << length:
            return False
        for _ in range(count):
            symbol = data[at + COUNTS + place]
            if which < TABLES and symbol > 15:
                return False
            values[place] = symbol
            if length <= LOOKUP:
                step = 1 << (LOOKUP - length)
                symbols[filled : filled + step] = np.uint16(length << 8 | np.int64(symbol))
                filled += step
            place += 1
        code += count
        limits[length] = code << (COUNTS - length)
        code <<= 1
    entries = codes.pairs[which * ENTRIES : (which + 1) * ENTRIES]
    if which < TABLES:
        _build_direct(symbols, entries)
    else:
        _build_pairs(symbols, entries)
    codes.made[which] = True
    return True


@helper(_nrt=False)
def _parts(symbol):
    """Of 256 times a code's length and its symbol: the length, the zeros before its coefficient, the value's bits."""
    number = np.int64(symbol)
    return number >> 8, number >> 4 & 15, number & 15


@helper(_nrt=False)
def _build_direct(symbols, entries):
    for index in range(ENTRIES):
        length, _, size = _parts(symbols[index])
        used = length + size
        if length == 0 or used > LOOKUP:
            entries[index] = 0
        else:
            value = _signed(index >> (LOOKUP - used) & ((1 << size) - 1), size)
            entries[index] = np.uint64(used) | np.uint64(value & 0xFFFF) << _LOW_VALUE


@helper(_nrt=False)
def _build_pairs(symbols, pairs):
    for index in range(ENTRIES):
        length, run, size = _parts(symbols[index])
        used = length + size
        if length == 0 or used > LOOKUP or (size == 0 and 0 < run < 15):
            pairs[index] = np.uint64(SLOW << 8)
            continue
        if size == 0 and run == 0:
            pairs[index] = np.uint64(used | LEAVE << 8)
            continue
        value = _signed(index >> (LOOKUP - used) & ((1 << size) - 1), size)
        advance, second, other = run + 1, run + 1, 0
        length, zeros, size = _parts(symbols[index << used & (ENTRIES - 1)])
        if length > 0 and used + length + size <= LOOKUP:
            if size > 0 or zeros == 15:
                used += length + size
                other = _signed(index >> (LOOKUP - used) & ((1 << size) - 1), size)
                second += zeros
                advance = second + 1
            elif zeros == 0:
                used += length
                advance += LEAVE
        entry = np.uint64(used | advance << 8 | run << 16 | second << 24)
        pairs[index] = entry | np.uint64(value & 0xFFFF) << _LOW_VALUE | np.uint64(other & 0xFFFF) << _TOP_VALUE


@helper(_nrt=False)
def _window(data, at):
    """Eight bytes as a number of 64 bits, the first the highest."""
    found = _NOTHING
    for place in range(8):
        found = found << _EIGHT | np.uint64(data[at + np.uint64(place)])
    return found


@helper(_nrt=False)
def _long_code(bits, which, codes):
    """256 times the length of a code at the window's head, and its symbol; 0 where it is no code."""
    head = np.int64(bits >> _TOP_VALUE)
    for length in range(LOOKUP + 1, COUNTS + 1):
        if head < codes.limits[which, length]:
            place = codes.offsets[which, length] + (head >> (COUNTS - length))
            return length << 8 | np.int64(codes.values[which, place & 255])
    return 0


@helper(_nrt=False)
def _symbol(bits, table, codes):
    which = np.int64(table >> np.uint64(LOOKUP))
    found = np.int64(codes.symbols[which, np.int64(bits >> _INDEX)])
    return found if found else _long_code(bits, which, codes)


@helper(inline="always", _nrt=False)
def decode_block(data, at, bits, count, direct, alternating, before, coefficients, place, codes, places):
    """One block: (at, bits, count) afterwards, its DC value, and its last coefficient's number; -1 where it is none.

    `bits` is the window, of which `count` bits are good, and `at` the next byte; `direct` and `alternating` are the
    places of the tables' first entries. `before`: the DC value of the block before. The coefficients that are not 0 are
    stored from `place` on, and so may be zeros where there is none.
    """
    bits |= _window(data, at) >> count
    at += (_FULL - count) >> _THREE
    count |= _FILLED
    last = -1
    k = _ONE
    entry = codes.pairs[direct + (bits >> _INDEX)]
    if entry:
        before += np.int64(np.int16(entry >> _LOW_VALUE))
        bits <<= entry & _BYTE
        count -= entry & _BYTE
    else:
        found = _symbol(bits, direct, codes)
        if found == 0:
            k = _LEFT
        size = found & 15
        bits <<= np.uint64(found >> 8)
        if size:
            before += _signed(np.int64(bits >> np.uint64(64 - size)), size)
        bits <<= np.uint64(size)
        count -= np.uint64((found >> 8) + size)
        bits |= _window(data, at) >> count
        at += (_FULL - count) >> _THREE
        count |= _FILLED
    coefficients[place] = np.int16(before)
    # there are bits for four entries: after a first look-up, and wherever the window is filled up
    while k <= _FULL:
        for _ in range(4):
            entry = codes.pairs[alternating + (bits >> _INDEX)]
            advance = entry >> _EIGHT & _BYTE
            if k + advance > _FULL:
                break
            first = k + (entry >> _SIXTEEN & _BYTE)
            second = k + (entry >> _SECOND & _BYTE)
            coefficients[place + np.uint64(places[first])] = np.int16(entry >> _LOW_VALUE)
            coefficients[place + np.uint64(places[second])] = np.int16(entry >> _TOP_VALUE)
            bits <<= entry & _BYTE
            count -= entry & _BYTE
            k += advance
        else:
            bits |= _window(data, at) >> count
            at += (_FULL - count) >> _THREE
            count |= _FILLED
            continue
        end = k + advance - _LEAVING
        # a block's last place is followed by no end
        if _LEAVING <= advance < _SLOWLY and end <= _FULL:
            if end > k:
                coefficients[place + np.uint64(places[end - _ONE])] = np.int16(entry >> _LOW_VALUE)
            bits <<= entry & _BYTE
            count -= entry & _BYTE
            last = np.int64(end) - 1
            break
        bits |= _window(data, at) >> count
        at += (_FULL - count) >> _THREE
        count |= _FILLED
        found = _symbol(bits, alternating, codes)
        run, size = found >> 4 & 15, found & 15
        bits <<= np.uint64(found >> 8)
        count -= np.uint64(found >> 8)
        if found == 0 or (size == 0 and run < 15):
            if found and run == 0:
                last = np.int64(k) - 1
            break
        k += np.uint64(run)
        if k > _FULL:
            break
        if size:
            value = _signed(np.int64(bits >> np.uint64(64 - size)), size)
            coefficients[place + np.uint64(places[k])] = np.int16(value)
            bits <<= np.uint64(size)
            count -= np.uint64(size)
        if k == _FULL:
            last = 63
            break
        k += _ONE
        bits |= _window(data, at) >> count
        at += (_FULL - count) >> _THREE
        count |= _FILLED
    return at, bits, count, before, last
