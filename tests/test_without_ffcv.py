"""Every command where FFCV, OpenCV and libjpeg-turbo cannot be had, and what it says to those who ask for FFCV."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastpmae_loaders import Beton
from fastpmae_loaders.sources.beton import JPG
from tests.made import REPOSITORY, module_of, write_tree

TINY = [
    "--preset", "demo", "--image-size", "32", "--width", "32", "--heads", "2", "--depth", "2", "--decoder-width", "32",
    "--decoder-depth", "1", "--decoder-heads", "2", "--head-hidden", "32", "--head-bottleneck", "16",
    "--prototypes", "24", "--batch-size", "8", "--steps", "1", "--workers", "1", "--device", "cpu", "--no-tensorboard",
]  # fmt: skip
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Runs a command by its short name, in a folder of its own; nothing that it started may have loaded them."""
    folders = [REPOSITORY / "tests/programs/without_ffcv", *(REPOSITORY / part for part in ("", "kernels", "loaders"))]
    told = tmp_path / "told"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "LOADED": str(told)}

    def run(name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", module_of(name), *map(str, words)],
            cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=500,
        )  # fmt: skip
        assert not told.exists(), told.read_text()
        return done

    return run


@pytest.mark.slow
def test_from_images_to_pictures_without_it(command: Command, tmp_path: Path):
    write_tree(tmp_path / "tree", 24)
    for words in (
        ["write", "tree", "images.beton", "--workers", "2"],
        ["train", "--beton", "images.beton", "--out", "run", *TINY],
        ["view", "images.beton", "views.png", "--samples", "2", "--image-size", "32"],
        ["embed", "run", "images.beton", "features.npz", "--device", "cpu"],
        ["eval", "knn", "run", "--train", "images.beton", "--val", "images.beton", "--k", "3", "--device", "cpu"],
        ["plan", "--beton", "images.beton", "--gpu", "h100", *TINY],
        ["write", "--check", "images.beton"],
    ):
        done = command(*words)
        assert done.returncode == 0, (words, done.stderr)
    assert (tmp_path / "views.png").stat().st_size > 0
    assert (Beton(tmp_path / "images.beton").mode == JPG).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["train", "--beton", "images.beton", "--out", "run", "--loader", "ffcv", *TINY],
        ["view", "images.beton", "views.png", "--engine", "ffcv", "--image-size", "32"],
    ],
    ids=lambda words: words[0],
)
def test_who_asks_for_it_is_told_how_to_get_it(command: Command, small_beton: Path, tmp_path: Path, words: list[str]):
    (tmp_path / "images.beton").symlink_to(small_beton)
    done = command(*words)
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert "engine 'ffcv' needs the package ffcv, which is not installed here" in sentence
    assert "pip install 'fastpmae-loaders[ffcv]'" in sentence
    assert not (tmp_path / "run").exists()
