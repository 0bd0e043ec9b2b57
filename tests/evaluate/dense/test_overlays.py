"""Pictures of masks and boxes: which images are shown, which boxes count as right, and that names cannot break them."""

from pathlib import Path

import numpy as np
from PIL import Image

from fastpmae.evaluate.dense.average_precision import Found
from fastpmae.evaluate.dense.labelled import Objects
from fastpmae.evaluate.dense.overlays import chosen, class_colours, draw_boxes, draw_masks, matched
from tests.evaluate.dense.made import detection, scene


def test_the_best_a_median_and_the_worst_image_are_shown():
    assert chosen(np.array([5.0, np.nan, 1.0, 9.0, 3.0])) == [("best", 3), ("median", 0), ("worst", 2)]
    assert chosen(np.array([4.0])) == [("best", 0)]
    assert chosen(np.array([np.nan])) == []


def test_colours_differ():
    colours = class_colours(40)
    distances = np.abs(colours[:, None] - colours[None]).sum(axis=2) + 9 * np.eye(40)
    assert distances.min() > 0.02
    assert colours.min() >= 0
    assert colours.max() <= 1


def test_each_object_is_found_once_by_the_surest_box():
    boxes = np.array([[0, 0, 10, 10], [20, 20, 40, 40]], np.float32)
    objects = Objects(boxes, np.array([1, 2]), np.zeros(2, bool), np.array([100.0, 400.0]))
    # the first object twice, the second as another class, and one in the void
    answers = np.array([[0, 0, 10, 9], [1, 0, 10, 10], [20, 20, 40, 40], [60, 60, 80, 80]], np.float32)
    found = Found(answers, [1, 1, 1, 2], [0.9, 0.8, 0.7, 0.6])
    hit, right = matched(objects, found, range(4))
    assert hit.tolist() == [True, False]
    assert right.tolist() == [True, False, False, False]


def test_pictures(tmp_path: Path):
    pixels, mask, _ = scene(0)
    names = ("$\\frac", "sky\x1b[31m", "森林")
    rows = [("best, 90 %", pixels, mask, mask.clip(0)), ("worst, 10 %", pixels, mask, np.zeros_like(mask))]
    draw_masks(tmp_path / "masks.png", rows, names, "segment: $")
    entry = detection(1).entries[0]
    found = Found(entry.objects.boxes + 1, entry.objects.labels.tolist(), [0.9, 0.1])
    draw_boxes(tmp_path / "boxes.png", [("median", pixels, entry.objects, found)], names[:2], "detect")
    for name in ("masks.png", "boxes.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 500
