"""Small JPEGs of every kind that our decoder takes, and their coefficients: what its fuzzers start from."""

from itertools import product

import numpy as np
from PIL import Image

from fastpmae_loaders.native.coefficients import MAGIC, pack_jpeg
from tests.loaders.native.jpegs import encoded, noise, segments, tall_chroma, with_quantisation

LARGEST = 64
"""Pixels of a side; what says that it is larger is decoded as of another size than it is, and so refused."""
SIDES = ((1, 1), (2, 9), (5, 4), (8, 8), (17, 16), (23, 40), (40, 33))
_AT = len(MAGIC) + 8
"""Where a code of coefficients says how high and wide its picture is."""


def smooth(seed: int, width: int, height: int) -> Image.Image:
    """Colours that change slowly, and an edge: few coefficients, and small ones."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 3 :, width // 2 :] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def small_jpegs() -> list[bytes]:
    """JPEGs of every sampling and of sides from 1 to 40, with and without restarts and tables of their own."""
    options = ({}, {"optimize": True}, {"restart_marker_blocks": 1}, {"restart_marker_rows": 1, "optimize": True})
    found = []
    for number, (side, sampling) in enumerate(product(SIDES, (0, 1, 2, "gray"))):
        image = (noise if number % 5 == 4 else smooth)(number, *side)
        found.append(encoded(image, sampling, (30, 75, 95, 100)[number // 4 % 4], **options[number % 4]))
    found += [tall_chroma(encoded(smooth(side, side, side), 1, 80)) for side in (8, 16, 33)]
    found += [with_quantisation(encoded(noise(3, 24, 16), sampling, 100), 255) for sampling in (0, 2)]
    found.append(encoded(smooth(4, 32, 24), 2, 80, restart_marker_blocks=1, comment=b"\xff\xda\xff\xd9"))
    return found


def small_codes() -> list[bytes]:
    """The coefficients of those that have a code."""
    codes = (pack_jpeg(data, *size_of(data)) for data in small_jpegs())
    return [code for code in codes if code is not None]


def size_of(payload: bytes) -> tuple[int, int]:
    """(height, width) that a JPEG or a code says it has; (8, 8) where that is nothing of LARGEST or less."""
    height = width = 0
    if payload.startswith(MAGIC):
        height, width = (int.from_bytes(payload[at : at + 2], "little") for at in (_AT, _AT + 2))
    else:
        try:
            frames = [at for kind in (0xC0, 0xC1) for at in segments(payload, kind)]
        except IndexError:
            frames = []
        if frames:
            height, width = (int.from_bytes(payload[frames[0] + at : frames[0] + at + 2], "big") for at in (5, 7))
    return (height, width) if 1 <= height <= LARGEST and 1 <= width <= LARGEST else (8, 8)
