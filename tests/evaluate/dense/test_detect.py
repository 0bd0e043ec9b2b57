"""Detection's training: it learns, resumes to the bit, refuses what would end it later, and loads again."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastpmae import UserError
from fastpmae.distributed.ranks import Ranks
from fastpmae.evaluate.backbone import find_backbone
from fastpmae.evaluate.dense.labelled import Detection
from fastpmae.evaluate.dense.recipe import DETECT_PRESETS, DetectConfig
from fastpmae.evaluate.dense.training import Setting
from fastpmae_loaders.cli.progress import Progress
from tests.evaluate.dense.made import detection, start
from tests.evaluate.dense.small import DETECT as CONFIG

pytest.importorskip("faster_coco_eval", reason="pip install 'fastpmae[dense]'")

from fastpmae.evaluate.dense.average_precision import BoxScores
from fastpmae.evaluate.dense.detect import check_labels, evaluate_detector, make_detector, train_detector
from fastpmae.evaluate.dense.trained import TrainedDetector

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 1, CPU, None)


def train(folder: Path, config: DetectConfig = CONFIG, name: str = "out", **how: Any) -> BoxScores:
    """A training on six made images, one without boxes, tested on three others."""
    setting = Setting(folder / name, CPU, workers=1)
    images = how.pop("images", None) or detection(outlines=how.pop("outlines", False))
    scores, _ = train_detector(images, detection(3, first=20), start(folder), config, setting, ALONE, **how)
    return scores


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def changed(images: Detection, **columns: Any) -> Detection:
    """The set with the first image's objects changed."""
    first = dataclasses.replace(images.entries[0], objects=dataclasses.replace(images.entries[0].objects, **columns))
    return dataclasses.replace(images, entries=(first, *images.entries[1:]))


def test_presets_are_caes_and_vitdets():
    paper, vitdet = DETECT_PRESETS["paper"], DETECT_PRESETS["vitdet"]
    assert (paper.batch_size, paper.lr, paper.layer_decay, paper.drop_path, paper.epochs) == (32, 3e-4, 0.75, 0.2, 12)
    assert (paper.short_sides, paper.long_side, paper.milestones) == ((480, 800), 1333, (9, 11))
    assert (paper.box_loss, paper.box_loss_weight, paper.pyramid) == ("giou", 10, "taps")
    assert (vitdet.pyramid, vitdet.crop_size, vitdet.scale, vitdet.epochs) == ("simple", 1024, (0.1, 2.0), 100)
    # a linear warm-up, then a tenth after each milestone
    images = 3200
    steps = [0, 499, 500, 899, 900, 1099, 1100]
    assert [paper.rate(step, images) for step in steps] == pytest.approx(
        [1 / 501, 500 / 501, 1, 1, 0.1, 0.1, 0.01], rel=1e-3
    )
    assert paper.iterations_for(images) == 1200


@pytest.mark.slow
def test_it_learns_and_leaves_a_network_that_loads_again(tmp_path: Path):
    config = dataclasses.replace(
        CONFIG, epochs=40, lr=3e-3, layer_decay=1.0, drop_path=0.0, milestones=(35.0,), log_every=15, eval_every=0,
        short_sides=(64, 64), test_short_side=64, clip_grad=1.0,
    )  # fmt: skip
    scores = train(tmp_path, config)
    rows = rows_of(tmp_path / "out")
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert scores.boxes["ap50"] > 20
    assert scores.masks is None
    kept = load_file(tmp_path / "out" / "detector.safetensors")
    for name, tensor in find_backbone(str(tmp_path / "out")).build().state_dict().items():
        assert torch.equal(tensor, kept[f"backbone.vit.{name}"]), name


@pytest.mark.slow
def test_a_resumed_training_is_the_same_to_the_bit(tmp_path: Path):
    """Of masks, too; stopped in the middle of an epoch."""
    whole = train(tmp_path, name="whole", outlines=True)
    train(tmp_path, steps=3, outlines=True)
    resumed = train(tmp_path, resume=True, outlines=True)
    assert whole.figures() == resumed.figures()
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "out")
    ours, theirs = (load_file(tmp_path / name / "detector.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(UserError, match="their labels or the classes are others"):
        train(tmp_path, resume=True, outlines=False)


@pytest.mark.slow
def test_masks_are_found_where_they_are_learnt(tmp_path: Path):
    model = make_detector(start(tmp_path), CONFIG, 2, masks=True).eval()
    config = dataclasses.replace(CONFIG, score_threshold=0.0)
    detector = TrainedDetector(model, start(tmp_path), config, CPU, ("red", "blue"))
    scores = evaluate_detector(detector, detection(2, outlines=True), ALONE, Progress())
    assert scores is not None
    assert scores.masks is not None
    assert scores.by_image is not None
    assert scores.by_image.shape == (2,)
    assert set(scores.figures()) >= {"ap", "ap50", "mask_ap", "mask_ap50"}


def test_labels_that_would_end_the_training_are_refused_before_it():
    images = detection(2)
    check_labels(images)
    labels = images.entries[0].objects.labels
    for column, odd, sentence in (
        ("labels", np.zeros_like(labels), r"0.png has a class beyond 1 ... 2"),
        ("labels", labels + 1, r"0.png has a class beyond 1 ... 2"),
        ("boxes", np.full((2, 4), np.nan, np.float32), "0.png has a box without an extent"),
        ("boxes", np.array([[1, 1, 5, 5], [3, 4, 3, 9]], np.float32), "0.png has a box without an extent"),
        ("boxes", np.array([[1, 1, 5, 5], [3, 4, np.inf, 9]], np.float32), "0.png has a box without an extent"),
    ):
        with pytest.raises(UserError, match=sentence):
            check_labels(changed(images, **{column: odd}))


def test_what_cannot_be_trained_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="--masks on: made has boxes alone"):
        train(tmp_path, masks=True)
    assert not (tmp_path / "out").exists()


def test_a_learning_rate_that_does_not_go_as_the_settings_say_is_spoken_of():
    config = DetectConfig(epochs=3, milestones=(2, 10, 13), warmup_iterations=100, batch_size=4)
    assert config.remarks(40) == [
        "warning: --warmup-iterations 100 last longer than the 30 steps of the training: the learning rate does not "
        "reach --lr",
        "warning: --milestones 10.0 13.0 lie past --epochs 3: the learning rate does not fall there",
    ]
    assert not dataclasses.replace(config, epochs=14).remarks(400)
