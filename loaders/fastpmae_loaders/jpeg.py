"""A JPEG's own header, read without decoding, and libjpeg-turbo called as FFCV's loader calls it."""

import ctypes
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from fastpmae_loaders.errors import BetonError

JPEG_MAX_SIDE = 65500  # libjpeg's own limit, a little under what 16 bits hold

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD8)))


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


def jpeg_size(payload: bytes | np.ndarray) -> tuple[int, int]:
    """(width, height) by the JPEG's own header. BetonError when it has none that libjpeg would accept.

    Compare it with the .beton's metadata before decoding: decode buffers are sized from the metadata.
    """
    header = jpeg_header(payload)
    return header.width, header.height


@cache
def _libffcv() -> ctypes.CDLL | None:
    # Loading the library alone takes milliseconds; importing ffcv takes seconds (numba, torch) and changes
    # torch's number of threads.
    spec = importlib.util.find_spec("ffcv")
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("_libffcv*.so")):
            try:
                library = ctypes.CDLL(str(file))
                library.imdecode.argtypes = [
                    *(ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p),
                    *(6 * [ctypes.c_uint32]),
                    *(ctypes.c_bool, ctypes.c_bool),
                ]
                library.imdecode.restype = ctypes.c_int
            except (OSError, AttributeError):
                continue
            return library
    return None


def turbo_available() -> bool:
    """Whether FFCV's decoder library is installed and loads."""
    return _libffcv() is not None


def turbo_decode(payload: bytes | np.ndarray, width: int, height: int) -> np.ndarray | None:
    """Decodes with the very call FFCV's loader makes (its flags too). uint8 [height, width, 3].

    None when libjpeg-turbo reports an error or a warning, or when the JPEG's own size is not width x height
    (libjpeg-turbo would then scale it silently). RuntimeError without FFCV (see `turbo_available`).
    """
    library = _libffcv()
    if library is None:
        raise RuntimeError("ffcv's decoder library is not installed")
    if jpeg_size(payload) != (width, height):
        return None
    source = np.frombuffer(payload, np.uint8)
    pixels = np.empty((height, width, 3), np.uint8)
    where = (source.ctypes.data, source.size, height, width, pixels.ctypes.data)
    status = library.imdecode(*where, height, width, 0, 0, 1, 1, False, False)
    return None if status else pixels
