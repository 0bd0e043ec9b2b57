"""A JPEG's markers, walked in compiled code before libjpeg-turbo sees them.

A libjpeg-turbo decoder is used for one image after another, and keeps the tables of the image before. A JPEG that does
not bring its own (damaged, or a frame of a film) would be decoded with those: a picture that depends on what the
decoder showed last.
"""

from fastpmae_loaders.jit.compiled import helper
from fastpmae_loaders.jit.memory import load_byte
from fastpmae_loaders.sources.jpeg import SCAN_LIMIT

_SMOOTHED = 10
"""Of a block's coefficients, those whose missing bits libjpeg-turbo makes up for."""


@helper
def _word(address):
    return load_byte(address) * 256 + load_byte(address + 1)


@helper
def _quantisation(at, end):
    """The tables that a DQT segment's content at ... end-1 defines, as bits; -1 where it makes no sense."""
    found = 0
    while at < end:
        kind = load_byte(at)
        if kind & 15 > 3:
            return -1
        found |= 1 << (kind & 15)
        at += 65 if kind >> 4 == 0 else 129
    return found if at == end else -1


@helper
def _huffman(at, end):
    """The same of a DHT segment: bits 0-3 are DC tables, 4-7 AC tables."""
    found = 0
    while at + 17 <= end:
        kind = load_byte(at)
        if kind & 15 > 3 or kind >> 4 > 1:
            return -1
        found |= 1 << (kind & 15) + 4 * (kind >> 4)
        codes = 0
        for length in range(1, 17):
            codes += load_byte(at + length)
        at += 17 + codes
    return found if at == end else -1


@helper
def _scan_has_tables(scan, frame, progressive, quantisation, huffman):
    """Are all tables that the scan whose header is at `scan` needs among those defined? (`frame`: the SOF's.)"""
    count = load_byte(scan + 4)
    spectrum = scan + 5 + 2 * count
    first, refines = load_byte(spectrum), load_byte(spectrum + 2) >> 4
    for part in range(count):
        name, tables = load_byte(scan + 5 + 2 * part), load_byte(scan + 6 + 2 * part)
        if tables >> 4 > 3 or tables & 15 > 3:
            return False
        if (not progressive or (first == 0 and refines == 0)) and not huffman >> (tables >> 4) & 1:
            return False
        if (not progressive or first > 0) and not huffman >> (4 + (tables & 15)) & 1:
            return False
        known = False
        for component in range(load_byte(frame + 9)):
            if load_byte(frame + 10 + 3 * component) == name:
                table = load_byte(frame + 12 + 3 * component)
                known = known or (table < 4 and quantisation >> table & 1 == 1)
        if not known:
            return False
    return True


@helper
def _finishes(scan, frame):
    """The coefficients that a progressive scan brings to their last bit: ten bits a component, of the first ten."""
    count = load_byte(scan + 4)
    spectrum = scan + 5 + 2 * count
    first, last = load_byte(spectrum), load_byte(spectrum + 1)
    if load_byte(spectrum + 2) & 15 != 0:
        return 0
    finished = 0
    for part in range(count):
        for component in range(load_byte(frame + 9)):
            if load_byte(frame + 10 + 3 * component) == load_byte(scan + 5 + 2 * part):
                for coefficient in range(first, min(last, _SMOOTHED - 1) + 1):
                    finished |= 1 << (_SMOOTHED * component + coefficient)
    return finished


@helper
def _after_scan(at, stop):
    """The first marker behind a scan's data: the restarts within it are a part of it."""
    while at + 1 < stop:
        if load_byte(at) == 0xFF:
            code = load_byte(at + 1)
            if code != 0 and code != 0xFF and not 0xD0 <= code <= 0xD7:
                return at
        at += 1
    return stop


@helper
def stands_alone(address, size, height, width):
    """Is this an ordinary JPEG of height x width, by its own header, with all tables that it uses?

    The metadata, which sized the buffer, may lie about the size. Baseline to progressive, of at most SCAN_LIMIT scans;
    a progressive one that ends before its scans do is left to Pillow, whose libjpeg-turbo may be of another version:
    they smooth such pictures differently. Nothing is read outside address ... address + size - 1. What is not sound
    here may still be a picture to another decoder.
    """
    at, stop = address + 2, address + size
    frame, quantisation, huffman = 0, 0, 0
    progressive, scans, finished, wanted = False, 0, 0, 0
    while at + 4 <= stop:
        if load_byte(at) != 0xFF:
            at += 1
            continue
        code = load_byte(at + 1)
        if code == 0xFF:
            at += 1
            continue
        if code == 0 or code == 1 or 0xD0 <= code <= 0xD7:
            at += 2
            continue
        if code == 0xD9:
            return scans > 0 and finished & wanted == wanted
        length = _word(at + 2)
        end = at + 2 + length
        if length < 2 or end > stop:
            return scans > 0 and finished & wanted == wanted
        if code == 0xDB:
            found = _quantisation(at + 4, end)
            if found < 0:
                return False
            quantisation |= found
        elif code == 0xC4:
            found = _huffman(at + 4, end)
            if found < 0:
                return False
            huffman |= found
        elif code == 0xC0 or code == 0xC1 or code == 0xC2:
            if frame or length < 8 or length != 8 + 3 * load_byte(at + 9):
                return False
            if _word(at + 5) != height or _word(at + 7) != width:
                return False
            frame, progressive = at, code == 0xC2
            if progressive:
                components = load_byte(at + 9)
                if components > 4:
                    return False
                wanted = (1 << (_SMOOTHED * components)) - 1
        elif 0xC0 <= code <= 0xCF:
            return False  # lossless or arithmetic
        elif code == 0xDA:
            if not frame or length < 6 or length != 6 + 2 * load_byte(at + 4):
                return False
            if not _scan_has_tables(at, frame, progressive, quantisation, huffman):
                return False
            if not progressive and load_byte(at + 4) == load_byte(frame + 9):
                return True  # all of the picture is in this scan
            scans += 1
            if progressive:
                finished |= _finishes(at, frame)
            if scans > SCAN_LIMIT:
                return False
            end = _after_scan(end, stop)
        at = end
    return scans > 0 and finished & wanted == wanted
