"""Checkpoints hold what was put in, and say so when they no longer do."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastpmae import RunError
from fastpmae.checkpoint import (
    CheckpointError,
    checkpoint_path,
    checkpoints_in,
    find_checkpoint,
    read_checkpoint,
    read_progress,
    write_checkpoint,
)

TENSORS = {
    "student.weight": torch.arange(12.0).view(3, 4).mT,
    "rng.cpu": torch.arange(5, dtype=torch.uint8),
    "optimiser.weight.step": torch.tensor(3.0),
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
    assert checkpoint.part("optimiser.weight").keys() == {"step"}


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

    monkeypatch.setattr("fastpmae.checkpoint.save_file", full)
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
