import ctypes
import mmap
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastpmae_loaders.engines.scratch import make_scratch
from fastpmae_loaders.pixels.resize import resize
from tests.loaders.files import photographs

BICUBIC = Image.Resampling.BICUBIC


def ours(image, box, side, flip=False, address=None):
    height, width = image.shape[:2]
    out = np.zeros((3, side, side), np.uint8)
    scratch = make_scratch(height, width, side)
    pixels = image.ctypes.data if address is None else address
    resize(pixels, height, width, np.array(box, np.int32), side, side, 0, 0, flip, out, scratch)
    return out.transpose(1, 2, 0)


def pillows(image, box, side, flip=False):
    """Pillow's two passes in the order of Pillow 13, whichever Pillow is here: older ones always go across first."""
    top, left, height, width = box
    crop = Image.fromarray(image[top : top + height, left : left + width])
    if height - side > max(0, 2 * (width - side)):
        crop = crop.resize((width, side), BICUBIC).resize((side, side), BICUBIC)
    else:
        crop = crop.resize((side, height), BICUBIC).resize((side, side), BICUBIC)
    out = np.array(crop)
    return out[:, ::-1] if flip else out


def check(image, box, side, flip=False):
    difference = np.abs(ours(image, box, side, flip).astype(int) - pillows(image, box, side, flip))
    assert difference.max() <= 2, (image.shape, box, side)
    # a mean says something from the smallest patch on: of a single pixel's three numbers one may round apart
    if side >= 8:
        assert difference.mean() <= 0.25


def random_box(rng, height, width):
    h, w = rng.integers(1, height + 1), rng.integers(1, width + 1)
    return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), int(h), int(w)


def any_box(longest):
    """Calls a test with an image of up to `longest` pixels a side, noise of all values or two, a box, side and flip."""

    def decorator(test):
        @given(
            height=st.integers(1, longest),
            width=st.integers(1, longest),
            side=st.integers(1, 70),
            seed=st.integers(0, 2**32 - 1),
            flip=st.booleans(),
            hard=st.booleans(),
        )
        def given_one(height, width, side, seed, flip, hard):
            rng = np.random.default_rng(seed)
            image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            if hard:
                image = np.where(image > 127, 255, 0).astype(np.uint8)
            test(image, random_box(rng, height, width), side, flip)

        return given_one

    return decorator


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet_sample_400", "tiny_imagenet_20"])
def test_photographs_are_pillows_within_two(name):
    rng = np.random.default_rng(0)
    means = []
    for image in photographs(name, 24):
        height, width = image.shape[:2]
        for side in (224, 96):
            whole = (0, 0, height, width)
            for flip, box in (
                (False, whole),
                (True, random_box(rng, height, width)),
                (False, random_box(rng, height, width)),
            ):
                check(image, box, side, flip)
                means.append(np.abs(ours(image, box, side, flip).astype(int) - pillows(image, box, side, flip)).mean())
    assert np.mean(means) < 0.05  # far inside the promise, which a slip in a weight would not be


def test_the_pass_order_is_this_pillows():
    """From Pillow 13 on the plain call is compared, not our knowledge of it."""
    import PIL

    if int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 always goes across first")
    rng = np.random.default_rng(5)
    for _ in range(60):
        height, width = rng.integers(20, 200, 2)
        image = (rng.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)
        direct = np.array(Image.fromarray(image).resize((64, 64), BICUBIC))
        assert np.abs(ours(image, (0, 0, height, width), 64).astype(int) - direct).max() <= 2


@settings(max_examples=80, deadline=None)
@any_box(90)
def test_any_box_to_any_side(image, box, side, flip):
    check(image, box, side, flip)


def test_far_down():
    """Forty times smaller: more than a hundred and sixty weights a pixel."""
    image = np.random.default_rng(0).integers(0, 256, (1300, 1290, 3), dtype=np.uint8)
    check(image, (0, 0, 1300, 1290), 32)
    check(image[:, :40].copy(), (0, 0, 1300, 40), 32)


def test_flat_areas_stay_flat():
    for value in (0, 1, 127, 254, 255):
        image = np.full((97, 131, 3), value, np.uint8)
        assert (ours(image, (3, 5, 80, 100), 64) == value).all()


def test_nothing_outside_the_crop_is_seen():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    box = (10, 20, 31, 17)
    first = ours(image, box, 48)
    changed = 255 - image
    changed[10:41, 20:37] = image[10:41, 20:37]
    assert (ours(changed, box, 48) == first).all()


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
def test_no_byte_past_the_image_is_read():
    """The image ends where readable memory ends: one byte more would be a crash."""
    page = mmap.PAGESIZE
    rng = np.random.default_rng(2)
    libc = ctypes.CDLL(None, use_errno=True)
    for height, width in ((40, 50), (7, 3), (1, 1), (100, 5), (5, 100), (2, 6)):
        count = 3 * height * width
        pages = -(-count // page)
        region = mmap.mmap(-1, (pages + 1) * page)
        whole = np.frombuffer(region, np.uint8)
        start = pages * page - count
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        whole[start : start + count] = image.ravel()
        assert libc.mprotect(ctypes.c_void_p(whole.ctypes.data + pages * page), page, mmap.PROT_READ) == 0
        assert libc.mprotect(ctypes.c_void_p(whole.ctypes.data + pages * page), page, 0) == 0
        for side in (16, 40, 5):
            box = random_box(rng, height, width)
            for b in ((0, 0, height, width), box):
                assert (ours(image, b, side, address=whole.ctypes.data + start) == ours(image, b, side)).all()
        assert libc.mprotect(ctypes.c_void_p(whole.ctypes.data + pages * page), page, 3) == 0
        del whole
        region.close()
