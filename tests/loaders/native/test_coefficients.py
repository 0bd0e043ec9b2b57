"""Coefficients in a code of our own: the JPEG's picture to the bit, under twice its bytes, from sound data only."""

import numpy as np
import pytest

from fastpmae_loaders.native.coefficients import MEANINGS, is_whole, pack_jpeg, unpack, unpack_pixels
from fastpmae_loaders.native.decoder import make_workspace, planes_size
from fastpmae_loaders.sources.jpeg import jpeg_size
from fastpmae_loaders.sources.pictures import decode_jpeg as by_pillow
from tests.loaders.guards import guarded
from tests.loaders.native.jpegs import encoded, noise, tall_chroma, with_quantisation
from tests.loaders.native.test_decoder import cropped, in_guards, shared
from tests.made import made_image


def packed(data: bytes, width: int, height: int) -> bytes:
    found = pack_jpeg(data, height, width)
    assert found is not None
    assert is_whole(found)
    return found


def same_as_pillow(data: bytes, width: int, height: int) -> bytes:
    code = packed(data, width, height)
    found = unpack_pixels(code, height, width)
    assert found is not None
    assert np.array_equal(found, by_pillow(data, height, width))
    return code


@pytest.mark.parametrize("subsampling", [0, 1, 2, "gray"])
@pytest.mark.parametrize("size", [(5, 4), (8, 8), (16, 17), (33, 16), (67, 53)])
def test_every_sampling_and_size(subsampling: int | str, size: tuple[int, int]):
    for number, quality in enumerate((1, 30, 75, 95, 100)):
        same_as_pillow(encoded(cropped(number, *size), subsampling, quality), *size)
        same_as_pillow(encoded(noise(number, *size), subsampling, quality, restart_marker_blocks=2), *size)


def test_what_pillow_does_not_write():
    same_as_pillow(tall_chroma(encoded(made_image(1, 67, 67), 1, 90)), 67, 67)
    for step in (3, 255):
        same_as_pillow(with_quantisation(encoded(noise(2, 67, 53), 2, 100), step), 67, 53)


def test_every_code_means_something_else():
    assert len({int(meaning) for meaning in MEANINGS}) == 256


def test_what_is_not_decoded_here_has_no_code():
    image = made_image(3, 50, 40)
    for data in (encoded(image, 0, 80, progressive=True), encoded(image, 0, 80)[:700], b""):
        assert pack_jpeg(data, 40, 50) is None
    assert pack_jpeg(encoded(image, 0, 80), 41, 50) is None


def test_only_what_boxes_cover_is_decoded():
    width, height = 131, 117
    rng = np.random.default_rng(0)
    for subsampling in (0, 1, 2, "gray"):
        data = encoded(made_image(8, width, height), subsampling, 90)
        code, whole = packed(data, width, height), by_pillow(data, height, width)
        for _ in range(20):
            boxes = np.zeros((2, 4), np.int32)
            for box in boxes:
                box[2:] = rng.integers(1, (height + 1, width + 1))
                box[0], box[1] = rng.integers(0, height + 1 - box[2]), rng.integers(0, width + 1 - box[3])
            found = unpack_pixels(code, height, width, boxes)
            assert found is not None
            for top, left, tall, wide in boxes:
                part = np.s_[top : top + tall, left : left + wide]
                assert np.array_equal(found[part], whole[part])


def try_damaged(count: int, seed: int) -> None:
    rng, width, height = np.random.default_rng(seed), 48, 40
    sound = [
        packed(encoded(made_image(i, width, height), (0, 1, 2, "gray")[i % 4], 90), width, height) for i in range(8)
    ]
    outcomes = [0, 0]
    for number in range(count):
        changed = bytearray(sound[number % len(sound)])
        for _ in range(rng.integers(1, 6)):
            # half of the changes fall in the header and the index
            reach = len(changed) if rng.integers(0, 2) else 300
            changed[rng.integers(0, reach)] = rng.integers(0, 256)
        if number % 7 == 0:
            del changed[rng.integers(0, len(changed)) :]
        at_start = bool(number & 1)
        payload = guarded(np.frombuffer(bytes(changed), np.uint8).copy(), at_start=at_start)
        pixels = guarded(np.zeros((height, width, 3), np.uint8), at_start=at_start)
        work = in_guards(make_workspace(height, width, 0, int(planes_size(height, width))))
        box = np.array([[0, 0, height, width]], np.int32)
        outcomes[unpack(payload, height, width, box, pixels.ctypes.data, work)] += 1
        assert not is_whole(bytes(changed)) or bytes(changed) in sound
    assert min(outcomes) > count // 20


def test_damaged_codes_touch_nothing_that_is_not_theirs():
    try_damaged(500, 0)


@pytest.mark.slow
def test_many_damaged_codes():
    try_damaged(20_000, 1)


@pytest.mark.slow
def test_imagenet():
    """To the bit, and at most 1.9 times the bytes."""
    before = after = 0
    for data in shared("imagenet_sample_400"):
        width, height = jpeg_size(data)
        before += len(data)
        after += len(same_as_pillow(data, width, height))
    assert after < 1.9 * before
