"""Which images of a set are shown before: one bit for each, in a file beside the set's index.

The order of an epoch leaves out the images whose bit is 1. A file that was made for another index, or is damaged, is
refused: without it images would be shown that should not be.
"""

import hashlib
import os
import zlib

import numpy as np

from fastpmae_loaders.errors import BetonError
from fastpmae_loaders.sources.reading import given_bytes
from fastpmae_loaders.sources.set_index import SetIndex

DUPLICATES = "duplicates.bits"
_MAGIC, _VERSION = b"fastpmae", 1
_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("crc32", "<u4"),  # of the bits
        ("images", "<u8"),
        ("duplicates", "<u8"),
        ("index", "u1", 32),  # the index it was made for, by its SHA-256
    ]
)

_ONES = np.array([value.bit_count() for value in range(256)], np.uint8)
_STRETCH = 1 << 22
"""Bytes that are counted at a time."""


def duplicates_file(bits: np.ndarray, index: SetIndex) -> bytes:
    """The file of these bits: uint8 [ceil(n / 8)] of the index's n images, the first in the lowest bit of the first."""
    header = np.zeros((), _HEADER)
    header["magic"], header["version"], header["crc32"] = _MAGIC, _VERSION, zlib.crc32(bits.data)
    header["images"], header["duplicates"] = index.images, count_duplicates(bits)
    header["index"] = np.frombuffer(_digest(index), np.uint8)
    return header.tobytes() + bits.tobytes()


def read_duplicates(source: bytes | str | os.PathLike[str], index: SetIndex, where: str | None = None) -> np.ndarray:
    """The bits in these bytes, or in the file of that path: uint8 [ceil(n / 8)], read-only, of the index's n images.

    Args:
        where: what the bytes are called in sentences.

    Raises:
        BetonError: where the file cannot be read, is damaged, or is of another index.
    """
    blob, where = given_bytes(source, where, DUPLICATES)
    again = "fastpmae-write OUT/ --finish --deduplicate writes it anew, and without it every image is shown"
    if len(blob) < _HEADER.itemsize or not blob.startswith(_MAGIC):
        raise BetonError(f"{where} is no list of duplicates: {again}")
    header = np.frombuffer(blob, _HEADER, 1)[0]
    if header["version"] != _VERSION:
        raise BetonError(
            f"{where} is of version {header['version']}, and {_VERSION} is the only one that is read: update fastpmae"
        )
    if header["index"].tobytes() != _digest(index):
        raise BetonError(f"{where} was made for another index than the one beside it: {again}")
    bits = np.frombuffer(blob, np.uint8, offset=_HEADER.itemsize)
    images = index.images
    # the last byte may have bits of no image
    spare = int(bits[-1]) >> (images % 8) if len(bits) and images % 8 else 0
    sound = len(bits) == -(-images // 8) and header["images"] == images and not spare
    if not sound or header["crc32"] != zlib.crc32(bits.data) or header["duplicates"] != count_duplicates(bits):
        raise BetonError(f"{where} is damaged: {again}")
    if header["duplicates"] >= images:
        raise BetonError(f"{where} leaves no image of the set: {again}")
    return bits


def are_duplicates(bits: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Whether these images, int64 [m], are shown before: bool [m]."""
    return (bits[images >> 3] >> (images & 7).astype(np.uint8)) & 1 != 0


def duplicates_before(bits: np.ndarray, places: np.ndarray) -> np.ndarray:
    """How many images before each of these places, int64 [m] by ascending number, are duplicates: int64 [m]."""
    before = np.empty(len(places), np.int64)
    so_far = 0
    for start in range(0, len(bits) + 1, _STRETCH):
        here = bits[start : start + _STRETCH]
        first, last = np.searchsorted(places, (8 * start, 8 * (start + _STRETCH)))
        inside = places[first:last]
        byte = (inside >> 3) - start
        until = np.concatenate([[so_far], so_far + np.cumsum(_ONES[here], dtype=np.int64)])
        begun = np.append(here, np.uint8(0))[byte] & ((1 << (inside & 7)) - 1).astype(np.uint8)
        before[first:last] = until[byte] + _ONES[begun]
        so_far = int(until[-1])
    return before


def count_duplicates(bits: np.ndarray) -> int:
    """How many images of a set are duplicates."""
    return sum(int(_ONES[bits[at : at + _STRETCH]].sum(dtype=np.int64)) for at in range(0, len(bits), _STRETCH))


def _digest(index: SetIndex) -> bytes:
    return hashlib.sha256(index.to_json().encode("utf-8", "backslashreplace")).digest()
