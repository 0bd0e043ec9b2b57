"""A JPEG's own header, read without decoding, and FFCV's libjpeg-turbo, called as Pillow calls its own."""

import ctypes
import importlib.util
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from fastpmae_loaders.errors import BetonError

JPEG_MAX_SIDE = 65500  # libjpeg's own limit, a little under what 16 bits hold
SCAN_LIMIT = 500
"""Scans that an image may have: the figure of libjpeg-turbo's own TJFLAG_LIMITSCANS.

Every scan is a pass over all of the picture, whatever it adds to it: thousands of empty ones, in a few hundred
kilobytes, hold a decoder for minutes. Encoders write about ten.
"""
# TurboJPEG's numbers. The accurate DCT, and no fast upsampling: what Pillow decodes with, to the bit.
TURBO_RGB = 0
TURBO_FLAGS = 4096 | 32768  # TJFLAG_ACCURATEDCT, TJFLAG_LIMITSCANS
TURBO_DECOMPRESS = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, *(5 * [ctypes.c_int])
)
"""`tjDecompress2`: handle, source, its size, target, width, pitch (0: no gaps), height, pixel format, flags."""

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD8)))
_BETWEEN_SCANS = frozenset((0xC4, 0xDA, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)))
_BEFORE_SCANS = _BETWEEN_SCANS | _FRAMES
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")  # what ends a scan's data, or stands between segments


@dataclass(frozen=True)
class JpegHeader:
    """The frame header, and what of the application segments decides how libjpeg reads the colours."""

    width: int
    height: int
    precision: int  # bits per sample
    frame: int  # second byte of the frame marker: 0xC0 baseline, 0xC1 extended, 0xC2 progressive, ...
    component_ids: tuple[int, ...]
    jfif: bool
    adobe_transform: int | None
    has_tables: bool  # for quantisation and Huffman codes, before the first scan
    has_metadata: bool  # Exif or XMP, which may say that the picture lies on its side

    @property
    def is_ordinary(self) -> bool:
        """Baseline to progressive, 8 bits, with tables of its own: what every decoder reads."""
        return self.frame in (0xC0, 0xC1, 0xC2) and self.precision == 8 and self.has_tables

    @property
    def is_baseline(self) -> bool:
        """One scan from top to bottom, coded by Huffman: not progressive."""
        return self.frame in (0xC0, 0xC1)

    @property
    def is_ycbcr(self) -> bool:
        """Three components that libjpeg takes for YCbCr (asking JFIF, then Adobe, then the ids)."""
        if len(self.component_ids) != 3:
            return False
        if self.jfif:
            return True
        if self.adobe_transform is not None:
            return self.adobe_transform == 1
        return self.component_ids != (0x52, 0x47, 0x42)  # the letters R, G, B


def jpeg_header(payload: bytes | np.ndarray) -> JpegHeader:
    """Walks the markers up to the first scan the way libjpeg does. BetonError says what is wrong.

    Nothing is decoded: a few microseconds for an ordinary file. `payload` is bytes or a uint8 array.
    """
    data = payload.tobytes() if isinstance(payload, np.ndarray) else payload
    if data[:2] != b"\xff\xd8":
        raise BetonError("not a JPEG: it does not start with FF D8")
    position, frame, jfif, adobe, metadata = 2, None, False, None, False
    tables: set[int] = set()
    while True:
        position = data.find(b"\xff", position)
        if position < 0:
            raise BetonError("the JPEG ends before its image data")
        while data[position : position + 1] == b"\xff":
            position += 1
        if position >= len(data):
            raise BetonError("the JPEG ends before its image data")
        code = data[position]
        position += 1
        if code == 0 or code in _WITHOUT_LENGTH:
            continue
        if code in (0xD8, 0xD9):
            raise BetonError("the JPEG has a start or end marker before its image data")
        length = int.from_bytes(data[position : position + 2], "big")
        segment = data[position + 2 : position + length]
        if length < 2 or len(segment) != length - 2:
            raise BetonError(f"JPEG marker {code:02X} has an impossible length")
        if code in _FRAMES:
            if frame is not None:
                raise BetonError("the JPEG has two frame headers")
            frame = (code, *_frame_header(segment))
        elif code == 0xE0 and segment[:5] == b"JFIF\0" and len(segment) >= 14:
            jfif = True
        elif code == 0xEE and segment[:5] == b"Adobe" and len(segment) >= 12:
            adobe = segment[11]
        elif code == 0xE1:
            metadata = True
        elif code in (0xC4, 0xDB):
            tables.add(code)
        elif code == 0xDA:
            if frame is None:
                raise BetonError("the JPEG has image data before its frame header")
            code, precision, height, width, ids = frame
            return JpegHeader(width, height, precision, code, ids, jfif, adobe, len(tables) == 2, metadata)
        position += length


def _frame_header(segment: bytes) -> tuple[int, int, int, tuple[int, ...]]:
    if len(segment) < 6 or len(segment) != 6 + 3 * segment[5]:
        raise BetonError("the JPEG frame header has an impossible length")
    height, width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
    if not width or not height or not segment[5]:
        raise BetonError(f"the JPEG frame header says {width}x{height} pixels, {segment[5]} components")
    return segment[0], height, width, tuple(segment[6::3])


def segments_belong(payload: bytes | np.ndarray) -> bool:
    """Whether before and between the scans of a JPEG, up to its end, is only what belongs there. Nothing is decoded.

    Some decoders pass over what others stop at. Only a progressive picture may be in several scans: others may be so by
    the standard, but then each scan needs tables of its own, and hardly anybody writes them.
    """
    data = payload.tobytes() if isinstance(payload, np.ndarray) else payload
    position, scans, progressive = 2, 0, False
    while marker := _MARKER.search(data, position):
        if not scans and marker.start() != position:  # segments follow each other
            return False
        code, position = marker[0][1], marker.end()
        progressive |= code == 0xC2
        if code == 0xD9:
            return scans == 1 or (progressive and scans > 0)
        if code not in (_BETWEEN_SCANS if scans else _BEFORE_SCANS):
            return False
        if scans and not progressive:  # tables that come after the only scan are missing where it needs them
            return False
        scans += code == 0xDA
        position += max(2, int.from_bytes(data[position : position + 2], "big"))
    return False


def jpeg_size(payload: bytes | np.ndarray) -> tuple[int, int]:
    """(width, height) by the JPEG's own header. BetonError when it has none that libjpeg would accept.

    Compare it with the .beton's metadata before decoding: decode buffers are sized from the metadata.
    """
    header = jpeg_header(payload)
    return header.width, header.height


def check_scans(payload: bytes | np.ndarray) -> None:
    """BetonError where a JPEG has more than SCAN_LIMIT scans. Nothing is decoded."""
    data = payload.tobytes() if isinstance(payload, np.ndarray) else payload
    if data.count(b"\xff\xda") <= SCAN_LIMIT:  # also where it is no marker: in a thumbnail, in a profile
        return
    position, scans = 2, 0
    while (marker := _MARKER.search(data, position)) and (code := marker[0][1]) != 0xD9:
        scans += code == 0xDA
        if scans > SCAN_LIMIT:
            raise BetonError(f"the JPEG has more than {SCAN_LIMIT} scans (a decompression bomb?)")
        position = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))


@cache
def _turbo() -> ctypes.CDLL | None:
    # FFCV's library for the sake of the libturbojpeg that it was linked with, whose functions are found through it.
    # Loading it alone takes milliseconds; importing ffcv takes seconds (numba, torch) and changes torch's number of
    # threads.
    spec = importlib.util.find_spec("ffcv")
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("_libffcv*.so")):
            try:
                library = ctypes.CDLL(str(file))
                library.tjInitDecompress.argtypes, library.tjInitDecompress.restype = [], ctypes.c_void_p
                library.tjDestroy.argtypes = [ctypes.c_void_p]
                library.tjDecompress2  # noqa: B018 - found or not
            except (OSError, AttributeError):
                continue
            return library
    return None


def turbo_available() -> bool:
    """Whether the libjpeg-turbo that FFCV was linked with is installed and loads."""
    return _turbo() is not None


class TurboDecoders:
    """libjpeg-turbo's decoders: lent to threads, kept for later ones, and freed with this object.

    `function` is the address of `tjDecompress2`. RuntimeError without FFCV (see `turbo_available`).
    """

    def __init__(self) -> None:
        library = _turbo()
        if library is None:
            raise RuntimeError("FFCV's decoder library is not installed")
        self._library = library
        self.function = int(ctypes.cast(library.tjDecompress2, ctypes.c_void_p).value or 0)
        self._idle: list[int] = []
        self._made: list[int] = []
        # Threads may still decode when the interpreter ends.
        weakref.finalize(self, _destroy, library, self._made).atexit = False

    @contextmanager
    def lend(self) -> Iterator[int]:
        """A decoder's handle that no other thread has meanwhile."""
        try:
            handle = self._idle.pop()
        except IndexError:
            handle = self._library.tjInitDecompress()
            if not handle:
                raise MemoryError("libjpeg-turbo has no memory for a decoder") from None
            self._made.append(handle)
        try:
            yield handle
        finally:
            self._idle.append(handle)


def _destroy(library: ctypes.CDLL, handles: list[int]) -> None:
    while handles:
        library.tjDestroy(handles.pop())


def turbo_decode(payload: bytes | np.ndarray, width: int, height: int) -> np.ndarray | None:
    """Decodes with the very call that the FFCV engine makes. uint8 [height, width, 3].

    None when libjpeg-turbo reports an error or a warning, or when the JPEG's own size is not width x height
    (libjpeg-turbo would then scale it silently). RuntimeError without FFCV (see `turbo_available`); BetonError for
    what has no header.
    """
    library = _turbo()
    if library is None:
        raise RuntimeError("FFCV's decoder library is not installed")
    if jpeg_size(payload) != (width, height):
        return None
    source = np.frombuffer(payload, np.uint8)
    pixels = np.empty((height, width, 3), np.uint8)
    decompress = TURBO_DECOMPRESS(("tjDecompress2", library))
    # a decoder of its own: a kept one would lend this image the tables of the last
    handle = library.tjInitDecompress()
    try:
        where = (handle, source.ctypes.data, source.size, pixels.ctypes.data)
        status = decompress(*where, width, 0, height, TURBO_RGB, TURBO_FLAGS)
    finally:
        library.tjDestroy(handle)
    return None if status else pixels
