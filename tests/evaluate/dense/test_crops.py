"""Training crops: image and mask stay together, draws depend on (seed, epoch, sample) alone."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from fastpmae.evaluate.dense.crops import nearest_part, recoloured, resized_part, segmentation_crop, whole_image
from fastpmae.evaluate.dense.labelled import IGNORE
from fastpmae.evaluate.dense.recipe import SegmentConfig

CONFIG = SegmentConfig(
    iterations=10, warmup_iterations=0, crop_size=32, short_side=40, photometric=False, cat_max_ratio=1.0
)
MEAN = (0.5, 0.25, 0.75)


def labelled_image(height: int = 48, width: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """An image whose colours are its mask: four quarters."""
    mask = np.zeros((height, width), np.int16)
    mask[height // 2 :] += 2
    mask[:, width // 2 :] += 1
    pixels = np.stack([60 * mask, 255 - 60 * mask, np.full_like(mask, 40)], axis=2).astype(np.uint8)
    return pixels, mask


def test_a_part_is_what_the_whole_resized_image_shows_there():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    for size in ((30, 45), (120, 180), (60, 90)):
        whole = np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR)).astype(int)
        part = resized_part(pixels, size, 6, 9, 20, 24)
        # at the part's own edges Pillow's filter sees nothing beyond
        difference = np.abs(part[3:-3, 3:-3].astype(int) - whole[9:23, 12:30])
        assert difference.max() <= 2


def test_the_nearest_pixel_of_a_mask_is_pillows():
    mask = np.random.default_rng(0).integers(0, 9, (50, 70)).astype(np.int16)
    for size in ((25, 35), (100, 140), (34, 92)):
        truth = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize((size[1], size[0]), Image.Resampling.NEAREST))
        assert np.array_equal(nearest_part(mask, size, 0, 0, *size), truth)
        assert np.array_equal(nearest_part(mask, size, 3, 4, 10, 12), truth[3:13, 4:16])


@pytest.mark.parametrize("seed", range(8))
def test_mask_and_image_stay_together(seed: int):
    pixels, mask = labelled_image()
    image, target = segmentation_crop(pixels, mask, CONFIG, MEAN, np.random.default_rng(seed))
    assert image.shape == (3, 32, 32)
    labels = target.numpy()
    inside = labels != IGNORE
    # borders between the quarters are blurred
    wrong = np.abs(image[0].numpy().astype(int) - 60 * labels)[inside] > 30
    assert wrong.mean() < 0.12
    for channel, mean in zip(image.numpy(), MEAN, strict=True):
        assert (channel[~inside] == round(255 * mean)).all()


def test_what_is_drawn_covers_scales_flips_and_places():
    pixels, mask = labelled_image()
    found = {
        (bytes(target.numpy().tobytes()), image.numpy().tobytes())
        for image, target in (
            segmentation_crop(pixels, mask, CONFIG, MEAN, np.random.default_rng(s)) for s in range(20)
        )
    }
    assert len(found) > 15
    again = [segmentation_crop(pixels, mask, CONFIG, MEAN, np.random.default_rng(3))[0] for _ in range(2)]
    assert torch.equal(*again)


def test_a_crop_of_one_class_is_drawn_again():
    """A quarter of a percent of another class: without the rule nearly every crop is of one class alone."""
    mask = np.zeros((200, 200), np.int16)
    mask[:40] = 1
    pixels = np.zeros((200, 200, 3), np.uint8)
    config = dataclasses.replace(CONFIG, short_side=0, scale=(1.0, 1.0))
    alone = {}
    for ratio in (0.75, 1.0):
        rule = dataclasses.replace(config, cat_max_ratio=ratio)
        targets = [segmentation_crop(pixels, mask, rule, MEAN, np.random.default_rng(s))[1] for s in range(40)]
        alone[ratio] = sum(len(target.unique()) == 1 for target in targets)
    assert alone[0.75] < 0.6 * alone[1.0]


def test_void_alone_is_no_error():
    pixels, mask = labelled_image()
    _, target = segmentation_crop(pixels, np.full_like(mask, IGNORE), SegmentConfig(), MEAN, np.random.default_rng(0))
    assert bool((target == IGNORE).all())


def test_colours_change_within_ssds_ranges():
    planes = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    results = [recoloured(planes, np.random.default_rng(seed)) for seed in range(30)]
    assert all(result.dtype == torch.uint8 and result.shape == planes.shape for result in results)
    assert sum(torch.equal(result, planes) for result in results) < 10
    means = torch.stack([result.float().mean() for result in results])
    assert means.std() > 1


def test_test_images_are_resized_by_their_shorter_side():
    pixels, _ = labelled_image(50, 100)
    assert whole_image(pixels, 25, 0).shape == (3, 25, 50)
    assert whole_image(pixels, 40, 60).shape == (3, 30, 60)
    assert torch.equal(whole_image(pixels, 0, 0), torch.from_numpy(pixels.transpose(2, 0, 1).copy()))
