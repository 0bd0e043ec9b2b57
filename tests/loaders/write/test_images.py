"""Stored images against references made here from numbers, with Pillow used only to write the files."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.sources.beton import JPG, RAW
from fastpmae_loaders.write.images import ImageError, ImageSettings, StoredImage, store
from fastpmae_loaders.write.sources import Item
from fastpmae_loaders.write.write import converter
from tests.made import made_image, progressive_bomb

RAW_PIXELS = ImageSettings(mode="raw")


def encoded(image: Image.Image, form: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def raw(data: bytes, settings: ImageSettings = RAW_PIXELS) -> np.ndarray:
    """The pixels that are stored in raw mode."""
    stored = store(data, settings)
    assert stored.mode == RAW
    return np.frombuffer(stored.data, np.uint8).reshape(stored.height, stored.width, 3).astype(int)


def opened(stored: StoredImage) -> np.ndarray:
    image = Image.open(io.BytesIO(stored.data))
    assert image.format == "JPEG"
    assert image.mode == "RGB"
    assert image.size == (stored.width, stored.height)
    return np.asarray(image).astype(int)


PICTURE = made_image(1, 90, 70)
PIXELS = np.asarray(PICTURE).astype(int)


@pytest.mark.parametrize(
    "settings", [{}, {"progressive": True}, {"subsampling": 2}, {"subsampling": 0}, {"quality": 30}]
)
def test_plain_jpegs_keep_their_bytes(settings: dict) -> None:
    data = encoded(PICTURE, "JPEG", **settings)
    stored = store(data, ImageSettings())
    assert stored == StoredImage(JPG, 90, 70, data, kept=True)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_upright(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.open(io.BytesIO(encoded(PICTURE, form, exif=exif.tobytes())))
    expected = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    if form == "PNG":  # by hand, so as not to trust Pillow's reading of its own table
        turned = {1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1], 5: PIXELS.swapaxes(0, 1)}
        turned[6] = turned[5][:, ::-1]
        turned[7] = turned[5][::-1, ::-1]
        turned[8] = turned[5][::-1]
        assert np.array_equal(expected, turned[orientation])
    data = encoded(PICTURE, form, exif=exif.tobytes())
    assert np.array_equal(raw(data), expected)
    stored = store(data, ImageSettings())
    assert stored.kept == (form == "JPEG" and orientation == 1)
    assert np.abs(opened(stored) - expected).mean() < 2


def test_alpha_is_composited_on_white() -> None:
    rng = np.random.default_rng(0)
    alpha = rng.integers(0, 256, (70, 90))
    rgba = np.dstack([PIXELS, alpha]).astype(np.uint8)
    share = alpha[..., None] / 255
    expected = PIXELS * share + 255 * (1 - share)
    assert np.abs(raw(encoded(Image.fromarray(rgba), "PNG")) - expected).max() <= 1
    gray = PIXELS[..., 0]
    la = Image.fromarray(np.dstack([gray, alpha]).astype(np.uint8))
    assert np.abs(raw(encoded(la, "PNG")) - (gray[..., None] * share + 255 * (1 - share))).max() <= 1


def test_palettes() -> None:
    palette = PICTURE.quantize(32)
    expected = np.asarray(palette.convert("RGB")).astype(int)
    assert np.array_equal(raw(encoded(palette, "PNG")), expected)
    clear = np.asarray(palette) == 3
    assert clear.any()
    for form in ("PNG", "GIF"):
        pixels = raw(encoded(palette, form, transparency=3))
        assert (pixels[clear] == 255).all()
        assert np.array_equal(pixels[~clear], expected[~clear])
    partly = raw(encoded(palette, "PNG", transparency=bytes([255, 255, 255, 51])))
    assert np.abs(partly[clear] - (expected[clear] * 0.2 + 255 * 0.8)).max() <= 1


def test_a_transparent_colour() -> None:
    data = encoded(PICTURE, "PNG", transparency=tuple(PIXELS[0, 0].tolist()))
    clear = (PIXELS[0, 0] == PIXELS).all(axis=2)
    pixels = raw(data)
    assert (pixels[clear] == 255).all()
    assert np.array_equal(pixels[~clear], PIXELS[~clear])


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(values: np.ndarray, depth: int, colours: int, *, chunks: bytes = b"") -> bytes:
    """A PNG written by hand: big-endian samples, no filter. colours: 0 gray, 2 RGB, 4 gray and alpha, 6 RGBA."""
    height, width = values.shape[:2]
    rows = values.astype(">u2" if depth == 16 else "u1").reshape(height, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunks + chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 40 * 60).round().reshape(40, 60).astype(int)
    expected = ramp / 257
    for data in (
        png(ramp, 16, 0),
        encoded(Image.fromarray(ramp.astype("<u2")), "TIFF"),
        encoded(Image.fromarray(ramp.astype("<i4")), "TIFF"),
    ):
        assert np.abs(raw(data) - expected[..., None]).max() <= 0.51
    # Pillow itself takes the upper byte of 16-bit colours
    colours = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=2)
    assert np.abs(raw(png(colours, 16, 2)) - colours / 257).max() <= 1
    dark = ramp // 64  # at most 1023 of 65535: stays dark
    assert np.abs(raw(png(dark, 16, 0)) - dark[..., None] / 257).max() <= 0.51


def test_sixteen_bits_with_a_transparent_gray() -> None:
    ramp = np.linspace(0, 65535, 40 * 60).round().reshape(40, 60).astype(int)
    data = png(ramp, 16, 0, chunks=chunk(b"tRNS", struct.pack(">H", ramp[10, 10])))
    pixels = raw(data)
    assert (pixels[10, 10] == 255).all()
    assert (pixels[ramp != ramp[10, 10]] < 256).all()
    assert np.abs(pixels[0] - ramp[0, :, None] / 257).max() <= 0.51


def test_floats_and_what_is_no_picture() -> None:
    ramp = np.linspace(0, 1, 40 * 60, dtype=np.float32).reshape(40, 60)
    assert np.abs(raw(encoded(Image.fromarray(ramp), "TIFF")) - 255 * ramp[..., None]).max() <= 0.51
    for values in (ramp - 2, ramp * np.nan, ramp * 1e9):
        with pytest.raises(ImageError, match="gray values"):
            store(encoded(Image.fromarray(values), "TIFF"), RAW_PIXELS)


def test_gray_and_black_and_white() -> None:
    gray = PICTURE.convert("L")
    expected = np.asarray(gray).astype(int)[..., None]
    assert (raw(encoded(gray, "PNG")) == expected).all()
    stored = store(encoded(gray, "JPEG"), ImageSettings())
    assert not stored.kept
    assert np.abs(opened(stored) - expected).mean() < 2
    bits = PICTURE.convert("1")
    assert (raw(encoded(bits, "PNG")) == np.asarray(bits).astype(int)[..., None] * 255).all()


def test_cmyk() -> None:
    ink = np.asarray(PICTURE.convert("CMYK")).astype(int)
    ink[..., 3] = 40
    expected = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    image = Image.merge("CMYK", [Image.fromarray(ink[..., band].astype(np.uint8)) for band in range(4)])
    # Pillow writes Adobe's inverted form, with the marker that says so
    stored = store(encoded(image, "JPEG", quality=98, subsampling=0), ImageSettings())
    assert not stored.kept
    assert np.abs(opened(stored) - expected).mean() < 4
    assert np.abs(raw(encoded(image, "TIFF")) - expected).max() <= 2


def test_jpeg_with_rgb_inside_is_encoded_anew() -> None:
    stored = store(encoded(PICTURE, "JPEG", keep_rgb=True, quality=98), ImageSettings())
    assert not stored.kept
    assert np.abs(opened(stored) - PIXELS).mean() < 2


def test_first_frame_of_animations() -> None:
    second = made_image(2, 90, 70)
    for form in ("GIF", "PNG", "WEBP"):
        data = encoded(PICTURE, form, save_all=True, append_images=[second], lossless=True)
        assert np.abs(raw(data) - PIXELS).mean() < (12 if form == "GIF" else 0.01)


def test_max_size() -> None:
    big = made_image(4, 400, 300)
    data = encoded(big, "JPEG", quality=98, subsampling=0)
    assert store(data, ImageSettings(max_size=400)).kept
    stored = store(data, ImageSettings(max_size=100))
    assert (stored.width, stored.height, stored.kept) == (100, 75, False)
    means = np.asarray(big).astype(float).reshape(75, 4, 100, 4, 3).mean(axis=(1, 3))
    assert np.abs(opened(stored) - means).mean() < 4  # antialiased: close to the mean of each 4x4 block
    thin = store(encoded(Image.new("RGB", (3000, 2)), "PNG"), ImageSettings(max_size=100))
    assert (thin.width, thin.height) == (100, 1)


def test_sides_that_do_not_fit() -> None:
    long = encoded(Image.new("RGB", (65501, 1), "red"), "PNG")
    with pytest.raises(ImageError, match="--max-size"):
        store(long, ImageSettings())
    assert store(long, RAW_PIXELS).width == 65501
    assert store(long, ImageSettings(max_size=1000)).width == 1000
    with pytest.raises(ImageError, match="--max-size"):
        store(encoded(Image.new("RGB", (65536, 1)), "PNG"), RAW_PIXELS)


def test_decompression_bombs_are_refused() -> None:
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    with pytest.raises(ImageError, match="bomb"):
        store(bomb + chunk(b"IEND", b""), ImageSettings())
    with pytest.raises(ImageError, match="--max-pixels 1,000"):
        store(encoded(PICTURE, "PNG"), ImageSettings(max_pixels=1000))


def test_a_limit_above_pillows_own_is_ours_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the worker processes, whose Pillow is ours: --max-pixels alone decides, and is named."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    large = encoded(PICTURE, "PNG")
    pixels = PICTURE.width * PICTURE.height

    def convert(max_pixels: int) -> StoredImage:
        item = Item("file", "large.png", (), 0)
        return converter(ImageSettings(max_pixels=max_pixels))(0, item)

    monkeypatch.setattr("fastpmae_loaders.write.write.read_item", lambda item: large)
    assert convert(pixels).width == PICTURE.width
    with pytest.raises(ImageError, match="--max-pixels"):
        convert(pixels - 1)


def test_a_bomb_of_scans_is_refused() -> None:
    with pytest.raises(ImageError, match="more than 500 scans"):
        store(progressive_bomb(16, 600), ImageSettings())


def test_gray_of_16_bits_that_comes_out_nearly_black_is_told() -> None:
    ramp = np.linspace(0, 4095, 64 * 48).round().reshape(48, 64).astype(np.uint16)
    data = encoded(Image.fromarray(ramp), "PNG")
    assert store(data, ImageSettings()).better_white == 4095
    stored = store(data, ImageSettings(mode="raw", white=4095))
    assert stored.better_white is None
    assert np.frombuffer(stored.data, np.uint8).max() == 255
    assert store(encoded(PICTURE, "PNG"), ImageSettings()).better_white is None


def test_damage_is_refused_with_a_reason() -> None:
    for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        data = encoded(PICTURE, form)
        with pytest.raises(ImageError):
            store(data[: len(data) // 2], ImageSettings())
    for data, says in [(b"", "empty"), (b"hello", "not an image"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image")]:
        with pytest.raises(ImageError, match=says):
            store(data, ImageSettings())


def test_a_jpeg_that_only_pillow_finds_sound_is_encoded_anew() -> None:
    data = encoded(PICTURE, "JPEG")
    damaged = data[: len(data) * 3 // 4] + b"\xff\xd9"  # ends early: Pillow fills it up in silence
    Image.open(io.BytesIO(damaged)).load()
    stored = store(damaged, ImageSettings())
    assert not stored.kept
    assert np.array_equal(raw(damaged), np.asarray(Image.open(io.BytesIO(damaged))))


def test_proportion_is_drawn_by_seed_and_name() -> None:
    half = ImageSettings(mode="proportion", proportion=0.3, seed=5)
    drawn = [half.as_jpeg(b"%d.jpg" % number) for number in range(4000)]
    assert 0.27 < np.mean(drawn) < 0.33
    assert drawn == [half.as_jpeg(b"%d.jpg" % number) for number in range(4000)]
    other = ImageSettings(mode="proportion", proportion=0.3, seed=6)
    assert drawn != [other.as_jpeg(b"%d.jpg" % number) for number in range(4000)]
    assert all(ImageSettings(mode="proportion", proportion=1.0).as_jpeg(b"%d.jpg" % number) for number in range(99))
    assert not any(ImageSettings(mode="proportion", proportion=0.0).as_jpeg(b"%d.jpg" % number) for number in range(99))


@pytest.mark.parametrize(
    "wrong", [{"max_size": 0}, {"max_size": 70000}, {"quality": 0}, {"quality": 101}, {"mode": "png"},
              {"proportion": 1.5}, {"max_pixels": 0}, {"white": 0}]
)  # fmt: skip
def test_settings_out_of_range(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong)).replace("_", "-")):
        ImageSettings(**wrong)
