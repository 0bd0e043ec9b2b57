"""libjpeg-turbo as the FFCV engine calls it, held against Pillow; and how many scans a JPEG may have."""

import ctypes
import io
from itertools import product

import numpy as np
import pytest
from PIL import Image

from fastpmae_loaders import Beton, BetonError, PairedViews, ViewSettings
from fastpmae_loaders.sources import jpeg
from fastpmae_loaders.sources.jpeg import SCAN_LIMIT, TurboDecoders, check_scans, turbo_available, turbo_decode
from tests.engines import FFCV, needs_ffcv
from tests.loaders.files import made_pixels, write_beton
from tests.made import made_image, progressive_bomb

SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0", "gray", "4:4:0", "4:1:1")  # in TurboJPEG's order
PROGRESSIVE = 16384
SIZES = ((1, 1), (2, 3), (7, 9), (8, 8), (17, 16), (33, 15), (64, 31), (65, 99))


def by_turbo(pixels: np.ndarray, subsampling: int, flags: int) -> bytes:
    """Encoded by TurboJPEG, which knows more subsamplings than Pillow. A handle of its own: it keeps Huffman tables."""
    library = jpeg._turbo()
    assert library is not None
    init = ctypes.CFUNCTYPE(ctypes.c_void_p)(("tjInitCompress", library))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    compress = ctypes.CFUNCTYPE(integer, *(2 * [pointer]), *(4 * [integer]), *(2 * [pointer]), *(3 * [integer]))
    handle, data, size = init(), ctypes.c_void_p(), ctypes.c_ulong()
    try:
        height, width = pixels.shape[:2]
        into = ctypes.addressof(data), ctypes.addressof(size)
        status = compress(("tjCompress2", library))(
            handle, pixels.ctypes.data, width, 0, height, 0, *into, subsampling, 83, flags
        )
        assert status == 0
        return ctypes.string_at(data.value or 0, size.value)
    finally:
        ctypes.CFUNCTYPE(None, pointer)(("tjFree", library))(data.value)
        library.tjDestroy(handle)


def jpegs() -> list[tuple[bytes, int, int]]:
    """(bytes, width, height) of every subsampling, order of scans and odd size."""
    found = []
    for number, ((width, height), subsampling, flags) in enumerate(product(SIZES, range(6), (0, PROGRESSIVE))):
        found.append((by_turbo(made_pixels(number, height, width), subsampling, flags), width, height))
    for number, options in enumerate(
        ({"keep_rgb": True}, {"restart_marker_blocks": 2}, {"quality": 1}, {"quality": 100, "optimize": True})
    ):
        file = io.BytesIO()
        made_image(number, 61, 47).save(file, "JPEG", **options)
        found.append((file.getvalue(), 61, 47))
    return found


def ended_early() -> list[tuple[bytes, int, int]]:
    """Progressive JPEGs that end between two scans: libjpeg-turbo smooths them, each version in its own way."""
    file = io.BytesIO()
    made_image(5, 90, 70).save(file, "JPEG", progressive=True, quality=40)
    data = file.getvalue()
    tables = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xc4"]
    return [(data[:place] + b"\xff\xd9", 90, 70) for place in tables if b"\xff\xda" in data[:place]]


@needs_ffcv
def test_turbo_makes_what_pillow_makes_to_the_bit():
    for data, width, height in jpegs():
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        pixels = turbo_decode(data, width, height)
        assert pixels is not None
        assert (pixels == expected).all()


@needs_ffcv
def test_the_engines_make_the_same_views_of_any_jpeg(tmp_path):
    """To the bit; what neither takes, four inks, fails on both."""
    stored = jpegs() + ended_early()
    file = io.BytesIO()
    made_image(3, 50, 40).convert("CMYK").save(file, "JPEG")
    stored.append((file.getvalue(), 50, 40))
    path = write_beton(
        tmp_path / "any.beton", [data for data, *_ in stored], [(width, height) for _, width, height in stored]
    )
    settings, found = ViewSettings(image_size=32, patch_size=8), []
    for engine in ("ffcv", "torch"):
        with PairedViews(path, len(stored), engine, settings, shuffle=False, bad_fraction=1.0) as views:
            found.append(next(iter(views)))
    ours, pillows = found
    assert ours.failed == pillows.failed == [len(stored) - 1]
    assert (ours.simple == pillows.simple).all()
    assert (ours.complex == pillows.complex).all()


@needs_ffcv
def test_decoders_are_lent_again_and_freed():
    decoders = TurboDecoders()
    with decoders.lend() as first, decoders.lend() as second:
        assert first != second
    with decoders.lend() as again:
        assert again in (first, second)
    handles = decoders._made
    assert len(handles) == 2
    del decoders
    assert handles == []


def test_the_decoder_is_found_in_ffcv_alone(monkeypatch):
    monkeypatch.setattr(jpeg.importlib.util, "find_spec", lambda name: None)
    jpeg._turbo.cache_clear()
    try:
        assert not turbo_available()
        with pytest.raises(RuntimeError, match="not installed"):
            TurboDecoders()
        with pytest.raises(RuntimeError, match="not installed"):
            turbo_decode(b"", 1, 1)
    finally:
        jpeg._turbo.cache_clear()


def test_scans_are_counted_in_the_image_alone():
    """Up to the limit all is taken; a thumbnail's scans and bytes that look like one do not count."""
    most = progressive_bomb(16, SCAN_LIMIT - 1)  # and its first, of the means
    check_scans(most)
    assert Image.open(io.BytesIO(most)).convert("RGB").getextrema() == ((128, 128),) * 3
    with pytest.raises(BetonError, match=f"more than {SCAN_LIMIT} scans"):
        check_scans(progressive_bomb(16, SCAN_LIMIT))
    file = io.BytesIO()
    made_image(3, 50, 40).save(file, "JPEG", comment=b"\xff\xda" * 2000)
    check_scans(file.getvalue())
    behind = file.getvalue() + progressive_bomb(16, 2000)  # a second picture, which nobody decodes
    check_scans(behind)
    check_scans(b"\xff\xda" * 2000)  # all one segment
    check_scans(b"\xff\xd8" + b"\xff\xda\xff" * 2000)


@pytest.mark.parametrize("engine", ["torch", FFCV, "dali"])
def test_a_bomb_of_scans_is_a_bad_image_on_every_engine(tmp_path, engine):
    if engine == "dali":
        pytest.importorskip("nvidia.dali")
    side, good = 1600, io.BytesIO()
    made_image(0, 32, 32).save(good, "JPEG")
    bomb = progressive_bomb(side, 3000)
    path = write_beton(tmp_path / "bomb.beton", [bomb, good.getvalue()], [(side, side), (32, 32)])
    settings = ViewSettings(image_size=32, patch_size=8)
    with PairedViews(path, 2, engine, settings, shuffle=False, bad_fraction=1.0) as views:
        assert next(iter(views)).failed == [0]
    with pytest.raises(BetonError, match="sample 0: the JPEG has more than 500 scans"):
        Beton(path).decode(0)
