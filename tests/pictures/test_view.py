import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastpmae.pictures.view import COMPLEX, SIMPLE, draw_views
from fastpmae_loaders import ViewSettings
from fastpmae_loaders.errors import UserError
from tests.made import REPOSITORY


@pytest.mark.slow
def test_draws_samples(small_beton, tmp_path):
    settings = ViewSettings(image_size=64, patch_size=16, folds=5)
    out = draw_views(small_beton, tmp_path / "views.png", samples=3, settings=settings)
    picture = np.array(Image.open(out).convert("RGB")).astype(int)
    assert picture.shape[0] > 600
    assert picture.shape[1] > 1000
    # both crops' colours are on it, and so is more than text on white
    for colour in (SIMPLE, COMPLEX):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(picture - wanted).max(-1) < 12).sum() > 300
    assert (picture.min(-1) < 200).mean() > 0.2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["views.png"]


@pytest.mark.slow
def test_epochs_differ_and_repeat(small_beton, tmp_path):
    settings = ViewSettings(image_size=64, patch_size=16)

    def draw(epoch: int) -> bytes:
        options = {"index": (1, 2), "epoch": epoch, "settings": settings, "engine": "torch"}
        return Path(draw_views(small_beton, tmp_path / "views.png", **options)).read_bytes()

    assert draw(0) == draw(0) != draw(1)


@pytest.mark.parametrize(
    ("out", "options", "said"),
    [
        ("views.gif", {}, "must end in"),
        ("none/views.png", {}, "no folder"),
        ("views.png", {"samples": 0}, "between 1 and 64"),
        ("views.png", {"index": (3, 44)}, "no sample 44"),
        ("views.png", {"seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_drawn(small_beton, tmp_path, out, options, said):
    with pytest.raises(UserError, match=said):
        draw_views(small_beton, tmp_path / out, engine="torch", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_command_line(small_beton, tmp_path):
    paths = os.pathsep.join(str(REPOSITORY / part) for part in (".", "kernels", "loaders"))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fastpmae.pictures.view", *words],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=200,
        )

    out = tmp_path / "views.png"
    done = run(str(small_beton), str(out), "--samples", "2", "--image-size", "64", "--folds", "5", "--epoch", "3")
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 10_000
    done = run(str(tmp_path / "none.beton"), str(out))
    assert done.returncode == 2
    assert done.stderr.startswith("fastpmae-view: error: ")
    assert done.stderr.count("\n") == 1
