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
    for second, is_sound in ((1023, True), (1024, False), (-1024, True), (-1025, False)):
        changed = code[:-5] + (1023).to_bytes(2, "little") + code[-3:-2] + second.to_bytes(2, "little", signed=True)
        assert (to_jpeg(changed, 8, 16) is not None) == is_sound


def test_a_jpeg_whose_values_differ_by_more_than_its_codes_may_say_is_not_coded():
    """A DC of 1,024 after one of -1,024, by a code of twelve bits, which Pillow reads."""
    for values, is_coded in (((-1024, 1023), True), ((-1024, 1024), False)):
        jpeg = of_two_blocks(*values)
        assert Image.open(io.BytesIO(jpeg)).size == (16, 8)
        code = pack_jpeg(jpeg, 8, 16)
        assert (code is not None) == is_coded
        if code is not None:
            goes_back(jpeg, 16, 8)


def of_two_blocks(first: int, second: int) -> bytes:
    """A gray JPEG of 16 x 8 pixels whose blocks have these DC values alone, by differences of 11 or 12 bits."""
    bits = ""
    for value in (first, second - first):
        size = abs(value).bit_length()
        bits += {11: "01", 12: "10"}[size] + format(value if value > 0 else value + (1 << size) - 1, f"0{size}b") + "0"
    bits += "1" * (-len(bits) % 8)
    scan = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")

    def segment(marker: int, content: bytes) -> bytes:
        return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2, "big") + content

    codes = segment(0xC4, b"\0" + bytes((0, 3, *14 * [0], 0, 11, 12))) + segment(
        0xC4, b"\x10" + bytes((1, *15 * [0], 0))
    )
    frame = segment(0xC0, bytes((8, 0, 8, 0, 16, 1, 1, 0x11, 0))) + codes + segment(0xDA, bytes((1, 1, 0, 0, 63, 0)))
    return b"\xff\xd8" + segment(0xDB, b"\0" + 64 * b"\1") + frame + scan + b"\xff\xd9"


@pytest.mark.slow
def test_imagenet():
    for data in shared("imagenet_sample_400")[::8]:
        goes_back(data, *jpeg_size(data))
