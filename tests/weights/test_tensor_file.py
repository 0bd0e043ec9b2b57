"""Files for others: the same contents are the same bytes, whenever they are written."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import load_file

from fastpmae import Config, export_encoder, pretrain
from fastpmae.plotting import save_picture
from fastpmae.weights.tensor_file import save_file, save_tensors

HEADER = {"format": "pt", "z": 'quoted "word"', "a": "東京 \u2028", "ctrl": "\x01\t\n\r\x7f\\", "m": "", "b": "x" * 99}


def test_tensors_and_their_header(tmp_path: Path):
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.int64), "é\n": torch.zeros(0)}
    written = set()
    for number in range(6):
        path = tmp_path / f"{number}.safetensors"
        save_tensors(tensors, path, HEADER)
        written.add(path.read_bytes())
    assert len(written) == 1
    back = load_file(tmp_path / "0.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == HEADER


@pytest.mark.parametrize("save", [save_file, save_tensors])
def test_what_cannot_be_written_is_an_error_of_the_system(tmp_path: Path, save):
    with pytest.raises(OSError, match="No such file"):
        save({"a": torch.ones(3)}, tmp_path / "no" / "file.safetensors", {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["timm", "huggingface", "plain"])
def test_exports(tiny: Config, tmp_path: Path, kind):
    run = pretrain(tiny.using(steps=1))
    folders = []
    for _ in range(3):
        folder = tmp_path / f"{len(folders)}" / "same"
        folder.parent.mkdir()
        export_encoder(run, folder, format=kind)
        folders.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert folders[0] == folders[1] == folders[2]
    said = json.loads(folders[0]["config.json"])
    # what means nothing on another machine is not told
    assert str(tmp_path) not in json.dumps(said)
    export_encoder(run, tmp_path / "a.safetensors")
    export_encoder(run, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_archives_of_features(tmp_path: Path, monkeypatch):
    """NumPy's archives name no time; this is what fastpmae-embed writes."""
    for number in range(2):
        with (tmp_path / f"{number}.npz").open("wb") as file:
            np.savez(file, features=np.ones((3, 2)), labels=np.arange(3))
        monkeypatch.setattr(time, "time", lambda: 2e9)
    assert (tmp_path / "0.npz").read_bytes() == (tmp_path / "1.npz").read_bytes()


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_pictures(tmp_path: Path, kind: str, monkeypatch):
    for number in range(2):
        figure = Figure((3, 2))
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.plot([1, 2], [1, 3], "o-", label="a line")
        axes.fill_between([1, 2], [0, 0], [1, 1], hatch="/")
        axes.legend()
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(10**9 * (1 + number)))
        save_picture(figure, tmp_path / f"{number}.{kind}", dpi=70)
    assert (tmp_path / f"0.{kind}").read_bytes() == (tmp_path / f"1.{kind}").read_bytes()
