"""Sets of images with dense labels, whatever files they came in."""

from pathlib import Path

import numpy as np

from fastpmae.evaluate.dense.labelled import IGNORE, Boxed, Detection, Masked, Objects, Segmentation


def masked(name: str, digest: str = "") -> Masked:
    return Masked(name, lambda: (np.zeros((2, 3, 3), np.uint8), np.full((2, 3), IGNORE, np.int16)), digest)


def boxed(name: str, *boxes: tuple[float, float, float, float]) -> Boxed:
    count = len(boxes)
    found = Objects(
        np.array(boxes, np.float32).reshape(-1, 4), np.ones(count, np.int64), np.zeros(count, bool), np.ones(count)
    )
    return Boxed(name, 8, 9, found, lambda: np.zeros((8, 9, 3), np.uint8))


def test_a_segmentation_set_is_told_by_its_masks_and_not_by_its_place():
    one = Segmentation(Path("a"), ("sky", "road"), (masked("1.png", "x"),)).describe()
    same = Segmentation(Path("b"), ("sky", "road"), (masked("1.png", "x"),)).describe()
    others = [
        Segmentation(Path("a"), ("sky", "tree"), (masked("1.png", "x"),)).describe(),
        Segmentation(Path("a"), ("sky", "road"), (masked("1.png", "y"),)).describe(),
        Segmentation(Path("a"), ("sky", "road"), (masked("1.png", "x"), masked("2.png", "x"))).describe(),
    ]
    assert one["fingerprint"] == same["fingerprint"]
    assert len({one["fingerprint"], *(other["fingerprint"] for other in others)}) == 4
    assert (one["images"], others[2]["images"]) == (1, 2)


def test_a_detection_set_is_told_by_its_boxes():
    one = Detection(Path("a"), ("cell",), (boxed("1.png", (0, 0, 4, 4)), boxed("2.png"))).describe()
    same = Detection(Path("b"), ("cell",), (boxed("1.png", (0, 0, 4, 4)), boxed("2.png"))).describe()
    other = Detection(Path("a"), ("cell",), (boxed("1.png", (0, 0, 4, 5)), boxed("2.png"))).describe()
    assert one["fingerprint"] == same["fingerprint"] != other["fingerprint"]
    assert (one["images"], one["boxes"]) == (2, 1)
