"""--eval-every: the figures of a run's own networks, and nothing else of the run changed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastpmae import Config, pretrain
from fastpmae.config_file import write_config
from fastpmae.evaluate.features import embed_images
from fastpmae.evaluate.knn import knn_ranked
from fastpmae.evaluate.least_squares import least_squares_predict
from fastpmae.evaluate.metrics import Scores
from fastpmae.pretraining import online_evaluation
from fastpmae.run.checkpoint import checkpoint_path, read_checkpoint
from fastpmae_loaders.errors import Interrupted, UserError
from tests.pretraining.test_data import threads_of_loaders
from tests.test_train import environment


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_figures_are_those_of_the_checkpoint(tiny: Config, small_beton: Path, capsys):
    folder = pretrain(tiny.using(eval_every=2, keep=10, save_steps=5))
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
            found = least_squares_predict(features, labels, int(labels.max()) + 1)
            assert row[f"linear_{network}"] == pytest.approx(Scores(labels, found[:, None]).top1, abs=1e-4)
    said = capsys.readouterr().err
    assert re.search(r"after epoch 2: k-NN student .* %, .*; linear probe student \d+\.\d %, labelling teacher", said)


@pytest.mark.slow
def test_it_decodes_with_all_cores(tiny: Config, small_beton: Path, monkeypatch):
    seen = threads_of_loaders(monkeypatch, 3)
    folder = pretrain(tiny.using(eval_every=3, workers=0))
    # the run's own images, and the labelled ones that vote
    assert seen == [3, 3]
    embed_images(folder, small_beton)
    assert seen == [3, 3, 3]


@pytest.mark.slow
def test_a_run_is_the_same_with_and_without(tiny: Config, tmp_path: Path):
    watched = pretrain(tiny.using(eval_every=1, out=tmp_path / "watched"))
    plain = pretrain(tiny.using(out=tmp_path / "plain"))
    ours, theirs = (read_checkpoint(checkpoint_path(run, 15)).tensors for run in (watched, plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    timings = {"images_per_second", "data_wait"}
    kept = [{k: v for k, v in row.items() if k not in timings} for row in rows_of(watched) if "loss" in row]
    assert kept == [{k: v for k, v in row.items() if k not in timings} for row in rows_of(plain)]


@pytest.mark.slow
@pytest.mark.parametrize("save_steps", [5, 0], ids=["saved before", "saved after"])
def test_a_run_that_is_evaluated_is_saved_and_a_signal_stops_that_soon(tiny: Config, monkeypatch, save_steps: int):
    folder, figures = tiny.run.out, []
    assert folder is not None
    embed, checkpoint = online_evaluation.features, checkpoint_path(folder, 5)

    def signalled(encoder, pictures):
        limit = time.monotonic() + 60  # it is being written
        while save_steps and not checkpoint.exists() and time.monotonic() < limit:
            time.sleep(0.005)
        figures.append(checkpoint.exists())
        os.kill(os.getpid(), signal.SIGTERM)
        return embed(encoder, pictures)

    # 44 images in batches of ten: the signal comes in the first and the second is not begun
    monkeypatch.setattr(online_evaluation, "BATCH", 10)
    monkeypatch.setattr(online_evaluation, "features", signalled)
    with pytest.raises(Interrupted, match="SIGTERM after step 5 of 15"):
        pretrain(tiny.using(eval_every=1, save_steps=save_steps))
    assert figures == [save_steps > 0] * 3, "three networks saw one batch"
    assert checkpoint.exists()
    assert not [row for row in rows_of(folder) if "knn_student" in row]
    monkeypatch.undo()
    pretrain(tiny.using(eval_every=1, resume="auto"))
    found = [row for row in rows_of(folder) if "knn_student" in row]
    assert [row["step"] for row in found] == [5, 10, 15], "the resumed run makes up for it"
    straight = pretrain(tiny.using(eval_every=1, out=folder.parent / "straight"))
    assert found == [row for row in rows_of(straight) if "knn_student" in row]


@pytest.mark.slow
def test_a_signal_in_an_evaluation_that_is_made_up_for_loses_nothing(tiny: Config, monkeypatch):
    folder = pretrain(tiny.using(steps=5))
    before, embed = read_checkpoint(checkpoint_path(folder, 5)), online_evaluation.features

    def signalled(encoder, pictures):
        os.kill(os.getpid(), signal.SIGTERM)
        return embed(encoder, pictures)

    monkeypatch.setattr(online_evaluation, "BATCH", 10)
    monkeypatch.setattr(online_evaluation, "features", signalled)
    for _ in range(2):
        # no step is taken: after it nothing would tell that an evaluation is owed
        with pytest.raises(Interrupted, match="SIGTERM after step 5 of 15"):
            pretrain(tiny.using(eval_every=1, resume="auto"))
    # nor where the run goes on in a folder that has no checkpoint yet
    branch = tiny.using(eval_every=1, out=folder.parent / "branch")
    with pytest.raises(Interrupted, match="SIGTERM after step 5 of 15"):
        pretrain(branch.using(resume=str(checkpoint_path(folder, 5))))
    first, again = (read_checkpoint(checkpoint_path(out, 5)) for out in (folder, folder.parent / "branch"))
    assert again.progress["loader"] == before.progress["loader"] == first.progress["loader"]
    assert all(torch.equal(again.tensors[name], before.tensors[name]) for name in before.tensors)
    monkeypatch.undo()
    for config in (tiny.using(eval_every=1), branch):
        found = [row for row in rows_of(pretrain(config.using(resume="auto"))) if "knn_student" in row]
        assert [row["step"] for row in found] == [5, 10, 15]


@pytest.mark.slow
def test_two_ranks_evaluate_what_they_have_learnt_together(tiny: Config, small_beton: Path, tmp_path: Path):
    write_config(tiny.using(warmup_epochs=0.0), tmp_path / "config.json")
    settings = {"eval_every": 1, "steps": 5}
    done = subprocess.run(
        [sys.executable, "-m", "tests.programs.forked_ranks", tmp_path / "config.json", tmp_path,
         json.dumps([{"name": "two", "ranks": 2, "settings": settings}])],
        env={**environment(), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert json.loads(done.stdout) == ["two", [0, 0]], done.stderr
    (row,) = [row for row in rows_of(tmp_path / "two") if "knn_student" in row]
    features, labels = map(torch.from_numpy, embed_images(tmp_path / "two", small_beton))
    ranked = knn_ranked(features, labels, features, [20], leave_one_out=True)[20]
    assert row["knn_student"] == pytest.approx(Scores(labels, ranked).top1, abs=1e-4)


@pytest.mark.slow
def test_a_resumed_run_has_each_evaluation_once(tiny: Config):
    pretrain(tiny.using(eval_every=1, steps=12))
    folder = pretrain(tiny.using(eval_every=1, resume="auto"))
    assert [row["step"] for row in rows_of(folder) if "knn_student" in row] == [5, 10, 15]


@pytest.mark.slow
def test_a_validation_set_and_one_teacher(tiny: Config, small_beton: Path, tmp_path: Path):
    settings = {"teachers": "single", "epochs": 1, "eval_every": 1, "eval_train": small_beton, "eval_val": small_beton}
    (row,) = [row for row in rows_of(pretrain(tiny.using(**settings))) if "knn_student" in row]
    evaluated = {f"{kind}_{network}" for kind in ("knn", "linear") for network in ("student", "labelling_teacher")}
    assert set(row) == {"step", "epoch"} | evaluated
    features, labels = map(torch.from_numpy, embed_images(tmp_path / "run", small_beton))
    found = least_squares_predict(features, labels, int(labels.max()) + 1, features)
    assert row["linear_student"] == pytest.approx(Scores(labels, found[:, None]).top1, abs=1e-4)


def test_what_cannot_be_evaluated(tiny: Config, tmp_path: Path):
    for settings, said in (
        ({"eval_every": -1}, "--eval-every -1"),
        ({"eval_every": 1, "shard": True}, "--shard has not"),
        ({"eval_every": 1, "eval_val": tmp_path / "none.beton"}, "none.beton"),
    ):
        with pytest.raises(UserError, match=said):
            pretrain(tiny.using(**settings))
        assert not (tmp_path / "run").exists()
