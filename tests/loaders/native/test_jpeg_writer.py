"""Codes of coefficients back to JPEGs, which Pillow reads, and whose own code is the same."""

import io

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from fastpmae_loaders.native.coefficients import pack_jpeg
from fastpmae_loaders.native.jpeg_writer import to_jpeg
from fastpmae_loaders.sources.jpeg import jpeg_size
from fastpmae_loaders.sources.pictures import decode_jpeg as by_pillow
from tests.loaders.native.jpegs import encoded, noise, tall_chroma
from tests.loaders.native.test_decoder import cropped, shared
from tests.made import made_image


def goes_back(data: bytes, width: int, height: int) -> None:
    code = pack_jpeg(data, height, width)
    assert code is not None
    jpeg = to_jpeg(code, height, width)
    assert jpeg is not None
    assert pack_jpeg(jpeg, height, width) == code
    assert np.array_equal(by_pillow(jpeg, height, width), by_pillow(data, height, width))


@pytest.mark.parametrize("subsampling", [0, 1, 2, "gray"])
@pytest.mark.parametrize("size", [(5, 4), (16, 17), (67, 53)])
def test_the_same_coefficients(subsampling: int | str, size: tuple[int, int]):
    for number, quality in enumerate((1, 30, 75, 95, 100)):
        goes_back(encoded(cropped(number, *size), subsampling, quality, optimize=True), *size)
        goes_back(encoded(noise(number, *size), subsampling, quality, restart_marker_blocks=2), *size)


def test_chroma_of_half_the_height():
    goes_back(tall_chroma(encoded(made_image(1, 67, 67), 1, 90)), 67, 67)


def test_the_tables_of_quantisation_are_the_same():
    data = encoded(made_image(1, 67, 53), 2, 63)
    code = pack_jpeg(data, 53, 67)
    assert code is not None
    jpeg = to_jpeg(code, 53, 67)
    assert jpeg is not None
    first, second = (JpegImageFile(io.BytesIO(content)).quantization for content in (data, jpeg))
    assert [list(table) for table in first.values()] == [list(second[part]) for part in (0, 1)]


def test_a_damaged_code_makes_no_jpeg():
    code = pack_jpeg(encoded(made_image(1, 67, 53), 2, 63), 53, 67)
    assert code is not None
    assert to_jpeg(code[: len(code) // 2], 53, 67) is None
    assert to_jpeg(b"", 53, 67) is None


def test_values_that_no_jpeg_may_have_make_no_jpeg():
    """Not even where each differs little from the one before: the JPEG would have no code again."""
    code = pack_jpeg(encoded(Image.new("L", (16, 8), 255), "gray", 100), 8, 16)
    assert code is not None
    # both blocks are a DC value and nothing else
    for second, is_sound in ((1024, True), (1025, False)):
        changed = code[:-5] + (1024).to_bytes(2, "little") + code[-3:-2] + second.to_bytes(2, "little")
        assert (to_jpeg(changed, 8, 16) is not None) == is_sound


@pytest.mark.slow
def test_imagenet():
    for data in shared("imagenet_sample_400")[::8]:
        goes_back(data, *jpeg_size(data))
