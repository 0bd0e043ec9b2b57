"""The sets of `bench_learning`: what a crop's label is, and that a class has no more than it may."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.common import CAMVID
from benchmarks.learning_images import SIDE, camvid_crops, labels_of, tiny_imagenet
from fastpmae_loaders.errors import UserError


def test_the_label_is_what_more_than_half_of_the_middle_is_of():
    mask = np.full((80, 96), 11)  # void
    mask[28:36, 28:36] = 3  # the middle of the crop at (0, 0), whole
    mask[36:44, 44:48], mask[36:44, 48:52] = 5, 6  # at (8, 16), half and half
    mask[44:52, 60:65] = 8  # at (16, 32), five columns of eight
    expected = np.full((3, 5), -1)
    expected[0, 0], expected[2, 4] = 3, 8
    assert np.array_equal(labels_of(mask), expected)


def test_crops_are_drawn_alike_from_all_frames(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(3):
        pixels = np.full((72, 80, 3), 60 * number, np.uint8)
        pixels[:, 40:] += 30
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.jpg", quality=100)
        mask = np.where(np.arange(80) < 40, 1, 10)[None].repeat(72, 0)
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "masks" / f"{number}.png")
    # six places a frame, at columns 0, 8 and 16: the middle of the first is left of 40, of the second half of it
    crops = list(camvid_crops(tmp_path, 4))
    labels = [label for label, _ in crops]
    assert (labels.count(1), labels.count(10)) == (4, 4)
    assert {crop.size for _, crop in crops} == {(SIDE, SIDE)}
    assert len({crop.getpixel((0, 0)) for _, crop in crops}) == 3  # of every frame
    assert [label for label, _ in camvid_crops(tmp_path, 4)] == labels
    assert [label for label, _ in camvid_crops(tmp_path, 100)].count(1) == 6
    assert len(CAMVID) == 11


def test_a_set_that_is_not_there_gets_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.learning_images.SHARED", Path("/nowhere"))
    with pytest.raises(UserError, match=r"/nowhere/tiny_imagenet_20.tar is not there: name labelled .beton files"):
        tiny_imagenet(tmp_path)
