"""The bilinear crop against Pillow's own, bit for bit, as bytes and through every engine that shares it."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from fastpmae_loaders import Beton, PairedViews, PlainViews, UserError, View, mae_view, plain_view
from fastpmae_loaders.engines.scratch import make_scratch
from fastpmae_loaders.pixels.bilinear import resize_bilinear
from tests.engines import FFCV
from tests.loaders.files import photographs
from tests.loaders.pixels.test_resize import any_box, random_box

BILINEAR = Image.Resampling.BILINEAR


def ours(image, box, side, flip=False):
    height, width = image.shape[:2]
    out = np.zeros((3, side, side), np.uint8)
    # what is never written must never be read
    scratch = make_scratch(height, width, side)
    for part in scratch:
        part.view(np.uint8)[:] = 0xA5
    resize_bilinear(image.ctypes.data, height, width, np.array(box, np.int32), side, side, 0, 0, flip, out, scratch)
    return out.transpose(1, 2, 0)


def pillows(image, box, side, flip=False):
    """Pillow's two passes in the order of Pillow 13, whichever Pillow is here: older ones always go across first."""
    top, left, height, width = box
    crop = Image.fromarray(image[top : top + height, left : left + width])
    between = (width, side) if height - side > max(0, 2 * (width - side)) else (side, height)
    out = np.array(crop.resize(between, BILINEAR).resize((side, side), BILINEAR))
    return out[:, ::-1] if flip else out


@settings(max_examples=150, deadline=None)
@any_box(120)
def test_any_box_to_any_side(image, box, side, flip):
    assert (ours(image, box, side, flip) == pillows(image, box, side, flip)).all()


def test_far_down():
    image = np.random.default_rng(0).integers(0, 256, (1300, 1290, 3), dtype=np.uint8)
    for part, box in ((image, (0, 0, 1300, 1290)), (image[:, :40].copy(), (0, 0, 1300, 40))):
        assert (ours(part, box, 32) == pillows(part, box, 32)).all()


def test_photographs_are_torchvisions():
    """`resized_crop` on a PIL image, which is what RandomResizedCrop does with its box."""
    rng = np.random.default_rng(3)
    for image in photographs("imagenet_sample_400", 12):
        for side in (224, 96):
            box = random_box(rng, *image.shape[:2])
            crop = F.resized_crop(Image.fromarray(image), *box, [side, side], InterpolationMode.BILINEAR)  # type: ignore[arg-type]
            direct = np.array(crop)
            expected = pillows(image, box, side)
            # a Pillow before 13 has one order of the passes alone
            assert (direct == expected).all() or int(Image.__version__.split(".")[0]) < 13
            assert (ours(image, box, side) == expected).all()


@pytest.mark.parametrize("engine", ["native", FFCV, "torch"])
def test_a_loaders_views_are_pillows(engine, mixed):
    """Each image decoded by Pillow, cropped and resized by Pillow; bilinear beside bicubic from one decode."""
    beton = Beton(mixed)
    views = [mae_view(32, interpolation="bilinear"), mae_view(32), View(20, flip=1.0, interpolation="bilinear")]
    with PairedViews(beton, 23, engine, views=views, seed=5, drop_last=False) as loader:
        (batch,) = loader
    for row, index in enumerate(batch.index.tolist()):
        payload = beton.payload(index)
        if beton.mode[index] == 1:
            image = payload.reshape(beton.height[index], beton.width[index], 3)
        elif engine == "torch":
            image = np.array(Image.open(io.BytesIO(payload.tobytes())))
        else:
            continue  # FFCV's decoder is another
        for view in (0, 2):
            box, flip = batch.boxes[row, view].tolist(), bool(batch.flips[row, view])
            expected = pillows(image, box, views[view].size, flip)
            assert (batch.views[view][row].permute(1, 2, 0).numpy() == expected).all(), (index, view)
    assert not torch.equal(batch.views[0], batch.views[1])


def test_evaluation_may_be_bilinear(mixed):
    beton = Beton(mixed)
    with PlainViews(mixed, 23, 24, engine="torch", interpolation="bilinear") as loader:
        ((images, _, _index),) = loader
    assert plain_view(24, interpolation="bilinear").interpolation == "bilinear"
    for row in np.flatnonzero(beton.mode == 1):
        image = beton.payload(int(row)).reshape(beton.height[row], beton.width[row], 3)
        # torchvision: the shorter side is round(24 / 0.875), the centre's half pixel goes to the even side
        short = round(24 / 0.875)
        picture: Any = Image.fromarray(image)
        expected = np.array(F.center_crop(F.resize(picture, [short], InterpolationMode.BILINEAR), [24, 24]))
        assert (images[row].permute(1, 2, 0).numpy() == expected).all()


@pytest.mark.untyped
def test_other_filters_are_refused():
    with pytest.raises(UserError, match="interpolation is 'lanczos'; expected 'bicubic' or 'bilinear'"):
        View(interpolation="lanczos")  # type: ignore[arg-type]
