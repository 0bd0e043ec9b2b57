"""Files that should be weights and are none: a sentence for each, wherever weights or a checkpoint are read."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastpmae import UserError
from fastpmae.run.checkpoint import CheckpointError, read_checkpoint
from fastpmae.weights.foreign import read_foreign

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 343261720\n"


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html>\n<html><head>", "is a web page and holds no weights"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "is a web page and holds no weights"),
        (POINTER, r"a pointer of Git LFS to a file of 343,261,720 bytes .* `git lfs pull` fetches it"),
    ],
)
def test_empty_pages_and_pointers(name: str, content: bytes, sentence: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_foreign(tmp_path / name)
    with pytest.raises(CheckpointError, match=sentence):
        read_checkpoint(tmp_path / name)


def test_cut_off_files_say_how_much_is_there(tmp_path: Path):
    tensors = {"patch_embed.proj.weight": torch.zeros(32, 3, 8, 8)}
    save_file(tensors, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    for length in (50, len(whole) // 2, len(whole) - 1):
        (tmp_path / "w.safetensors").write_bytes(whole[:length])
        with pytest.raises(
            UserError, match=rf"is incomplete: it has {length:,} bytes of [\d,]+; fetch or copy it again"
        ):
            read_foreign(tmp_path / "w.safetensors")
        with pytest.raises(CheckpointError, match=rf"is incomplete: it has {length:,} bytes"):
            read_checkpoint(tmp_path / "w.safetensors")
    torch.save(tensors, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"is incomplete \(.*\): fetch or copy it again"):
        read_foreign(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
        {"dtype": "X", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [10**12, 10**12], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [0, 2**63 - 1], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [2**63, 2**63 + 4]},
    ],
    ids=str,
)
def test_odd_headers_are_a_sentence(entry: dict, tmp_path: Path):
    header = json.dumps({"patch_embed.proj.weight\x1b[31m": entry}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    for read in (read_foreign, read_checkpoint):
        with pytest.raises(UserError) as raised:
            read(tmp_path / "w.safetensors")
        assert str(raised.value).isprintable()
