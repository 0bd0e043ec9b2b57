"""Several ranks are one run: the same numbers in shards, in parts and on any number of them, and one end for all.

Most of it runs in one process that forks its ranks, since starting torch anew for each would take most of the time.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpmae import Config, pretrain, write_beton
from fastpmae.config_file import write_config
from fastpmae.run.checkpoint import checkpoint_path, checkpoints_in, read_checkpoint, step_of
from tests.made import REPOSITORY, tiny_settings, write_tree
from tests.test_train import environment, flags_of, killed_at_end, rows_of, wait_for

LOSSES = ("loss", "loss_m", "loss_c", "loss_p")

GROWING: dict[str, Any] = {"progressive_resolution": ["24:0.5", "32"], "patch_size": 4, "folds": 3}
SCENARIOS: list[dict[str, Any]] = [
    {"name": "one", "ranks": 1, "settings": {"steps": 10}},
    # the default: whole networks, gradients averaged as the static graph was recorded
    {"name": "plain", "ranks": 2, "settings": {"steps": 10}},
    # accumulated gradients that travel with the last part alone, labels of logits that are never there at once
    {"name": "two", "ranks": 2, "settings": {"steps": 10, "accumulate": 2, "prototypes_chunk": 32}},
    {"name": "four", "ranks": 4, "settings": {"steps": 10}},
    {"name": "shards", "ranks": 4, "settings": {"steps": 10, "shard": True}},
    # one run: in shards, where the ranks' clocks do not agree when to save, then on more ranks
    # whose checkpoints are folders of shards first, then files, then folders again
    {"name": "moves", "ranks": 2,
     "settings": {"steps": 4, "log_every": 3, "keep": 9, "shard": True, "accumulate": 2, "sharded_checkpoints": True},
     "of_first": {"save_every": 0.0}},
    {"name": "moves", "ranks": 4,
     "settings": {"steps": 7, "log_every": 3, "keep": 9, "save_steps": 5, "resume": "auto"}},
    # and alone: three micro-batches do not share out the images, four do
    {"name": "moves", "ranks": 1,
     "settings": {"steps": 10, "log_every": 3, "keep": 9, "accumulate": 3, "resume": "auto",
                  "sharded_checkpoints": True}},
    # and into shards from shards, of other ranks
    {"name": "moves", "ranks": 4,
     "settings": {"steps": 11, "log_every": 11, "keep": 9, "resume": "auto", "shard": True,
                  "sharded_checkpoints": True}},
    # and into shards
    {"name": "two", "ranks": 2,
     "settings": {"steps": 11, "shard": True, "prototypes_chunk": 32, "resume": "auto"}},
    {"name": "one", "ranks": 1, "settings": {"steps": 11, "resume": "auto"}},
    # views that grow with the second epoch, alone, and on two ranks that begin anew there
    {"name": "grows", "ranks": 1, "settings": {"steps": 10, "epochs": 2, **GROWING}},
    {"name": "grows-on-two", "ranks": 2, "settings": {"steps": 5, "epochs": 2, **GROWING}},
    {"name": "grows-on-two", "ranks": 2, "settings": {"steps": 10, "epochs": 2, "resume": "auto", **GROWING}},
    # features that are centred over the images of all ranks, each of which has its share of the weights
    {"name": "centred", "ranks": 1, "settings": {"steps": 3, "center_bottleneck": True}},
    {"name": "centred-shards", "ranks": 2, "settings": {"steps": 3, "center_bottleneck": True, "shard": True}},
    {"name": "refused", "ranks": 2, "settings": {"steps": 10}, "rank_1_refuses": True},
    {"name": "full", "ranks": 2, "settings": {"steps": 10, "save_steps": 2}, "disk_is_full": True},
    {"name": "unread", "ranks": 2, "rank_1_cannot_read": True,
     "settings": {"steps": 10, "save_steps": 2, "sharded_checkpoints": True, "rank_timeout": 1.0}},
]  # fmt: skip


@pytest.fixture(scope="module")
def forked(small_beton: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of all scenarios' runs, and what they said."""
    folder = tmp_path_factory.mktemp("ranks")
    ended, said = run_forked(settings(small_beton), folder, SCENARIOS)
    assert ended == [[0] * scenario["ranks"] for scenario in SCENARIOS[:-3]] + [[1, 2], [1, 1], [1, 1]], said
    return folder, said


def run_forked(config: Config, folder: Path, scenarios: list[dict[str, Any]]) -> tuple[list[list[int]], str]:
    """How the ranks of each scenario have ended, and what all of them said."""
    write_config(config, folder / "config.json")
    result = subprocess.run(
        [sys.executable, "-m", "tests.programs.forked_ranks", folder / "config.json", folder, json.dumps(scenarios)],
        env={**environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    return [json.loads(line)[1] for line in result.stdout.splitlines()], result.stderr


def settings(beton: Path) -> Config:
    return tiny_settings(beton).using(warmup_epochs=0.0, clip_grad=1.0, sinkhorn_over="step")


def assert_same_weights(one: Path, other: Path, step: int) -> None:
    """Student and teachers of two runs, to rounding."""
    first, second = (
        read_checkpoint(next(path for path in checkpoints_in(folder) if step_of(path) == step))
        for folder in (one, other)
    )
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        if not name.startswith(("student.", "labelling_teacher.", "reconstruction_teacher.")):
            continue
        ours, theirs = tensor, second.tensors[name]
        if name.endswith("qkv.bias"):
            # No loss depends on the keys' bias: its gradient is rounding alone, which AdamW scales up.
            ours, theirs = (values.reshape(3, -1)[[0, 2]] for values in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-6, msg=lambda words, name=name: f"{name}: {words}")


@pytest.mark.slow
def test_ranks_and_parts_compute_what_one_process_computes(forked: tuple[Path, str]):
    folder, _ = forked
    alone = rows_of(folder / "one")
    assert max(row["grad_norm"] for row in alone) > 1, "nothing is clipped"
    # the eleventh was resumed, in shards
    for name, steps in (("plain", 10), ("two", 11), ("four", 10), ("shards", 10)):
        together = rows_of(folder / name)
        assert len(together) == steps
        for one, other in zip(alone, together, strict=False):
            for figure in (*LOSSES, "grad_norm"):
                assert one[figure] == pytest.approx(other[figure], rel=1e-5), figure
        assert_same_weights(folder / "one", folder / name, steps)


@pytest.mark.slow
def test_a_centred_bottleneck_in_shards(forked: tuple[Path, str]):
    folder, _ = forked
    alone, shards = rows_of(folder / "centred"), rows_of(folder / "centred-shards")
    assert len(alone) == len(shards) == 3
    for one, other in zip(alone, shards, strict=True):
        for figure in (*LOSSES, "grad_norm"):
            assert one[figure] == pytest.approx(other[figure], rel=1e-5), figure
    assert_same_weights(folder / "centred", folder / "centred-shards", 3)


@pytest.mark.slow
def test_a_run_in_shards_goes_on_on_more_ranks_and_alone(forked: tuple[Path, str]):
    folder, _ = forked
    alone, moved = rows_of(folder / "one"), rows_of(folder / "moves")
    assert [row["step"] for row in moved] == [3, 6, 9, 11]
    for row in moved[:3]:  # also over the sums that a checkpoint carries from one number of ranks to another
        steps = alone[int(row["step"]) - 3 : int(row["step"])]
        for figure in (*LOSSES, "grad_norm"):
            assert row[figure] == pytest.approx(sum(one[figure] for one in steps) / 3, rel=1e-5), figure
    assert_same_weights(folder / "one", folder / "moves", 10)
    assert_same_weights(folder / "one", folder / "moves", 11)
    # the first rank's clock asked for a checkpoint after every step, and both took part
    saved = checkpoints_in(folder / "moves")
    assert [step_of(path) for path in saved] == [11, 10, 7, 5, 4, 3, 2, 1]
    assert [path.suffix for path in saved] == [".shards"] * 2 + [".safetensors"] * 2 + [".shards"] * 4
    assert [len(list(path.glob("shard-*"))) for path in saved] == [4, 1, 0, 0, 2, 2, 2, 2]
    # of what is sharded a rank writes its part: the files of a folder are about as large
    for path in saved[:1] + saved[-4:]:
        sizes = [file.stat().st_size for file in path.glob("shard-*")]
        assert max(sizes) < 1.5 * min(sizes), path


@pytest.mark.slow
def test_views_grow_alike_on_any_number_of_ranks(forked: tuple[Path, str]):
    folder, _ = forked
    alone, together = rows_of(folder / "grows"), rows_of(folder / "grows-on-two")
    assert [row["image_size"] for row in alone] == [24] * 5 + [32] * 5
    for one, other in zip(alone, together, strict=True):
        assert one["image_size"] == other["image_size"]
        for figure in (*LOSSES, "grad_norm"):
            assert one[figure] == pytest.approx(other[figure], rel=1e-5), figure
    assert_same_weights(folder / "grows", folder / "grows-on-two", 10)


@pytest.mark.slow
def test_an_error_on_one_rank_is_one_sentence(forked: tuple[Path, str]):
    _, said = forked
    assert said.count("fastpmae-train: error: rank 1 does not like its images\n") == 1
    # The first rank's disk, of which all hear at the same step, and the first alone speaks; of another's as well.
    full = "safetensors cannot be written: No space left on device. Last checkpoint: none yet\n"
    assert [said.count(full), said.count(full.replace("safetensors", "shards"))] == [1, 1]
    assert said.count("fastpmae-train: ") == 3
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_and_torchrun_takes_the_run_up_again(rank: int, small_beton: Path, tmp_path: Path):
    """As `torchrun --max-restarts 3 ... $(which fastpmae-train) ... --resume`, of which one rank is killed."""
    config = settings(small_beton).using(epochs=20, steps=20, save_steps=2, log_every=10)
    script, out = tmp_path / "fastpmae-train", tmp_path / "killed"
    shutil.copy(REPOSITORY / "tests/programs/installed_train.py", script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*launch, "--max-restarts", "3", script, *flags_of(config.using(out=out)), "--resume"],
        env={**environment(), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    with killed_at_end(process):
        wait_for(checkpoint_path(out, 4), process)
        os.kill(rank_of(process.pid, rank), signal.SIGKILL)
        _, text = process.communicate(timeout=200)
    assert process.returncode == 0, text
    assert text.count("another rank ended without a word") == 1
    assert "resumed from" in text
    straight = pretrain(config.using(out=tmp_path / "straight"))
    for one, other in zip(rows_of(straight), rows_of(out), strict=True):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert_same_weights(straight, out, 20)


def rank_of(launcher: int, rank: int) -> int:
    """The process that torchrun started as this rank."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"torchrun has no rank {rank}")


@pytest.mark.slow
def test_labels_balanced_over_the_step_make_parts_the_whole_batch(tiny: Config, tmp_path: Path):
    whole = rows_of(pretrain(tiny.using(steps=3, warmup_epochs=0.0)))
    parts, apart = (
        rows_of(pretrain(tiny.using(steps=3, warmup_epochs=0.0, accumulate=4, sinkhorn_over=over, out=tmp_path / over)))
        for over in ("step", "micro-batch")
    )
    for one, other in zip(whole, parts, strict=True):
        for figure in (*LOSSES, "grad_norm"):
            assert one[figure] == pytest.approx(other[figure], rel=1e-5), figure
    assert whole[0]["loss_p"] != pytest.approx(apart[0]["loss_p"], rel=1e-3)


@pytest.mark.slow
def test_parts_that_balance_over_the_step_are_no_changed_setting(tiny: Config):
    tiny = tiny.using(sinkhorn_over="step")
    pretrain(tiny.using(steps=1))
    folder = pretrain(tiny.using(steps=2, accumulate=2, resume="auto"))
    assert [row["step"] for row in rows_of(folder)] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("teachers", ["none", "reconstruction"])
def test_parts_without_labels_are_no_changed_setting(tiny: Config, tmp_path: Path, teachers: Any):
    """There is nothing to balance: the parts of a step make the whole batch, to rounding."""
    target = "pixels" if teachers == "none" else "tokens"
    method = tiny.using(teachers=teachers, target=target, lambda_c=0.0, lambda_p=0.0, warmup_epochs=0.0)
    whole = rows_of(pretrain(method.using(steps=4, out=tmp_path / "whole")))
    pretrain(method.using(steps=2))
    parts = rows_of(pretrain(method.using(steps=4, accumulate=4, resume="auto")))
    for one, other in zip(whole, parts, strict=True):
        for figure in ("loss", "loss_m", "grad_norm"):
            assert one[figure] == pytest.approx(other[figure], rel=1e-5), figure


@pytest.mark.slow
def test_images_that_do_not_decode_are_those_of_all_ranks(tmp_path: Path):
    """Also when a run goes on: each rank has seen its own, and the checkpoint holds the sum."""
    tree, beton = write_tree(tmp_path / "tree", 44), tmp_path / "some.beton"
    write_beton(tree, beton)
    data = bytearray(beton.read_bytes())
    for number in range(0, 44, 4):
        image = next(tree.glob(f"*/{number:04d}.jpg")).read_bytes()
        place = data.index(image)
        data[place : place + len(image)] = bytes(len(image))
    beton.write_bytes(data)
    config = settings(beton).using(bad_fraction=1.0)
    steps = [{"steps": 3}, {"steps": 7, "resume": "auto"}]
    ended, said = run_forked(config, tmp_path, [{"name": "two", "ranks": 2, "settings": some} for some in steps])
    assert ended == [[0, 0]] * 2, said
    alone = [row["bad_images"] for row in rows_of(pretrain(config.using(steps=7, out=tmp_path / "alone")))]
    assert alone[0] < alone[2] < alone[6]
    assert [row["bad_images"] for row in rows_of(tmp_path / "two")] == alone
    assert read_checkpoint(checkpoint_path(tmp_path / "two", 7)).progress["bad_images"] == alone[6]
