"""A .beton file that is cut short, or written over, under its readers: a sentence, and no process dies of SIGBUS."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastpmae_loaders.sources.jpeg import turbo_available
from tests.loaders.conftest import jpeg
from tests.loaders.files import open_files, write_beton
from tests.made import REPOSITORY


@pytest.mark.slow
def test_every_reader_says_so(tmp_path: Path) -> None:
    images = [jpeg(number % 20, 60, 50) for number in range(200)]
    path = write_beton(tmp_path / "cut.beton", images, [(60, 50)] * 200)
    assert path.stat().st_size > 100_000
    dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    engines = [*(["ffcv"] if turbo_available() else []), *(["dali"] if dali else []), "torch"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.programs.cut_short", path, *engines],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'loaders'}"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    lines = done.stdout.splitlines()
    assert len(lines) == 6 * len(engines)
    for line in lines:
        sentence = "has been written to since" if "written over" in line else "has become shorter since it was opened"
        assert sentence in line, line


def test_a_reader_gives_its_file_back(tmp_path: Path) -> None:
    from fastpmae_loaders import Beton

    path = write_beton(tmp_path / "one.beton", [jpeg(0, 40, 30)], [(40, 30)])
    if not Path("/proc/self/fd").exists():
        pytest.skip("open files are counted in /proc")
    for _ in range(20):
        beton = Beton(path)
        assert beton.payload(0).tobytes() == jpeg(0, 40, 30)
        assert open_files(path) == 1
    del beton
    assert open_files(path) == 0
