"""Pictures of masks and boxes: which boxes count as right, and that names cannot break them."""

from pathlib import Path

import numpy as np
from PIL import Image

from fastpmae.evaluate.dense.average_precision import Found
from fastpmae.evaluate.dense.box_pictures import draw_boxes, matched
from fastpmae.evaluate.dense.labelled import Objects
from fastpmae.evaluate.dense.mask_pictures import Overlay, class_colours, write_overlays
from tests.evaluate.dense.made import detection, scene


def test_colours_differ():
    assert len(np.unique(class_colours(150), axis=0)) == 150


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
    shown = [Overlay("best, 90 %", pixels, mask, mask.clip(0)), Overlay("worst, $", pixels, mask, np.zeros_like(mask))]
    write_overlays(tmp_path / "masks.png", shown, names, "segment: $")
    entry = detection(1).entries[0]
    found = Found(entry.objects.boxes + 1, entry.objects.labels.tolist(), [0.9, 0.1])
    draw_boxes(tmp_path / "boxes.png", [("median", pixels, entry.objects, found)], names[:2], "detect")
    for name in ("masks.png", "boxes.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 500
