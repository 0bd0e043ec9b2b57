"""Long use leaves memory, threads and open files as they were: each case in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines import FFCV
from tests.loaders.conftest import jpeg
from tests.loaders.files import write_beton
from tests.made import REPOSITORY

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="memory and threads are read from /proc")

ENGINES = [
    FFCV,
    "torch",
    pytest.param(
        "dali",
        marks=pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="DALI is not installed")
        if importlib.util.find_spec("nvidia")
        else pytest.mark.skip(reason="DALI is not installed"),
    ),
]


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 samples of 20 sizes, one of which does not decode."""
    images = [jpeg(number % 20, 40 + number % 20, 30 + number % 20) for number in range(1000)]
    images[500] = images[500][:300]
    sizes = [(40 + number % 20, 30 + number % 20) for number in range(1000)]
    return write_beton(tmp_path_factory.mktemp("leaks") / "thousand.beton", images, sizes)


def told(cases: str, path: Path, engine: str, *words: str) -> list[Any]:
    """What each of some cases of tests/programs/long_use.py has found, one after the other in one process."""
    folders = os.pathsep.join(str(REPOSITORY / part) for part in (".", "kernels", "loaders"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.programs.long_use", cases, path, engine, *words],
        env={**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-1 - cases.count("+") :]]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_thirty_epochs_of_a_thousand_samples(thousand: Path, engine: str) -> None:
    """For a hundred: `python -m tests.programs.long_use epochs images.beton ENGINE 100`."""
    (found,) = told("epochs", thousand, engine, "30")
    sizes = found["sizes"]
    print(engine, [round(size / 1e6, 1) for size in sizes])
    # a picture is 4 to 9 kB, as it is decoded and as a batch shows it: of 24,000 samples none may cost 330 bytes
    assert max(sizes[2:]) <= sizes[1] + 8e6
    assert max(sizes[2:]) <= 1.02 * sizes[1]
    assert found["before"] == found["after"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES[:1])
def test_threads_that_end_leave_no_decoder(tmp_path: Path, engine: str) -> None:
    """An epoch's threads end with it: of eight threads and 200 epochs 4 kB each would be more than 6 MB."""
    images = [jpeg(number % 20, 40, 30) for number in range(40)]
    path = write_beton(tmp_path / "forty.beton", images, [(40, 30)] * 40)
    (found,) = told("epochs_of_many_threads", path, engine)
    assert found[1] <= found[0] + 3e6


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES[:2])
def test_loaders_that_come_and_go(thousand: Path, engine: str) -> None:
    (found,) = told("loaders", thousand, engine)
    (memory, tasks, files), (later, *counts) = found
    assert later <= memory + 4e6  # 40 kB a loader, of which numba's and torch's own caches are some
    assert counts == [tasks, files]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_no_thread_stays_behind(thousand: Path, engine: str) -> None:
    """An epoch left early, two at once, an iteration that is dropped, one that is never finished.

    And a real SIGINT, in the same process, while the program waits for a batch, or works on one.
    """
    iterations, interrupts = told("iterations+ctrl_c", thousand, engine)
    assert iterations == {"early": True, "closed": True}
    assert interrupts == [True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("left", ["at its end", "early"])
def test_ctrl_c_at_every_line(tmp_path: Path, left: str) -> None:
    """An interrupt before any line of the loader's own that the program runs, once before each."""
    few = write_beton(tmp_path / "few.beton", [jpeg(0, 40, 30)] * 4, [(40, 30)] * 4)
    ((lines, leaks),) = told("ctrl_c_at_every_line", few, "torch", left)
    assert lines > 100
    assert leaks == []
