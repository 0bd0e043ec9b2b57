"""The demo's images, and the whole of `make train` on a few of them."""

import random
import re
import socket
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastpmae.demo.demo
import fastpmae.photographs as photographs
from fastpmae.config_file import read_config
from fastpmae.demo.demo import demo, fitting, usable_device, write_demo_betons
from fastpmae.photographs import PHOTOGRAPHS, crop_boxes, open_photograph, validation_cells, write_demo_images
from fastpmae.presets import PRESETS
from fastpmae_loaders import Beton
from fastpmae_loaders.errors import UserError


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """scikit-image would download what its wheel does not hold."""

    def refuse(*_):
        raise AssertionError("the demo opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_train_and_validation_share_no_pixel(name):
    size = open_photograph(name).size
    assert min(size) == 512
    numbers = random.Random(1)
    taken = {part: np.zeros(size[::-1], bool) for part in ("train", "validation")}
    for part, marked in taken.items():
        for left, top, right, bottom in crop_boxes(size, part, 300, numbers):
            assert min(left, top) >= 0
            assert right <= size[0]
            assert bottom <= size[1]
            assert 96 <= right - left <= 128
            assert 96 <= bottom - top <= 128
            marked[top:bottom, left:right] = True
    assert not (taken["train"] & taken["validation"]).any()
    # both parts have room: every validation cell is used, and most of the rest
    assert len(validation_cells(size)) == 4
    assert taken["train"].mean() > 0.35
    assert taken["validation"].mean() > 0.1


def test_the_same_crops_everywhere():
    # the numbers are Python's own Mersenne twister, the same on every machine
    assert list(crop_boxes((770, 512), "train", 2, random.Random("cat"))) == BOXES_OF_CAT
    assert list(crop_boxes((512, 512), "validation", 2, random.Random("moon"))) == BOXES_OF_MOON


BOXES_OF_CAT = [(641, 355, 762, 475), (74, 65, 177, 186)]
BOXES_OF_MOON = [(146, 11, 248, 126), (396, 131, 503, 234)]


@pytest.mark.slow
def test_images_are_labelled_jpegs_and_the_same_each_time(tmp_path):
    write_demo_images(tmp_path / "one", train=3, validation=2)
    write_demo_images(tmp_path / "two", train=3, validation=2)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.jpg"))
    assert Counter(path.parts[:2] for path in files) == {
        (part, name): count for part, count in (("train", 3), ("validation", 2)) for name in PHOTOGRAPHS
    }
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
        with Image.open(tmp_path / "one" / path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert np.asarray(image).shape[2] == 3


def test_a_gpu_that_cannot_be_used_leaves_the_cpu(monkeypatch, capsys):
    assert usable_device() == "auto"
    assert capsys.readouterr() == ("", "")

    def refuse(device):
        raise UserError("Triton needs a C compiler")

    monkeypatch.setattr(fastpmae.demo.demo, "choose_device", refuse)
    assert usable_device() == "cpu"
    assert "on the CPU, since Triton needs a C compiler" in "".join(capsys.readouterr())


def test_a_photograph_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(photographs.PHOTOGRAPHS, "cat", ("skimage", "data/no_such.png"))
    with pytest.raises(UserError, match=r"skimage/data/no_such.png is not installed"):
        open_photograph("cat")
    monkeypatch.setitem(photographs.PHOTOGRAPHS, "cat", ("no_such_package", "cat.png"))
    with pytest.raises(UserError, match="no_such_package"):
        open_photograph("cat")


@pytest.fixture
def few(monkeypatch):
    """Eight training crops of each photograph: two steps an epoch."""
    monkeypatch.setattr(fastpmae.demo.demo, "write_demo_images", lambda folder: write_demo_images(folder, 8, 3))


@pytest.mark.slow
def test_betons_are_written_once_and_labelled(few, tmp_path):
    train, validation = write_demo_betons(tmp_path)
    for path, count in ((train, 8), (validation, 3)):
        beton = Beton(path)
        assert beton.class_names == sorted(PHOTOGRAPHS)
        assert Counter(beton.label.tolist()) == dict.fromkeys(range(16), count)
    before = train.stat().st_mtime_ns
    write_demo_betons(tmp_path)
    assert train.stat().st_mtime_ns == before
    validation.unlink()  # a demo that was cut off between the two
    assert write_demo_betons(tmp_path)[1].exists()


@pytest.mark.slow
def test_the_whole_demo_and_a_second_one(few, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "demo", PRESETS["demo"].using(epochs=2, pixel_epochs=1, batch_size=64))
    demo(steps=4)
    printed = capfd.readouterr().out
    for words in (
        "L_m, reconstruction of pixels", "L_m, reconstruction of tokens", "L_c, class labels",
        "L_p, patch labels", "pretrained, class token", "after the first epoch, class token", "random start",
    ):  # fmt: skip
        assert words in printed
    assert re.search(r"chance\s*│\s*6\.2%", printed)
    assert re.search(r"\d+ images/s", printed)
    (first,) = (tmp_path / "runs").iterdir()
    assert f"The run lies in runs/{first.name}" in printed
    assert len(list((first / "checkpoints").iterdir())) >= 1
    demo(steps=2)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_slow_machine_trains_for_fewer_epochs() -> None:
    """43 epochs of pixels and 7 of teachers, at 1,000 images/s: 42 and 2 x 7 times 1,000 images after the first."""
    config, rows = (
        PRESETS["demo"].using(epochs=50),
        [{"images_per_second": rate} for rate in (1.0, 100.0, 1000.0, 1000.0, 5000.0)],
    )
    assert fitting(config, 1000, rows, 56.0) == config
    assert fitting(config, 1000, rows, 55.9).optimizer.epochs < 50
    short = fitting(config, 1000, rows, 10.0)
    assert short == config.using(epochs=10)  # 9 of pixels and one of teachers: 8 + 2 seconds
    assert fitting(config, 1000, rows, 1.0) == config  # it will be cut off


@pytest.mark.slow
def test_a_demo_with_less_time_ends_its_schedule(few, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "demo", PRESETS["demo"].using(epochs=2000, batch_size=64))
    demo(out=Path("run"), minutes=0.5)
    printed = "".join(capfd.readouterr())
    told = re.search(r"demo: (\d+) epochs instead of 2000, as many as this machine has time for", printed)
    assert told, printed
    assert "resumed with a changed setting: --epochs was 2000 and is now" in printed
    assert read_config(Path("run/config.json")).optimizer.epochs == int(told[1])


@pytest.mark.slow
def test_the_demo_ends_in_time_and_still_sums_up(few, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "demo", PRESETS["demo"].using(epochs=10_000, batch_size=64))
    began = time.monotonic()
    demo(out=Path("run"), minutes=0.05)
    assert time.monotonic() - began < 240
    printed = capfd.readouterr().out
    assert "stopped after 0.067 minutes; `fastpmae-train --resume run` continues it" in printed
    assert "pretrained, class token" in printed
