"""Every example runs as it is, on the images it is given or on the demo's."""

import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import fastpmae.demo.demo
from tests.made import REPOSITORY

FOLDER = REPOSITORY / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")


def losses(output: str) -> list[list[float]]:
    """The losses of each step that an example printed."""
    steps = re.findall(r"^step (\d+): (.*)$", output, re.MULTILINE)
    assert [int(number) for number, _ in steps] == list(range(1, len(steps) + 1))
    return [[float(part.split()[1]) for part in parts.split(", ")] for _, parts in steps]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run an example in this process, which has torch and timm loaded already; its output."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.delitem(sys.modules, "common", raising=False)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    yield run
    sys.modules.pop("common", None)


def test_there_is_one_for_each_adapter():
    assert EXAMPLES == ["dinov2", "ibot", "lightly_simclr", "mae", "sdae", "timm_train"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains(name, run, small_beton):
    """Seven steps are more than an epoch of the 44 images. The same seed, the same losses."""
    arguments = (str(small_beton), "--steps", "7", "--batch-size", "8", "--engine", "torch", "--device", "cpu")
    output = run(name, *arguments)
    assert len(losses(output)) == 7
    assert all(math.isfinite(loss) for step in losses(output) for loss in step)
    if name == "timm_train":
        assert "accuracy on 44 images" in output
    else:
        assert run(name, *arguments) == output


def test_an_example_without_images_takes_the_demos(run, small_beton, monkeypatch):
    asked = []

    def demo(folder: Path) -> tuple[Path, Path]:
        asked.append(folder)
        return small_beton, small_beton

    monkeypatch.setattr(fastpmae.demo.demo, "write_demo_betons", demo)
    assert len(losses(run("mae", "--steps", "1", "--batch-size", "4", "--device", "cpu"))) == 1
    assert asked == [Path("demo")]


IN_TURN = """
import runpy, sys
folder, *words = sys.argv[1:]
sys.path[0] = folder  # as Python has it where a file is run
for name in NAMES:
    print(f"example {name}", flush=True)
    sys.argv = [f"{folder}/{name}.py", *words]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_examples_run_by_themselves(small_beton, tmp_path):
    """In a process that has loaded nothing for them, and in another folder; one imports torch for all."""
    words = [str(FOLDER), str(small_beton), "--steps", "2", "--batch-size", "8"]
    command = [sys.executable, "-c", IN_TURN.replace("NAMES", repr(EXAMPLES)), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outputs = re.split(r"^example (\w+)$", done.stdout, flags=re.MULTILINE)[1:]
    assert outputs[::2] == EXAMPLES
    assert [len(losses(output)) for output in outputs[1::2]] == [2] * len(EXAMPLES)
