"""`fastpmae-eval segment` as a user starts it: a folder of images and masks in, a network and figures out."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastpmae import UserError
from fastpmae.evaluate.cli import read_command
from fastpmae.evaluate.dense.arguments import Segment
from fastpmae.evaluate.dense.overlap import MaskScores
from fastpmae.evaluate.protocols import run_command
from fastpmae.evaluate.recipe import FINETUNE_PRESETS
from fastpmae.evaluate.result_files import ResultFiles
from tests.evaluate.dense.made import scene, start
from tests.test_train import environment

WORDS = [
    "--preset", "small", "--iterations", "4", "--warmup-iterations", "1", "--batch-size", "4", "--crop-size", "32",
    "--channels", "8", "--log-every", "2", "--eval-every", "0", "--heads", "2", "--workers", "1", "--device", "cpu",
]  # fmt: skip


def folder_of_pairs(folder: Path) -> Path:
    """train/ and val/ with images/ and masks/."""
    for split, numbers in (("train", range(5)), ("val", range(20, 22))):
        for part in ("images", "masks"):
            (folder / split / part).mkdir(parents=True)
        for number in numbers:
            pixels, mask, _ = scene(number)
            Image.fromarray(pixels).save(folder / split / "images" / f"{number}.png")
            Image.fromarray(mask.clip(-1, 2).astype("uint8")).save(folder / split / "masks" / f"{number}.png")
    return folder


def evaluated(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastpmae.evaluate.protocols", *map(str, words)],
        env={**environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_a_folder_in_a_network_and_figures_out(tmp_path: Path):
    pytest.importorskip("segmentation_models_pytorch", reason="pip install 'fastpmae[dense]'")
    images, out = folder_of_pairs(tmp_path / "set"), tmp_path / "out"
    start(tmp_path)
    done = evaluated("segment", tmp_path / "vit.pth", "--train", images, "--ignore", 255, "--out", out, *WORDS)
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "segment.json").read_text())
    assert f"segment: mIoU {record['miou']:.2f} %" in done.stdout
    assert (record["evaluation"], record["images"], record["classes"]) == ("segment", 2, 3)
    assert record["segment"]["iterations"] == 4
    assert set(record["yardsticks"]) == {"colour, contrast and place", "place alone"}
    for name, miou in record["yardsticks"].items():
        assert 0 <= miou <= 100
        assert f"without a network, by {name}: mIoU {miou:.2f} %" in done.stdout
    with (out / "segment-classes.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 3
    assert (out / "segment-confusion.png").exists()
    assert (out / "segment-overlays.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "segmenter.safetensors").exists()
    # whichever file begins with the result's name is one that another result would not replace
    assert set(out.glob("segment.*")) | set(out.glob("segment-*")) <= set(ResultFiles(out, "segment").every)
    assert (out / "train.log").read_text().splitlines()[-1].startswith("step 4/4: loss")


@pytest.mark.slow
def test_figures_are_of_the_step_that_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After a test at step 2 and an end at step 3, and of a training that stands beyond --steps."""
    pytest.importorskip("segmentation_models_pytorch", reason="pip install 'fastpmae[dense]'")
    from fastpmae.evaluate.dense import segment

    tests: list[int] = []

    def evaluated(*_: object, **how: object) -> MaskScores:
        tests.append(len(tests) + 1)  # a test's number is the pixels that it has wrong
        return MaskScores(torch.tensor([[10, tests[-1], 0], [0, 10, 0], [0, 0, 10]]), 2, torch.ones(2))

    monkeypatch.setattr(segment, "evaluate_segmenter", evaluated)
    images, out = folder_of_pairs(tmp_path / "set"), tmp_path / "out"
    start(tmp_path)
    words = ["segment", str(tmp_path / "vit.pth"), "--train", str(images), "--ignore", "255", "--out", str(out), *WORDS]
    words += ["--eval-every", "2", "--log-every", "50", "--no-yardsticks"]
    for number, more in ((2, ["--steps", "3"]), (3, ["--steps", "2", "--resume"])):
        run_command(read_command([*words, *more]))
        assert tests[-1] == number  # the first was at step 2
        record = json.loads((out / "segment.json").read_text())
        assert record["steps"] == 3
        assert record["pixel_accuracy"] == pytest.approx(100 * 30 / (30 + number), abs=1e-3)


@pytest.mark.untyped
def test_presets_are_taken_by_their_command():
    """A preset of one command is none of another's, and its settings are flags."""
    command = read_command(["segment", "w", "--train", "t", "--preset", "mae", "--iterations", "2000"])
    assert isinstance(command, Segment)
    assert (command.config.lr, command.config.relative_positions, command.config.iterations) == (1e-4, True, 2000)
    with pytest.raises(UserError, match="--preset deit: there is no such preset; choose one of paper, mae, small"):
        read_command(["segment", "w", "--train", "t", "--preset", "deit"])
    with pytest.raises(UserError, match="--preset mae: there is no such preset"):
        read_command(["finetune", "w", "--train", "t", "--preset", "mae"])
    other = read_command(["finetune", "w", "--train", "t", "--preset", "small"])
    assert getattr(other, "config", None) == FINETUNE_PRESETS["small"]


def test_every_flag_that_the_page_names_is_there():
    """In a table of the page itself, or of `fastpmae-plan` and torchrun; tests/benchmarks looks at the benchmarks'."""
    lines = (Path(__file__).parents[3] / "docs/dense.md").read_text().splitlines()
    page = "\n".join(line for line in lines if not line.startswith("python -m benchmarks."))
    flags = set(re.findall(r"^\| `--([a-z0-9-]+)` \|", page, re.MULTILINE)) | {
        "model",
        "gpu",
        "gpus",
        "images",
        "format",
    }
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", page)) - {"nproc-per-node"}
    assert len(named) > 20
    assert {name for name in named if name not in flags and name.removeprefix("no-") not in flags} == set()


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    from fastpmae.evaluate.dense.extra import imported

    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(UserError, match=r"is not installed: pip install 'fastpmae\[dense\]'"):
        imported("segmentation_models_pytorch", "segmentation-models-pytorch")
