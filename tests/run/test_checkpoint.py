"""Checkpoints hold what was put in, and say so when they no longer do."""

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastpmae import RunError, UserError, load_encoder, pretrain
from fastpmae.pictures.analysis import networks_of
from fastpmae.pretraining.cli import settings_of_run
from fastpmae.run.checkpoint import (
    CheckpointError,
    checkpoint_path,
    checkpoints_in,
    find_checkpoint,
    read_checkpoint,
    read_progress,
    write_checkpoint,
)
from tests.made import tiny_settings

TENSORS = {
    "student.weight": torch.arange(12.0).view(3, 4).mT,
    "rng.cpu": torch.arange(5, dtype=torch.uint8),
    "optimizer.weight.step": torch.tensor(3.0),
}
PROGRESS = {"step": 7, "steps_per_epoch": 5, "bad_images": 0, "fingerprint": "f", "config": {}}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = checkpoint_path(tmp_path, 7)
    write_checkpoint(path, TENSORS, PROGRESS, keep=1)
    return path


def test_what_is_written_is_read(written: Path):
    checkpoint = read_checkpoint(written)
    assert checkpoint.progress == read_progress(written) == PROGRESS
    assert checkpoint.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in checkpoint.tensors.items())
    assert checkpoint.part("optimizer.weight").keys() == {"step"}


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, 300, -1])
def test_truncated_at_any_place(written: Path, length: int):
    written.write_bytes(written.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"step-00000007.safetensors is damaged"):
        read_checkpoint(written)


def test_every_single_flipped_byte_is_noticed(written: Path):
    data = written.read_bytes()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        written.write_bytes(damaged)
        try:
            checkpoint = read_checkpoint(written)
        except CheckpointError:
            continue
        # what passes is spelt otherwise and means the same
        assert checkpoint.tensors.keys() == TENSORS.keys(), place
        assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in checkpoint.tensors.items()), place
        assert checkpoint.progress == PROGRESS, place


def test_a_safetensors_file_by_others_is_no_checkpoint(tmp_path: Path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no fastpmae checkpoint"):
        read_checkpoint(tmp_path / "other.safetensors")


def test_the_older_ones_go(tmp_path: Path):
    for step in range(1, 6):
        write_checkpoint(checkpoint_path(tmp_path, step), TENSORS, {**PROGRESS, "step": step}, keep=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == [f"step-0000000{step}.safetensors" for step in (5, 4, 3)]


def test_a_failed_write_leaves_nothing(written: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("fastpmae.run.checkpoint.save_file", full)
    with pytest.raises(RunError, match=r"no space left on device. Last checkpoint: .*step-00000007"):
        write_checkpoint(checkpoint_path(written.parent.parent, 8), TENSORS, {**PROGRESS, "step": 8}, keep=1)
    assert list(written.parent.iterdir()) == [written]


def test_it_is_as_readable_as_other_files_and_the_mask_is_never_touched(tmp_path: Path, monkeypatch):
    """The mask is the process's: a thread that asked for it would open what another writes to everybody."""
    before, umask = os.umask(0o027), os.umask
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the mask was changed"))
        write_checkpoint(checkpoint_path(tmp_path, 7), TENSORS, PROGRESS, keep=1)
    finally:
        umask(before)
    assert checkpoint_path(tmp_path, 7).stat().st_mode & 0o777 == 0o640


def test_a_run_folder_stands_for_its_newest_sound_checkpoint(written: Path):
    folder = written.parent.parent
    checkpoint_path(folder, 9).write_bytes(b"torn")
    assert find_checkpoint(folder).path == written
    written.unlink()
    with pytest.raises(CheckpointError, match=r"no sound checkpoint in .*; .*step-00000009.safetensors is damaged"):
        find_checkpoint(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rng.cpu", "log.sums"])
def test_states_that_are_none_are_a_sentence(name: str, tmp_path: Path, small_beton: Path):
    config = tiny_settings(small_beton).using(out=tmp_path / "run", steps=2)
    path = checkpoint_path(pretrain(config), 2)
    sound = read_checkpoint(path)
    for odd in (torch.zeros_like(sound.tensors[name]), sound.tensors[name].to(torch.complex64)):
        if name == "log.sums" and not odd.is_complex():
            continue
        write_checkpoint(path, dict(sound.tensors) | {name: odd}, sound.progress, keep=0)
        with pytest.raises(CheckpointError, match=r"rng\.cpu|random generator|no sound sums"):
            pretrain(config.using(resume="auto", steps=3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "name", "value", "sentence"),
    [
        ("network", "width", 4 * 10**9, r"--width 4000000000: at most 65,536"),
        ("network", "width", 4096, r"does not fit this run: student\..* is float32 \[.*32.*\] in it"),
        ("network", "depth", 10**8, r"--depth 100000000: at most 1,000"),
        ("network", "depth", 900, r"does not fit this run: student\.encoder\.blocks\.10\d?\."),
        ("network", "prototypes", 10**12, r"--prototypes 1000000000000: at most"),
        ("network", "prototypes", 2**23, r"does not fit this run: student\.head\."),
        ("network", "model", "\x1b[31mX", r"--model \\x1b\[31mX: there is no such model"),
        ("optimizer", "blr", 10**400, r"optimizer\.blr in .* is 1000\d*…; expected a number"),
        ("optimizer", "epochs", 10**30, r"--epochs 1000.*: at most"),
        (
            "data",
            "beton",
            "a\0b",
            r"data\.beton in .* is 'a\\x00b'; expected a path or several",
        ),
        ("data", "beton", "", r"data\.beton in .* is ''; expected a path or several"),
        ("run", "\x1b]0;pwn\x07", 1, r"a setting run\.\\x1b\]0;pwn\\x07, which does not exist"),
    ],
)
def test_forged_settings_are_a_sentence_before_anything_is_made(group, name, value, sentence, tmp_path, small_beton):
    """Their digest fits: whoever writes a file can compute one."""
    config = tiny_settings(small_beton).using(out=tmp_path / "run", steps=1)
    path = checkpoint_path(pretrain(config), 1)
    sound = read_checkpoint(path)
    sound.progress["config"][group][name] = value
    write_checkpoint(path, sound.tensors, sound.progress, keep=0)
    for use in (
        lambda: load_encoder(path),
        lambda: load_encoder(path, "random"),
        lambda: networks_of(read_checkpoint(path)),
        lambda: pretrain(settings_of_run(tmp_path / "run").using(out=tmp_path / "run", resume="auto", steps=2)),
    ):
        with pytest.raises(UserError) as raised:
            use()
        assert re.search(sentence, str(raised.value)), raised.value


@pytest.mark.slow
def test_a_step_past_the_end_is_a_sentence(tmp_path: Path, small_beton: Path):
    config = tiny_settings(small_beton).using(out=tmp_path / "run", steps=1)
    path = checkpoint_path(pretrain(config), 1)
    sound = read_checkpoint(path)
    write_checkpoint(path, sound.tensors, sound.progress | {"step": 2**62}, keep=0)
    with pytest.raises(UserError, match=r"stands after step [\d,]+, and these settings end after 15"):
        pretrain(config.using(resume="auto"))


def test_a_pipe_is_no_checkpoint(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_checkpoint(tmp_path / "pipe.safetensors")
