"""Any image file to bytes by Pillow: in bands and as a whole, gray of many bits, limits asked before decoding."""

import io
import struct
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fastpmae_loaders.sources import gray, pictures
from fastpmae_loaders.sources.gray import nearly_black, white_of
from fastpmae_loaders.sources.limits import decoding_bytes
from fastpmae_loaders.sources.pictures import ImageError, decode_upright, load, look, open_image, upright_rgb
from tests.made import made_image, progressive_bomb


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def loaded(data: bytes) -> Image.Image:
    image = open_image(io.BytesIO(data))
    load(image)
    return image


def tiff_of_12_bits(values: np.ndarray) -> bytes:
    """[H, W] as one packed strip of a TIFF, W even."""
    pairs = values.reshape(-1, 2).astype(int)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    data = packed.astype(np.uint8).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = 8 + len(data) + len(data) % 2
    return (
        b"II*\0" + struct.pack("<I", start) + data.ljust(start - 8, b"\0") + struct.pack("<H", 9) + entries + bytes(4)
    )


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "clear P", "RGB", "clear RGB", "RGBA", "CMYK", "I;16", "clear I;16"]
)
def test_conversion_in_bands_is_that_of_the_whole(mode, monkeypatch):
    picture, options = made_image(2, 61, 47), {}
    if mode.startswith("clear"):
        options["transparency"] = (20, 30, 40) if "RGB" in mode else 3
    if "I;16" in mode:
        image = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        image = picture.convert(mode.rpartition(" ")[2])
    image = loaded(encoded(image, "TIFF" if mode == "CMYK" else "PNG", **options))
    assert image.has_transparency_data == (mode in ("LA", "RGBA") or mode.startswith("clear"))
    expected = image
    if "I;16" in mode:
        values = np.asarray(image)
        expected = Image.fromarray((values // 257).astype(np.uint8))
        if options:
            expected.putalpha(Image.fromarray(np.where(values == 3, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        expected = expected.convert("RGBA")
        expected = Image.alpha_composite(Image.new("RGBA", expected.size, "white"), expected)
    expected = np.asarray(expected.convert("RGB"))
    for together in (1 << 20, 100, 1):
        monkeypatch.setattr(gray, "_TOGETHER", together)
        assert (np.asarray(upright_rgb(image)) == expected).all()


def test_the_white_of_gray_of_many_bits():
    """What the file says first, then what the user says, then the whole range; never the image's own brightest."""
    ramp = np.linspace(0, 4095, 64 * 48).round().reshape(48, 64).astype(np.uint16)
    eight = np.rint(ramp * (255 / 4095)).astype(int)
    twelve, sixteen = loaded(tiff_of_12_bits(ramp)), loaded(encoded(Image.fromarray(ramp), "PNG"))
    for white in (None, 1000):
        assert (np.asarray(upright_rgb(twelve, white=white))[..., 0] == eight).all()
    assert nearly_black(twelve) is None
    assert (np.asarray(upright_rgb(sixteen, white=4095))[..., 0] == eight).all()
    assert np.asarray(upright_rgb(sixteen)).max() == 16
    assert np.asarray(upright_rgb(sixteen, white=2000)).max() == 255
    assert nearly_black(sixteen) == 4095
    assert nearly_black(sixteen, white=65535) is None
    wide, floats = (loaded(encoded(Image.fromarray(ramp.astype(kind)), "TIFF")) for kind in (np.int32, np.float32))
    for image in (wide, floats):
        assert (np.asarray(upright_rgb(image, white=4095))[..., 0] == eight).all()
        assert nearly_black(image) == 4095
    unit = loaded(encoded(Image.fromarray((ramp / 4095).astype(np.float32)), "TIFF"))
    assert white_of(unit, 1.0, 4095) == 1
    assert nearly_black(unit) is None
    assert nearly_black(loaded(encoded(Image.fromarray(ramp * 16), "PNG"))) is None  # as bright as pictures are
    assert nearly_black(loaded(encoded(Image.fromarray(ramp * 0), "PNG"))) is None  # black is black
    for value, says in ((np.nan, "no picture"), (1e6, "which of them is white")):
        values = np.array([[1, value]], np.float32)
        with pytest.raises(ImageError, match=says):
            upright_rgb(loaded(encoded(Image.fromarray(values), "TIFF")))


def test_memory_is_asked_for_before_decoding(monkeypatch):
    """Pixels, channels and depth, and what each format's decoder holds beside them, against 16 bytes a pixel."""
    picture = made_image(1, 60, 40)
    a_pixel = {}
    for form, image, options in (
        ("PNG", picture, {}),
        ("JPEG", picture, {}),
        ("JPEG", picture.convert("CMYK"), {}),
        ("WEBP", picture, {}),
        ("JPEG2000", picture.convert("RGBA"), {}),
        ("TIFF", picture, {"compression": "tiff_deflate"}),
        ("GIF", picture.convert("P"), {}),
        ("PNG", Image.fromarray(np.zeros((40, 60), np.uint16)), {}),
    ):
        found = open_image(io.BytesIO(encoded(image, form, **options)))
        a_pixel[form, found.mode] = decoding_bytes(found) / (60 * 40)
    assert a_pixel == {
        ("PNG", "RGB"): 4, ("JPEG", "RGB"): 10, ("JPEG", "CMYK"): 16, ("WEBP", "RGB"): 16, ("JPEG2000", "RGBA"): 32,
        ("TIFF", "RGB"): 10, ("GIF", "P"): 5, ("PNG", "I;16"): 6,
    }  # fmt: skip
    data = encoded(picture.convert("RGBA"), "JPEG2000")
    monkeypatch.setattr(pictures, "BYTES_A_PIXEL", 31)
    with pytest.raises(ImageError, match=r"60x40 pixels of JPEG2000, RGBA, would take 0.0 GiB of memory to decode"):
        load(open_image(io.BytesIO(data)), 60 * 40)
    load(open_image(io.BytesIO(data)), 60 * 40 * 2)


def test_a_bomb_of_scans_is_no_image_of_a_folder_either():
    data = progressive_bomb(16, 600)
    assert look(io.BytesIO(data))[1:] == (16, 16)  # its header is read, no more
    for decode in (lambda: decode_upright(io.BytesIO(data), 16, 16), lambda: pictures.decode_jpeg(data, 16, 16)):
        with pytest.raises(ImageError, match="more than 500 scans"):
            decode()


def test_a_large_jpeg_is_decoded_without_a_warning(monkeypatch):
    """Under warnings as errors it would be a bad image, to the engines that ask Pillow alone."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    data = encoded(made_image(3, 50, 40), "JPEG")
    with pytest.warns(Image.DecompressionBombWarning):
        expected = np.asarray(Image.open(io.BytesIO(data)))
    assert (pictures.decode_jpeg(data, 40, 50) == expected).all()


HEIC, JXL = b"\0\0\0\x18ftypheic" + bytes(40), b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40)


@pytest.mark.parametrize(("data", "says"), [
    (HEIC, "is HEIC, .*: pip install pillow-heif"), (JXL, "is JPEG XL, .*: pip install pillow-jxl-plugin"),
    (b"\xff\x0a" + bytes(40), "is JPEG XL"), (b"\0\0\0\x18ftypisom" + bytes(40), "not an image"),
])  # fmt: skip
def test_a_format_of_a_package_that_is_missing_is_named(data, says, monkeypatch):
    for name in ("pillow_heif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, name, None)
    pictures._formats.cache_clear()
    with pytest.raises(ImageError, match=says):
        open_image(io.BytesIO(data))
    pictures._formats.cache_clear()


def test_a_package_that_is_there_is_used(monkeypatch):
    """As pillow-heif does it: its opener is registered with Pillow when asked to."""

    class Opened(Image.Image):
        format = "HEIF"

        def __init__(self) -> None:
            super().__init__()
            picture = made_image(0, 20, 10)
            self.im, self._mode, self._size = picture.im, picture.mode, picture.size

    package = ModuleType("pillow_heif")
    opener = SimpleNamespace(open=lambda *_: Opened(), accept=lambda head: head[4:12] == b"ftypheic")
    package.register_heif_opener = lambda: Image.register_open("HEIF", opener.open, opener.accept)  # pyright: ignore
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    pictures._formats.cache_clear()
    assert open_image(io.BytesIO(HEIC)).size == (20, 10)
    monkeypatch.undo()
    pictures._formats.cache_clear()
