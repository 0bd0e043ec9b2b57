"""Checkpoints in shards: what is put in comes out, whole or sharded; whatever is damaged or forged is a sentence."""

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastpmae import Config, RunError, load_encoder, pretrain
from fastpmae.distributed.ranks import Ranks
from fastpmae.pretraining.cli import settings_of_run
from fastpmae.run import shards
from fastpmae.run.checkpoint import (
    CheckpointError,
    checkpoint_path,
    checkpoints_in,
    find_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    read_progress,
)
from fastpmae.run.checkpoint_writer import ShardSaver
from fastpmae.run.shards import INDEX, write_shards
from tests.run.test_checkpoint_writer import made, progress

ALONE = Ranks(0, 1, 1, torch.device("cpu"), None)
FILE = "shard-00001-model-00001-of-00001.safetensors"


def path_of(folder: Path, step: int) -> Path:
    return checkpoint_path(folder, step, sharded=True)


def write(folder: Path, step: int = 7) -> Path:
    path = path_of(folder, step)
    write_shards(path, {name: tensor.contiguous() for name, tensor in made().items()}, progress(step), None)
    return path


def with_index(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A stranger's index, whose digest fits."""
    index = json.loads((path / INDEX).read_text())
    del index["digest"]
    change(index)
    (path / INDEX).write_text(json.dumps(index | {"digest": shards._digest_of(index)}))


def with_file(path: Path, offsets: dict[str, list[int]]) -> None:
    """A stranger's file, whose digest fits, that says its tensors are parts of larger ones."""
    told = {name: {"saved_offsets": places} for name, places in offsets.items()}
    tensors = {name: tensor.clone() for name, tensor in load_file(path / FILE).items()}
    save_file(tensors, path / FILE, {"DCP_SHARDING_INFO": json.dumps(told), "DCP_VERSION": "1.0"})
    with_index(path, lambda index: index["files"].update({FILE: shards._identity(path / FILE)}))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write(tmp_path)


def test_what_is_written_is_read(written: Path):
    assert {file.name for file in written.iterdir()} == {INDEX, FILE}, "and no pickle"
    checkpoint = read_checkpoint(written)
    assert checkpoint.progress == read_progress(written) == progress(7)
    assert set(checkpoint.tensors) == set(made())
    for name, tensor in made().items():
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.tensors[name], tensor), name
        assert checkpoint.described(name.split(".")[0])[name.split(".", 1)[1]] == (tensor.shape, tensor.dtype)
    assert checkpoint.part("optimizer.weight").keys() == {"step"}
    assert find_checkpoint(written).path == find_checkpoint(written.parent.parent).path == written


def test_every_flipped_byte_is_noticed(written: Path):
    for name in (INDEX, FILE):
        data = (written / name).read_bytes()
        for place in range(0, len(data), 7):
            damaged = bytearray(data)
            damaged[place] ^= 0x10
            (written / name).write_bytes(damaged)
            with pytest.raises(CheckpointError):
                read_checkpoint(written)
        (written / name).write_bytes(data)
    read_checkpoint(written)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / INDEX).unlink(), "there is no checkpoint .*: it holds no checkpoint.json"),
        (lambda path: (path / INDEX).write_text("[" * 10**6), "is damaged: "),
        (lambda path: (path / INDEX).write_text("{}"), "is no index of a fastpmae checkpoint"),
        (lambda path: (path / FILE).unlink(), f"{FILE} is missing"),
        (lambda path: (path / FILE).write_bytes((path / FILE).read_bytes()[:-1]), "bytes instead of"),
        (lambda path: (path / "more.safetensors").touch(), "'more.safetensors' is not in its index"),
        (lambda path: with_index(path, lambda index: index["files"].update({"../x.safetensors": [1, ""]})),
         "names no sound file '../x.safetensors'"),
        (lambda path: with_index(path, lambda index: index["files"].update({FILE: [True, ""]})), "names no sound file"),
        (lambda path: with_index(path, lambda index: index.update(progress="{}")), "no sound 'step'"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_a_sentence(written: Path, damage: Callable[[Path], Any], said: str):
    damage(written)
    with pytest.raises(CheckpointError, match=said):
        read_checkpoint(written)


@pytest.mark.parametrize("places", [[10**15, 0], [3, 0], [0, 10**15], [-1, 0], [0], "x", None])
def test_a_tensor_that_is_not_whole_takes_no_memory(written: Path, places: Any):
    """Offsets are a stranger's: a part at row 10^15 would be room for all the rows before it."""
    with_file(written, {name: [0] * tensor.ndim for name, tensor in made().items()} | {"student.part": places})
    with pytest.raises(CheckpointError, match="is damaged"):
        read_checkpoint(written)


def test_a_pipe_or_a_huge_index_is_not_read(written: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "LARGEST_INDEX", 10)
    with pytest.raises(CheckpointError, match="too large"):
        read_checkpoint(written)
    (written / INDEX).unlink()
    os.mkfifo(written / INDEX)
    with pytest.raises(CheckpointError, match="no regular file"):
        read_checkpoint(written)


def test_ranks_share_the_work_of_verifying(tmp_path: Path):
    path = write(tmp_path)
    (path / "shard-00002-model-00001-of-00001.safetensors").write_bytes((path / FILE).read_bytes())
    with_index(path, lambda index: index["files"].update({"shard-00002-model-00001-of-00001.safetensors": [1, ""]}))
    index = shards.read_index(path)
    index = dataclasses.replace(index, files=dict.fromkeys(index.files, (index.files[FILE][0], "wrong")))
    for rank, file in enumerate(sorted(index.files)):
        with pytest.raises(CheckpointError, match=f"{file} does not match"):
            shards.check_files(path, index, rank, 2)
    shards.check_files(path, index, 2, 3)


def test_a_process_that_is_killed_while_it_saves_leaves_the_earlier_one(tmp_path: Path, monkeypatch):
    write(tmp_path, 1)
    reached = tmp_path / "reached"
    child = os.fork()
    if child == 0:
        # the files are there, and the index is not
        monkeypatch.setattr(shards, "_identity", lambda file: (reached.touch(), time.sleep(100)))
        write(tmp_path, 2)
        os._exit(0)
    limit = time.monotonic() + 60
    while not reached.exists() and time.monotonic() < limit:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert reached.exists()
    checkpoint, complaints = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.path, complaints) == (path_of(tmp_path, 1), [])
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in made().items())
    write(tmp_path, 3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000001.shards", "step-00000003.shards",
    ]  # fmt: skip


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path):
    write(tmp_path)
    path = path_of(tmp_path, 7)
    write_shards(path, {"student.other": torch.ones(3)}, progress(7), None)
    assert list(read_checkpoint(path).tensors) == ["student.other"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_older_ones_go_and_the_copy_is_of_the_moment(tmp_path: Path):
    tensors = {name: tensor.clone() for name, tensor in made().items()}
    with ShardSaver(ALONE, keep=2) as saver:
        for step in range(1, 6):
            saver.save(path_of(tmp_path, step), tensors, progress(step))
            saver.before_update()
            for tensor in tensors.values():
                tensor.add_(1)
        saver.wait()
    assert checkpoints_in(tmp_path) == [path_of(tmp_path, step) for step in (5, 4, 3)]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        path_of(tmp_path, s).name for s in (5, 4, 3)
    }
    kept = read_checkpoint(path_of(tmp_path, 4)).tensors
    assert all(torch.equal(kept[name], tensor + 3) for name, tensor in made().items())


def test_what_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    with ShardSaver(ALONE, keep=1) as saver:
        monkeypatch.setattr("torch.distributed.checkpoint.filesystem.os.fsync", full)
        saver.save(path_of(tmp_path, 2), made(), progress(2))
        with pytest.raises(
            RunError, match=r"cannot be written: No space left on device. Last checkpoint: .*0001.shards"
        ):
            saver.wait()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.shards"]


@pytest.mark.slow
def test_either_form_goes_on_with_the_others_run_to_the_bit(tiny: Config, tmp_path: Path):
    straight = pretrain(tiny.using(steps=6, out=tmp_path / "straight"))
    expected = read_checkpoint(checkpoint_path(straight, 6)).tensors
    for name, first in (("to shards", False), ("from shards", True)):
        out = tmp_path / name
        pretrain(tiny.using(steps=3, out=out, sharded_checkpoints=first))
        assert checkpoints_in(out) == [checkpoint_path(out, 3, sharded=first)]
        # the settings are found in either, and how they are saved is none that a run must keep
        assert settings_of_run(checkpoints_in(out)[0]).efficiency.sharded_checkpoints is first
        pretrain(tiny.using(steps=6, out=out, resume="auto", sharded_checkpoints=not first))
        path = checkpoint_path(out, 6, sharded=not first)
        assert checkpoints_in(out)[0] == path
        found = read_checkpoint(path).tensors
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        weights = load_encoder(path)[0].state_dict()
        assert all(torch.equal(tensor, expected[f"student.encoder.{key}"]) for key, tensor in weights.items())
