"""JPEGs decoded by our own code, held against Pillow to the bit; what is not ordinary or not sound is left to it."""

import tarfile
from functools import cache

import numpy as np
import pytest
from PIL import Image

from fastpmae_loaders.errors import BetonError
from fastpmae_loaders.native.decoder import Workspace, decode, decode_jpeg, make_workspace, planes_size
from fastpmae_loaders.sources.jpeg import jpeg_size
from fastpmae_loaders.sources.pictures import ImageError
from fastpmae_loaders.sources.pictures import decode_jpeg as by_pillow
from tests.loaders.guards import guarded
from tests.loaders.native.jpegs import encoded, noise, tall_chroma, with_quantisation
from tests.made import SHARED_DATA, made_image

SIZES = ((1, 1), (2, 3), (5, 4), (7, 9), (8, 8), (16, 17), (31, 15), (33, 16), (48, 64), (67, 53))


def same_as_pillow(data: bytes, width: int, height: int) -> None:
    found = decode_jpeg(data, height, width)
    assert found is not None
    assert np.array_equal(found, by_pillow(data, height, width))


def cropped(number: int, width: int, height: int) -> Image.Image:
    return made_image(number, 80, 80).crop((20, 20, 20 + width, 20 + height))


@pytest.mark.parametrize("subsampling", [0, 1, 2, "gray"])
@pytest.mark.parametrize("size", SIZES)
def test_every_sampling_size_and_table(subsampling: int | str, size: tuple[int, int]):
    width, height = size
    for number, (quality, options) in enumerate(
        (
            (75, {}),
            (95, {"optimize": True}),
            (100, {"restart_marker_blocks": 1}),
            (1, {"restart_marker_rows": 1, "optimize": True}),
            (40, {"restart_marker_blocks": 3}),
        )
    ):
        data = encoded(cropped(number, width, height), subsampling, quality, **options)
        if subsampling in (1, 2) and width < 5:
            assert decode_jpeg(data, height, width) is None
        else:
            same_as_pillow(data, width, height)


@pytest.mark.slow
@pytest.mark.parametrize("quality", range(1, 101))
def test_every_quality(quality: int):
    for number, subsampling in enumerate((0, 1, 2, "gray")):
        for image in (made_image(100 * number + quality, 67, 53), noise(quality, 67, 53)):
            same_as_pillow(encoded(image, subsampling, quality), 67, 53)


@pytest.mark.parametrize("side", [16, 29, 64, 67])
def test_chroma_of_half_the_height(side: int):
    """4:4:0, which Pillow does not write: the blocks of a 4:2:2 picture in another order."""
    for image in (made_image(side, side, side), noise(side, side, side)):
        same_as_pillow(tall_chroma(encoded(image, 1, 90)), side, side)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("step", [3, 40, 255])
def test_values_out_of_range(subsampling: int, step: int):
    """Coefficients that no picture has: sums leave 16 bits, samples leave 8."""
    for number in range(3):
        data = encoded(noise(number, 67, 53), subsampling, 100)
        same_as_pillow(with_quantisation(data, step), 67, 53)


def test_what_is_not_ordinary_is_left_to_pillow():
    image = made_image(3, 50, 40)
    for data in (
        encoded(image, 0, 80, progressive=True),
        encoded(image.convert("CMYK"), None, 80),
        encoded(image, None, 80, keep_rgb=True),
        encoded(image, 0, 80)[:-2],
        encoded(image, 0, 80)[:700],
        b"",
        b"\xff\xd8",
        b"no JPEG at all",
    ):
        assert decode_jpeg(data, 40, 50) is None
    assert decode_jpeg(encoded(image, 0, 80), 50, 40) is None
    assert decode_jpeg(encoded(image, 0, 80), 41, 50) is None


def test_what_stands_around_the_picture_does_not_matter():
    image = made_image(4, 50, 40)
    data = encoded(image, 2, 80, comment=b"\xff\xda\xff\xd9", exif=b"Exif\0\0" + bytes(300))
    same_as_pillow(data, 50, 40)
    same_as_pillow(data + data, 50, 40)
    same_as_pillow(data + b"\xff\x00", 50, 40)


@pytest.mark.parametrize("subsampling", [0, 1, 2, "gray"])
def test_only_what_boxes_cover_is_decoded(subsampling: int | str):
    width, height = 131, 117
    data = encoded(made_image(8, width, height), subsampling, 90, restart_marker_blocks=7)
    whole = by_pillow(data, height, width)
    rng = np.random.default_rng(0)
    for _ in range(60):
        boxes = np.zeros((2, 4), np.int32)
        boxes[:, 2:] = rng.integers(1, (height + 1, width + 1), (2, 2))
        for box in boxes:
            box[0] = rng.integers(0, height + 1 - box[2])
            box[1] = rng.integers(0, width + 1 - box[3])
        found = decode_jpeg(data, height, width, boxes)
        assert found is not None
        for top, left, tall, wide in boxes:
            part = np.s_[top : top + tall, left : left + wide]
            assert np.array_equal(found[part], whole[part])


def in_guards(work: Workspace) -> Workspace:
    """A workspace each of whose plain arrays ends where memory does."""
    return work._replace(
        **{
            name: guarded(getattr(work, name))
            for name in ("data", "coefficients", "ends", "quantisation", "planes", "spare", "blocks", "parts", "places")
        }
    )


def check_damaged(data: bytes, width: int, height: int, at_start: bool) -> bool:
    """Decode what may be damaged between forbidden pages: whether it was decoded, and then as Pillow does."""
    payload = guarded(np.frombuffer(data, np.uint8).copy(), at_start=at_start)
    pixels = guarded(np.zeros((height, width, 3), np.uint8), at_start=at_start)
    work = in_guards(make_workspace(height, width, len(data), int(planes_size(height, width))))
    box = np.array([[0, 0, height, width]], np.int32)
    if not decode(payload, height, width, box, pixels.ctypes.data, work):
        return False
    assert np.array_equal(pixels, by_pillow(data, height, width))
    return True


def damaged(rng: np.random.Generator, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        changed[rng.integers(2, len(changed))] = rng.integers(0, 256)
    kind = rng.integers(0, 8)
    if kind == 0:
        del changed[rng.integers(2, len(changed)) :]
    if kind == 1:
        at = rng.integers(2, len(changed))
        changed[at:at] = changed[2:at]
    return bytes(changed)


def try_damaged(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sound = [
        encoded(made_image(number, 48, 40), (0, 1, 2, "gray")[number % 4], (50, 90, 100)[number % 3], **options)
        for number, options in enumerate(6 * ({}, {"restart_marker_blocks": 2}, {"optimize": True}))
    ]
    outcomes = [0, 0]
    for number in range(count):
        data = damaged(rng, sound[number % len(sound)])
        outcomes[check_damaged(data, 48, 40, at_start=bool(number & 1))] += 1
    assert min(outcomes) > count // 20


def test_damaged_files():
    """Whatever is decoded is what Pillow shows, and nothing is touched that is not ours."""
    try_damaged(600, 0)


@pytest.mark.slow
def test_many_damaged_files():
    try_damaged(20_000, 1)


@cache
def shared(name: str) -> list[bytes]:
    archive = SHARED_DATA / f"{name}.tar"
    if not archive.exists():
        pytest.skip(f"{archive} is missing")
    with tarfile.open(archive) as tar:
        files = [tar.extractfile(member) for member in tar if member.isfile()]
        return [data for file in files if file and (data := file.read()).startswith(b"\xff\xd8")]


@pytest.mark.slow
def test_imagenet():
    for data in shared("imagenet_sample_400"):
        same_as_pillow(data, *jpeg_size(data))


@pytest.mark.slow
def test_odd_images():
    outcomes = [0, 0]
    for data in shared("odd_images"):
        try:
            width, height = jpeg_size(data)
        except BetonError:
            width, height = 64, 64
        if width * height > 1 << 24:
            continue
        found = decode_jpeg(data, height, width)
        outcomes[found is not None] += 1
        if found is not None:
            assert np.array_equal(found, by_pillow(data, height, width))
    assert min(outcomes) > 10


def test_a_picture_that_pillow_refuses_is_refused():
    data = encoded(made_image(1, 50, 40), 0, 80)
    cut = data[: len(data) // 2]
    assert decode_jpeg(cut, 40, 50) is None
    with pytest.raises(ImageError):
        by_pillow(cut, 40, 50)
