"""--eval-every: the figures of a run's own networks, and nothing else of the run changed."""

import json
from pathlib import Path

import pytest
import torch

from fastpmae import Config, pretrain
from fastpmae.checkpoint import checkpoint_path, read_checkpoint
from fastpmae.embed import embed_images
from fastpmae.errors import UserError
from fastpmae.knn import knn_ranked
from fastpmae.scores import Scores


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_figures_are_those_of_the_checkpoint(tiny: Config, small_beton: Path, capsys):
    folder = pretrain(tiny.using(eval_every=2, keep=10))
    found = [row for row in rows_of(folder) if "knn_student" in row]
    # after the second epoch, and at the end
    assert [(row["step"], row["epoch"]) for row in found] == [(10, 2), (15, 3)]
    for row in found:
        for network in ("student", "labelling_teacher", "reconstruction_teacher"):
            features, labels = map(
                torch.from_numpy, embed_images(checkpoint_path(folder, int(row["step"])), small_beton, network=network)
            )
            ranked = knn_ranked(features, labels, features, [20], leave_one_out=True)[20]
            assert row[f"knn_{network}"] == pytest.approx(Scores(labels, ranked).top1, abs=1e-4)
    assert "k-NN after epoch 2: student " in capsys.readouterr().err


def test_a_run_is_the_same_with_and_without(tiny: Config, tmp_path: Path):
    watched = pretrain(tiny.using(eval_every=1, out=tmp_path / "watched"))
    plain = pretrain(tiny.using(out=tmp_path / "plain"))
    ours, theirs = (read_checkpoint(checkpoint_path(run, 15)).tensors for run in (watched, plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    timings = {"images_per_second", "data_wait"}
    kept = [{k: v for k, v in row.items() if k not in timings} for row in rows_of(watched) if "loss" in row]
    assert kept == [{k: v for k, v in row.items() if k not in timings} for row in rows_of(plain)]


def test_a_resumed_run_has_each_evaluation_once(tiny: Config):
    pretrain(tiny.using(eval_every=1, steps=12))
    folder = pretrain(tiny.using(eval_every=1, resume="auto"))
    assert [row["step"] for row in rows_of(folder) if "knn_student" in row] == [5, 10, 15]


def test_a_validation_set_and_one_teacher(tiny: Config, small_beton: Path):
    settings = {"teachers": "single", "epochs": 1, "eval_every": 1, "eval_train": small_beton, "eval_val": small_beton}
    (row,) = [row for row in rows_of(pretrain(tiny.using(**settings))) if "knn_student" in row]
    assert {name for name in row if name.startswith("knn")} == {"knn_student", "knn_labelling_teacher"}


def test_what_cannot_be_evaluated(tiny: Config, tmp_path: Path):
    for settings, said in (
        ({"eval_every": -1}, "--eval-every -1"),
        ({"eval_every": 1, "shard": True}, "--shard has not"),
        ({"eval_every": 1, "eval_val": tmp_path / "none.beton"}, "none.beton"),
    ):
        with pytest.raises(UserError, match=said):
            pretrain(tiny.using(**settings))
        assert not (tmp_path / "run").exists()
