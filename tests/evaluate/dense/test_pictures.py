"""Pictures of masks and boxes: which boxes count as right, and that names cannot break them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastpmae.evaluate.dense.average_precision import Found
from fastpmae.evaluate.dense.box_pictures import Sight, draw_boxes
from fastpmae.evaluate.dense.labelled import Objects
from fastpmae.evaluate.dense.mask_pictures import Overlay, best_median_worst, class_colours, write_overlays
from fastpmae.evaluate.dense.matches import matches_of
from tests.evaluate.dense.made import detection, scene


def test_colours_differ():
    assert len(np.unique(class_colours(150), axis=0)) == 150


def test_each_object_is_found_once_by_the_surest_box():
    boxes = np.array([[0, 0, 10, 10], [20, 20, 40, 40]], np.float32)
    objects = Objects(boxes, np.array([1, 2]), np.zeros(2, bool), np.array([100.0, 400.0]))
    # the first object twice, the surer box not the closer one, the second as another class, and one in the void
    answers = np.array([[0, 0, 10, 9], [1, 0, 10, 10], [20, 20, 40, 40], [60, 60, 80, 80]], np.float32)
    found = Found(answers[[1, 0, 3, 2]], [1, 1, 2, 1], [0.8, 0.9, 0.6, 0.7])
    matches = matches_of(objects, found)
    assert matches.shown.tolist() == [1, 0, 3, 2]
    assert matches.found.tolist() == [True, False]
    assert matches.right.tolist() == [True, False, False, False]
    assert matches.f1 == pytest.approx(100 * 2 / (2 + 4))


def test_a_crowd_is_no_miss_and_what_lies_in_it_no_false_alarm():
    boxes = np.array([[0, 0, 10, 10], [20, 20, 60, 60]], np.float32)
    objects = Objects(boxes, np.array([1, 1]), np.array([False, True]), np.array([100.0, 1600.0]))
    # in the crowd, of another class in the crowd, half of it in the crowd, and of a score that is not shown
    answers = np.array([[0, 0, 10, 10], [30, 30, 40, 40], [30, 30, 40, 40], [15, 30, 24, 40], [0, 0, 5, 5]], np.float32)
    matches = matches_of(objects, Found(answers, [1, 1, 2, 1, 1], [0.9, 0.8, 0.7, 0.6, 0.29]))
    assert matches.right.tolist() == [True, False, False, False]
    assert matches.in_crowd.tolist() == [False, True, False, False]
    assert matches.f1 == pytest.approx(100 * 2 / (1 + 3))
    nothing = Objects(boxes[:0], np.array([], np.int64), np.array([], bool), np.array([]))
    assert np.isnan(matches_of(nothing, Found(answers[:0], [], [])).f1)
    assert matches_of(nothing, Found(answers[:1], [1], [0.9])).f1 == 0


def test_best_median_and_worst():
    assert best_median_worst(np.array([3.0, np.nan, 9.0, 1.0, 5.0])) == {"best": 2, "median": 4, "worst": 3}
    assert best_median_worst(np.array([3.0])) == {"best": 0}
    assert best_median_worst(np.array([np.nan, np.nan])) == {"first": 0}


def test_pictures(tmp_path: Path):
    pixels, mask, _ = scene(0)
    names = ("$\\frac", "sky\x1b[31m", "森林")
    shown = [Overlay("best, 90 %", pixels, mask.clip(0), mask), Overlay("worst, $", pixels, np.zeros_like(mask), mask)]
    write_overlays(tmp_path / "masks.png", shown, names, "segment: $")
    entry = detection(1).entries[0]
    found = Found(entry.objects.boxes + 1, entry.objects.labels.tolist(), [0.9, 0.1])
    draw_boxes(tmp_path / "boxes.png", [Sight("median", pixels, found, entry.objects)], names[:2], "detect")
    # of a user's own images, whose truth nobody knows
    write_overlays(tmp_path / "own-masks.png", [Overlay("a.jpg", pixels, mask.clip(0))], names, "segment")
    draw_boxes(tmp_path / "own-boxes.png", [Sight("a.jpg", pixels, found)], names[:2], "detect")
    for name in ("masks.png", "boxes.png", "own-masks.png", "own-boxes.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 500


@pytest.mark.parametrize(("height", "width"), [(20_000, 1), (1, 20_000), (900, 5)])
def test_thin_images_make_no_giant_picture(tmp_path: Path, height: int, width: int):
    pixels, mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.int16)
    write_overlays(tmp_path / "masks.png", [Overlay("a", pixels, mask, mask)] * 3, ("a", "b"), "three")
    found = Found(np.zeros((0, 4), np.float32), [], [])
    draw_boxes(tmp_path / "boxes.png", [Sight("a", pixels, found)] * 3, ("a", "b"), "three")
    for name in ("masks.png", "boxes.png"):
        with Image.open(tmp_path / name) as picture:
            assert max(picture.size) < 4000
