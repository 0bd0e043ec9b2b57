"""Training images of detection: boxes and outlines stay on what they are of, crowds and slivers are left out."""

import dataclasses

import numpy as np
import pytest

from fastpmae.evaluate.dense.labelled import Boxed, Objects
from fastpmae.evaluate.dense.recipe import DetectConfig
from fastpmae.evaluate.dense.scenes import detection_scene

RESIZED = DetectConfig(short_sides=(64, 128), long_side=256)
CROPPED = dataclasses.replace(RESIZED, crop_size=96, scale=(0.5, 2.0))


def entry(crowd: bool = False) -> Boxed:
    """A white rectangle on black, 80 x 120, with its outline; perhaps a crowd beside it."""
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[20:60, 30:90] = 255
    boxes = np.array([[30, 20, 90, 60], [0, 0, 10, 10]], np.float32)
    outlines = np.zeros((2, 80, 120), bool)
    outlines[0, 20:60, 30:90] = outlines[1, :10, :10] = True
    objects = Objects(boxes, np.array([2, 1]), np.array([False, crowd]), np.array([2400.0, 100.0]), lambda: outlines)
    return Boxed("one.png", 80, 120, objects, lambda: pixels)


@pytest.mark.parametrize("config", [RESIZED, CROPPED])
@pytest.mark.parametrize("seed", range(6))
def test_boxes_and_outlines_follow_the_image(config: DetectConfig, seed: int):
    scene = detection_scene(entry(crowd=True), config, np.random.default_rng(seed), masks=True)
    assert scene.masks is not None
    assert len(scene.boxes) == len(scene.labels) == len(scene.masks) <= 1
    if len(scene.boxes) == 0:  # a crop beside it
        assert scene.image.max() < 255 or config.crop_size
        return
    assert scene.labels.tolist() == [2]
    white = scene.image[0].numpy() > 127
    rows, columns = np.nonzero(white)
    truth = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(scene.boxes[0].numpy() - truth).max() <= 1.5
    assert (scene.masks[0].numpy().astype(bool) != white).mean() < 0.03
    assert scene.masks.shape[1:] == scene.image.shape[1:]
    if config.crop_size:
        assert max(scene.image.shape[1:]) <= 96
    else:
        assert min(scene.image.shape[1:]) in (64, 96, 128)


def test_without_masks_none_are_read():
    scene = detection_scene(entry(), RESIZED, np.random.default_rng(0), masks=False)
    assert scene.masks is None
    assert sorted(scene.labels.tolist()) == [1, 2]
    assert set(scene.target) == {"boxes", "labels"}


def test_an_image_without_boxes_is_a_scene():
    nothing = Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0))
    scene = detection_scene(
        dataclasses.replace(entry(), objects=nothing), RESIZED, np.random.default_rng(0), masks=False
    )
    assert scene.boxes.shape == (0, 4)
    assert scene.labels.shape == (0,)
