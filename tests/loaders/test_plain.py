import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from fastpmae_loaders import Beton, PlainViews, UserError
from tests.engines import FFCV
from tests.loaders.files import made_pixels, photographs, write_beton


def torchvisions(image: np.ndarray, side: int, shorter: int) -> np.ndarray:
    resized = Resize(shorter, InterpolationMode.BICUBIC)(Image.fromarray(image))
    return np.array(CenterCrop(side)(resized)).transpose(2, 0, 1)


@pytest.mark.parametrize("engine", ["native", FFCV, "torch"])
@pytest.mark.parametrize(("side", "ratio"), [(32, 0.875), (33, 1.0), (48, 0.7)])
def test_made_images_are_torchvisions(tmp_path, engine, side, ratio):
    sizes = [(64, 64), (37, 90), (90, 37), (20, 21), (300, 200), (33, 33), (101, 33), (5, 3)]
    images = [made_pixels(number, *size) for number, size in enumerate(sizes)]
    file = write_beton(tmp_path / "made.beton", images)
    with PlainViews(file, 3, image_size=side, crop_ratio=ratio, engine=engine) as views:
        assert len(views) == 3
        batches = list(views)
    assert [len(batch[0]) for batch in batches] == [3, 3, 2]
    found = torch.cat([images for images, _, _ in batches]).numpy()
    assert torch.cat([index for _, _, index in batches]).tolist() == list(range(8))
    assert torch.cat([label for _, label, _ in batches]).tolist() == list(range(0, 80, 10))
    for ours, image in zip(found, images, strict=True):
        difference = np.abs(ours.astype(int) - torchvisions(image, side, math.floor(side / ratio)))
        assert difference.max() <= 2, image.shape
        assert difference.mean() <= 0.25


@pytest.mark.parametrize(("side", "ratio"), [(32, 0.9), (48, 0.95), (64, 0.9), (57, 0.875), (63, 0.97), (32, 1.0)])
def test_whole_images_are_timms(tmp_path, side, ratio):
    """As its validation makes them, where size / crop_pct is no whole number too (and would round up)."""
    transform: Any = create_transform(side, interpolation="bicubic", crop_pct=ratio, mean=(0, 0, 0), std=(1, 1, 1))
    images = [made_pixels(number, *size) for number, size in enumerate([(91, 64), (64, 110), (300, 201), (40, 40)])]
    file = write_beton(tmp_path / "made.beton", images)
    with PlainViews(file, 4, image_size=side, crop_ratio=ratio, engine="torch") as views:
        ((found, _, _),) = views
    for ours, image in zip(found, images, strict=True):
        difference = (ours - 255 * transform(Image.fromarray(image))).abs()
        assert difference.max() <= 2, image.shape
        assert difference.mean() <= 0.25


def test_photographs_are_torchvisions(tmp_path):
    images = photographs("imagenet_sample_400", 8)
    file = write_beton(tmp_path / "photographs.beton", images, page_size=1 << 25)
    with PlainViews(file, 8) as views:
        ((found, _, _),) = views
    for ours, image in zip(found.numpy(), images, strict=True):
        difference = np.abs(ours.astype(int) - torchvisions(image, 224, 256))
        assert difference.max() <= 2
        assert difference.mean() <= 0.25


@pytest.mark.parametrize("engine", ["native", FFCV, "torch"])
def test_a_broken_image_is_named_not_replaced(broken, engine):
    with PlainViews(broken, 50, image_size=32, engine=engine) as views, pytest.raises(UserError, match="sample 5 "):
        list(views)


def test_iterates_again_and_leaves_early(mixed):
    with PlainViews(Beton(mixed), 4, image_size=32, workers=3) as views:
        for _ in views:
            break
        first = [images for images, _, _ in views]
        again = [images for images, _, _ in views]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"batch_size": 0}, "batch_size"), ({"crop_ratio": 0.0}, "crop_ratio"), ({"image_size": 1}, "image_size")],
)
def test_arguments_that_do_not_fit(mixed, wrong, said):
    with pytest.raises(UserError, match=said):
        PlainViews(mixed, **{"batch_size": 4, **wrong})
