"""Pictures with names in any script: no warning, no formula, and where a font has the signs they are drawn."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from fastpmae import plotting, pretrain, write_beton
from fastpmae.evaluate.metrics import Scores, write_scores
from fastpmae.evaluate.result_files import ResultFiles
from fastpmae.pictures.view import draw_views
from fastpmae.plotting import UNKNOWN, save_picture
from fastpmae_loaders import ViewSettings
from tests.made import REPOSITORY, tiny_settings, write_tree

NAMES = ["东京 猫", "犬 ねこ", "고양이", "कुत्ता", "🦊", "$\\frac{$", "a$b$c", "\x1b[31mred", "line\nbreak", "été", "Ωμ"]


def drawn(words: str, path: Path) -> np.ndarray:
    figure = Figure((4, 1))
    FigureCanvasAgg(figure)
    figure.text(0.1, 0.5, words, size=20, parse_math=False)
    save_picture(figure, path, dpi=60)
    with Image.open(path) as picture:
        return np.array(picture.convert("L"))


def test_a_sign_that_no_font_has_is_shown_as_one(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(plotting, "_fonts", list)
    assert (drawn("a 东京", tmp_path / "a.png") == drawn(f"a {UNKNOWN}{UNKNOWN}", tmp_path / "b.png")).all()
    assert (drawn("été", tmp_path / "a.png") != drawn(f"{UNKNOWN}t{UNKNOWN}", tmp_path / "b.png")).any()


def test_signs_come_from_the_font_that_has_them(tmp_path: Path, monkeypatch):
    """matplotlib's own fonts: what one lacks another has, as a user's has other scripts."""
    plain = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    other = font_manager.get_font(font_manager.findfont("STIXGeneral")).get_charmap()
    sign = chr(min(code for code in other if code > 0x2000 and code not in plain and chr(code).isprintable()))
    with_font = drawn(f"a {sign}", tmp_path / "a.png")
    monkeypatch.setattr(plotting, "_fonts", list)
    assert (with_font != drawn(f"a {sign}", tmp_path / "b.png")).any()


def test_results_with_any_names(tmp_path: Path):
    labels = torch.arange(len(NAMES))
    scores = Scores(labels, labels[:, None].roll(1, 0))
    write_scores(ResultFiles(tmp_path, "knn"), scores, NAMES, {})
    assert "东京 猫" in (tmp_path / "knn-classes.csv").read_text(encoding="utf-8")
    with Image.open(tmp_path / "knn-confusion.png") as picture:
        assert picture.size == (960, 840)


@pytest.mark.slow
def test_views_of_any_names(tmp_path: Path, monkeypatch):
    """A class's name and a file's are text, also with a dollar in them."""
    tree = write_tree(tmp_path / "tree", 3)
    for number, name in enumerate(("猫 $\\frac{", "$a$", "🦊")):
        (tree / f"class_{number}").rename(tree / name)
    write_beton(tree, tmp_path / "图$像.beton")
    settings = ViewSettings(image_size=64, patch_size=16)
    for end in ("png", "pdf", "svg"):
        out = draw_views(tmp_path / "图$像.beton", tmp_path / f"v.{end}", samples=3, settings=settings, engine="torch")
        assert Path(out).stat().st_size > 10_000


@pytest.mark.slow
def test_a_terminal_that_lacks_the_letters(tmp_path: Path):
    """An ASCII locale: the work is done, and what is said of it is escaped, on the terminal and in every file read."""
    tree = write_tree(tmp_path / "tree", 30)
    (tree / "class_0").rename(tree / "猫")
    paths = os.pathsep.join(str(REPOSITORY / part) for part in (".", "kernels", "loaders"))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": "ascii"}

    def run(*words: object, **more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, words)], env=environment | more, capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stderr.decode()
        assert b"Traceback" not in done.stderr
        return done.stdout.decode("ascii")

    beton = tmp_path / "d.beton"
    assert r"\u732b" in run("fastpmae_loaders.write.cli", tree, beton)
    run_folder = pretrain(tiny_settings(beton).using(steps=1, out=tmp_path / "run"))
    # files are read elsewhere too: their encoding is not the terminal's
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "LANG": "C"}
    run("fastpmae.evaluate.protocols", "knn", run_folder, "--train", beton, "--k", 3, "--workers", 1, **plain)
    assert "猫" in (run_folder / "eval/knn-student-classes.csv").read_text(encoding="utf-8")
