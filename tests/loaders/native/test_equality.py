"""Every JPEG of the shared sets of images: decoded as Pillow does, to the bit, and so from its coefficients."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from fastpmae_loaders.errors import BetonError
from fastpmae_loaders.native.coefficients import is_whole, pack_jpeg, unpack_pixels
from fastpmae_loaders.native.decoder import decode_jpeg
from fastpmae_loaders.native.jpeg_writer import to_jpeg
from fastpmae_loaders.sources.jpeg import jpeg_size
from fastpmae_loaders.sources.pictures import ImageError
from fastpmae_loaders.sources.pictures import decode_jpeg as by_pillow
from tests.loaders.native.test_decoder import shared

SETS = {
    "tiny_imagenet_20": 0.99,
    "imagenet_sample_400": 0.99,
    "camvid_240x180": 0.99,
    "bccd": 0.99,
    "odd_images": 0.1,
}
"""The sets, and the share of each that is decoded here and not by Pillow at least."""
LARGEST = 1 << 25
"""Pixels, above which nothing is decoded here: of the odd images some say so who are not."""


def outcomes(images: Iterable[bytes]) -> Counter[str]:
    """How many images were decoded here, left to Pillow, or refused by both; AssertionError where anything differs."""
    found: Counter[str] = Counter()
    for data in images:
        try:
            width, height = jpeg_size(data)
        except BetonError:
            width, height = 64, 64
        if width * height > LARGEST:
            found["too large"] += 1
            continue
        pixels, code = decode_jpeg(data, height, width), pack_jpeg(data, height, width)
        if pixels is None:
            assert code is None
            try:
                by_pillow(data, height, width)
                found["by Pillow"] += 1
            except ImageError:
                found["refused"] += 1
            continue
        assert np.array_equal(pixels, by_pillow(data, height, width))
        assert code is not None
        assert is_whole(code)
        unpacked = unpack_pixels(code, height, width)
        assert unpacked is not None
        assert np.array_equal(unpacked, pixels)
        jpeg = to_jpeg(code, height, width)
        assert jpeg is not None
        assert np.array_equal(by_pillow(jpeg, height, width), pixels)
        assert pack_jpeg(jpeg, height, width) == code
        found["here"] += 1
    return found


@pytest.mark.parametrize("name", SETS)
def test_a_few_of_each_set(name: str) -> None:
    images = shared(name)
    smaller = [data for data in images if len(data) < 100_000]
    assert outcomes(smaller[:: len(smaller) // 5])["here"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_every_image(name: str) -> None:
    found = outcomes(shared(name))
    print(f"{name}: {dict(found)}")
    assert found["here"] >= SETS[name] * found.total()
