"""Masks hold the numbers that their files store, whatever Pillow would show of them."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastpmae import UserError
from fastpmae.evaluate.dense.masks import decode_mask

IDS = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 0, 2]])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def gray_png(ids: np.ndarray, bits: int) -> bytes:
    """A gray PNG of 1, 2 or 4 bits a pixel, the first pixel in the highest bits."""
    height, width = ids.shape
    planes = (ids[..., None] >> np.arange(bits - 1, -1, -1) & 1).reshape(height, -1).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(planes, axis=1))
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )  # fmt: skip


def gray_tiff(ids: np.ndarray, bits: int, white_is_zero: bool) -> bytes:
    """The same as a TIFF of one strip."""
    height, width = ids.shape
    planes = (ids[..., None] >> np.arange(bits - 1, -1, -1) & 1).reshape(height, -1).astype(np.uint8)
    pixels = np.packbits(planes, axis=1).tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8, 277: 1, 278: height,
            279: len(pixels)}  # fmt: skip
    at = 8 + len(pixels) + len(pixels) % 2
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    padded = pixels.ljust(at - 8, b"\0")
    return b"II*\0" + struct.pack("<I", at) + padded + struct.pack("<H", len(tags)) + rows + struct.pack("<I", 0)


def netpbm(ids: np.ndarray, most: int, plain: bool) -> bytes:
    """A PGM, or of bits (most = 1) a PBM."""
    height, width = ids.shape
    kind = {(False, False): 5, (False, True): 2, (True, False): 4, (True, True): 1}[most == 1, plain]
    head = f"P{kind}\n{width} {height}\n" + ("" if most == 1 else f"{most}\n")
    if plain:
        return (head + "\n".join(" ".join(map(str, row)) for row in ids.tolist()) + "\n").encode()
    if most == 1:
        return head.encode() + np.packbits(ids.astype(np.uint8), axis=1).tobytes()
    return head.encode() + ids.astype(">u2" if most > 255 else "u1").tobytes()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gray_of_few_bits(bits: int):
    ids = IDS * 5 if bits == 4 else IDS % 2**bits
    for data in (gray_png(ids, bits), gray_tiff(ids, bits, False), gray_tiff(ids, bits, True)):
        assert decode_mask(data)[0].tolist() == ids.tolist()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("most", [1, 3, 10, 200, 255, 1000, 40_000, 65_535])
def test_maps_of_any_largest_number(most: int, plain: bool):
    ids = np.linspace(0, most, 12).round().astype(int).reshape(3, 4)
    assert decode_mask(netpbm(ids, most, plain))[0].tolist() == ids.tolist()


def test_every_number_of_a_map_comes_back():
    for most in (7, 100, 254, 256, 54_321):
        ids = np.arange(most + 1)[None]
        assert (decode_mask(netpbm(ids, most, False))[0] == ids).all()


@pytest.mark.parametrize(("mode", "words"), [("F", "values of another kind"), ("LA", "of another kind"), ("RGB", "co")])
def test_what_holds_no_numbers(mode: str, words: str, tmp_path: Path):
    image = Image.new(mode, (4, 4))
    image.save(tmp_path / "mask.tif")
    with pytest.raises(UserError, match=words):
        decode_mask((tmp_path / "mask.tif").read_bytes())
