"""Segmentation's training: it learns, resumes to the bit, stops on signals, and leaves a network that loads again."""

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastpmae import UserError
from fastpmae.distributed.ranks import Ranks
from fastpmae.evaluate.backbone import features, find_backbone
from fastpmae.evaluate.dense import training
from fastpmae.evaluate.dense.order import places_of
from fastpmae.evaluate.dense.overlap import MaskScores
from fastpmae.evaluate.dense.recipe import SEGMENT_PRESETS, SegmentConfig
from fastpmae.evaluate.dense.training import Setting
from fastpmae.run.checkpoint import checkpoints_in, step_of
from fastpmae_loaders.errors import Interrupted
from tests.evaluate.dense.made import segmentation, start
from tests.evaluate.dense.small import SEGMENT as CONFIG

pytest.importorskip("segmentation_models_pytorch", reason="pip install 'fastpmae[dense]'")

from fastpmae.evaluate.dense.segment import make_segmenter, train_segmenter

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 1, CPU, None)


def train(folder: Path, config: SegmentConfig = CONFIG, name: str = "out", **how: Any) -> MaskScores:
    """A training on six made images, tested on three others."""
    setting = Setting(folder / name, CPU, workers=1)
    images = segmentation(), segmentation(3, first=20)
    scores, _ = train_segmenter(*images, start(folder), config, setting, how.pop("ranks", ALONE), **how)
    return scores


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_presets_are_the_papers():
    paper, mae = SEGMENT_PRESETS["paper"], SEGMENT_PRESETS["mae"]
    assert (paper.lr, paper.batch_size, paper.layer_decay, paper.weight_decay, paper.drop_path) == (
        4e-4, 16, 0.65, 0.05, 0.1,
    )  # fmt: skip
    assert (paper.iterations, paper.warmup_iterations, paper.crop_size, paper.scale) == (160_000, 1500, 512, (0.5, 2.0))
    assert (paper.cat_max_ratio, paper.auxiliary_weight, paper.photometric) == (0.75, 0.4, True)
    assert int(paper.crop_size * paper.stride) == 341
    assert (mae.lr, mae.relative_positions) == (1e-4, True)
    # linear to 0, after a linear warm-up
    assert [paper.rate(step) for step in (0, 1500, 80_000, 159_999)] == pytest.approx(
        [1 / 1501, 1 - 1500 / 160_000, 0.5, 1 / 160_000]
    )


def test_every_image_comes_once_an_epoch_whatever_the_batch():
    found = {}
    for batch_size, accumulate, ranks in ((4, 1, 1), (4, 2, 2), (6, 3, 1), (12, 1, 3)):
        places = [
            place
            for step in range(24 // batch_size)
            for part in range(accumulate)
            for place in sorted(
                place
                for rank in range(ranks)
                for place in places_of(
                    step, part, images=7, batch_size=batch_size, accumulate=accumulate, seed=3, rank=rank, ranks=ranks
                )
            )
        ]
        found[batch_size, accumulate, ranks] = sorted(places)
        assert sorted(number for epoch, number in places if epoch == 1) == list(range(7))
    assert len({tuple(places) for places in found.values()}) == 1


@pytest.mark.slow
def test_it_learns_and_leaves_a_network_that_loads_again(tmp_path: Path):
    config = dataclasses.replace(
        CONFIG, iterations=100, lr=1e-2, channels=16, layer_decay=1.0, log_every=40, eval_every=0, drop_path=0.0
    )
    scores = train(tmp_path, config)
    assert scores.figures()["miou"] > 60
    assert scores.images == 3
    assert scores.by_image is not None
    assert bool((scores.by_image > 40).all())
    rows = rows_of(tmp_path / "out")
    assert [row["step"] for row in rows] == [40, 80, 100]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["miou"] == scores.figures()["miou"]
    assert "miou" not in rows[0]
    # as WEIGHTS its encoder is the one that was trained, by folder and by file
    kept = load_file(tmp_path / "out" / "segmenter.safetensors")
    for weights in (tmp_path / "out", tmp_path / "out" / "segmenter.safetensors"):
        backbone = find_backbone(str(weights))
        model = backbone.build()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, kept[f"backbone.vit.{name}"]), name
        assert features(model, torch.zeros(1, 3, 32, 32))[0].shape == (1, 16)


@pytest.mark.slow
def test_a_resumed_training_is_the_same_to_the_bit(tmp_path: Path):
    """Stopped in the middle of an epoch (six images, steps of four) and between two rows."""
    whole = train(tmp_path, name="whole")
    train(tmp_path, steps=3)
    assert [row["step"] for row in rows_of(tmp_path / "out")] == [2]
    resumed = train(tmp_path, resume=True)
    assert torch.equal(whole.confusion, resumed.confusion)
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "out")
    ours, theirs = (load_file(tmp_path / name / "segmenter.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_what_a_resumed_training_must_agree_with(tmp_path: Path):
    train(tmp_path, steps=1)
    with pytest.raises(UserError, match="already holds a training: add --resume"):
        train(tmp_path)
    with pytest.raises(UserError, match=r"--lr was 0.002 and is now 0.01"):
        train(tmp_path, dataclasses.replace(CONFIG, lr=0.01), resume=True)
    # what changes no number may differ
    train(tmp_path, dataclasses.replace(CONFIG, eval_every=0, activation_checkpointing=True), resume=True, steps=2)
    for path in checkpoints_in(tmp_path / "out"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds a segmenter.safetensors and no checkpoint beside it"):
        train(tmp_path)


@pytest.mark.slow
def test_a_signal_ends_it_after_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step = training.train_step

    def signalled(*given: Any) -> None:
        step(*given)
        if given[2] == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(training, "train_step", signalled)
    with pytest.raises(Interrupted):
        train(tmp_path)
    assert [step_of(path) for path in checkpoints_in(tmp_path / "out")] == [3]
    assert not (tmp_path / "out" / "segmenter.safetensors").exists()
    with pytest.raises(UserError, match=r"has left no segmenter.safetensors yet"):
        find_backbone(str(tmp_path / "out"))
    monkeypatch.undo()
    train(tmp_path, resume=True)


def test_what_cannot_be_trained_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="computes one image at a time"):
        train(tmp_path, dataclasses.replace(CONFIG, batch_size=1))
    with pytest.raises(UserError, match="--steps -1: 0 or more"):
        train(tmp_path, steps=-1)
    with pytest.raises(UserError, match=r"--crop-size 16: at least 32 for patches of 8"):
        make_segmenter(start(tmp_path), dataclasses.replace(CONFIG, crop_size=16), 3)
    with pytest.raises(UserError, match=r"--layer-decay 0.0 must be in \(0, 1\]"):
        dataclasses.replace(CONFIG, layer_decay=0.0)
    with pytest.raises(UserError, match=r"does not share out evenly over 2 ranks x --accumulate 2"):
        train(tmp_path, dataclasses.replace(CONFIG, batch_size=6, accumulate=2), ranks=Ranks(0, 2, 2, CPU, None))
    assert not (tmp_path / "out").exists()


def test_a_side_that_the_patches_do_not_divide_is_told_by_the_flag_that_it_was_given_with(tmp_path: Path):
    start(tmp_path)
    with pytest.raises(UserError, match="--crop-size 30 is no multiple of the network's patches of 8 pixels"):
        find_backbone(str(tmp_path / "vit.pth"), heads=2, image_size=30, size_flag="--crop-size")
