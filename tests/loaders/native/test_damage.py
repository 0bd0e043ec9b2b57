"""What is said of a code of coefficients that was changed."""

import numpy as np
import pytest

from fastpmae_loaders.native.coefficients import FIXED, pack_jpeg, unpack_pixels
from fastpmae_loaders.native.damage import OTHER_DIGEST, damage_of
from tests.loaders.native.jpegs import encoded
from tests.made import made_image

WIDTH, HEIGHT = 40, 30
INDEX = FIXED + 3 * 64


@pytest.fixture(scope="module")
def code() -> bytes:
    found = pack_jpeg(encoded(made_image(1, WIDTH, HEIGHT), 2, 90), HEIGHT, WIDTH)
    assert found is not None
    assert damage_of(found, HEIGHT, WIDTH) is None
    return found


def changed(code: bytes, at: int, value: bytes) -> bytes:
    return code[:at] + value + code[at + len(value) :]


def test_each_part_is_named(code: bytes):
    # 4:2:0: two rows of luma and one of each chroma component, in each of two rows of MCUs
    first = INDEX + 4 * 9
    for broken, words in (
        (b"", "do not begin as such do"),
        (changed(code, 0, b"JPG"), "do not begin as such do"),
        (changed(code, 3, b"\x07"), "are of version 7, and 1 is read here"),
        (changed(code, 12, b"\x1f"), "are of 40x31 pixels, its metadata say 40x30"),
        (changed(code, 16, b"\2"), r"a sampling that there is not (2 components, 2 x 2)"),
        (code[: INDEX + 9], f"would end at byte {first}, and there are {INDEX + 9}"),
        (changed(code, INDEX + 8, b"\xff\xff\xff\xff"), "row 1 would be bytes"),
        (code[:-1], "row 7 would be bytes"),
        (changed(code, first, b"\x1e"), "row 0 of its blocks is damaged"),
        (changed(code, 30, bytes([code[30] ^ 1])), OTHER_DIGEST),
        (changed(code, 4, bytes([code[4] ^ 1])), OTHER_DIGEST),
    ):
        found = damage_of(broken, HEIGHT, WIDTH)
        assert found is not None
        assert words in found


def test_it_refuses_what_the_decoder_refuses(code: bytes):
    """And nothing else, but for the digest."""
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(600):
        broken = bytearray(code)
        for _ in range(rng.integers(1, 4)):
            broken[rng.integers(12, len(broken))] = rng.integers(0, 256)
        found = damage_of(bytes(broken), HEIGHT, WIDTH)
        pixels = unpack_pixels(bytes(broken), HEIGHT, WIDTH)
        refused += pixels is None
        assert (found in (None, OTHER_DIGEST)) == (pixels is not None)
    assert 100 < refused < 500
