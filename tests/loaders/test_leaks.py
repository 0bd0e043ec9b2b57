"""Long use leaves memory, threads and open files as they were: each case in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from fastpmae_loaders.sources.jpeg import turbo_available
from tests.loaders.conftest import jpeg
from tests.loaders.files import write_beton
from tests.made import REPOSITORY

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="memory and threads are read from /proc")

ENGINES = [
    pytest.param("ffcv", marks=pytest.mark.skipif(not turbo_available(), reason="ffcv is not installed")),
    "torch",
    pytest.param(
        "dali",
        marks=pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="DALI is not installed")
        if importlib.util.find_spec("nvidia")
        else pytest.mark.skip(reason="DALI is not installed"),
    ),
]

COMMON = """
    import gc, json, os, signal, sys, threading, time
    import numpy as np
    from fastpmae_loaders import PairedViews, ViewSettings
    path, engine = sys.argv[1:]
    settings = ViewSettings(image_size=32, patch_size=8)
    def opened(batch_size=50, **options):
        return PairedViews(path, batch_size, engine, settings, workers=2, **options)
    def tasks():
        return len(os.listdir("/proc/self/task"))
    def files():
        return len(os.listdir("/proc/self/fd"))
    def memory():
        gc.collect()
        # anonymous memory alone: pages of libraries count as ours or not by who else uses them just now
        status = open("/proc/self/status").read()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])
    def settled(count, limit=5.0):
        # a thread that was told to end is gone a little later
        until = time.monotonic() + limit
        while tasks() > count and time.monotonic() < until:
            time.sleep(0.01)
        ours = [thread.name for thread in threading.enumerate() if thread.name.startswith("fastpmae-loader")]
        return tasks() <= count and not ours
"""


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 samples of 20 sizes, one of which does not decode."""
    images = [jpeg(number % 20, 40 + number % 20, 30 + number % 20) for number in range(1000)]
    images[500] = images[500][:300]
    sizes = [(40 + number % 20, 30 + number % 20) for number in range(1000)]
    return write_beton(tmp_path_factory.mktemp("leaks") / "thousand.beton", images, sizes)


def told(code: str, path: Path, engine: str) -> Any:
    """What a process that runs COMMON and then `code` prints, as JSON."""
    folders = os.pathsep.join(str(REPOSITORY / part) for part in (".", "kernels", "loaders"))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMMON) + textwrap.dedent(code), str(path), engine],
        env={**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_hundred_epochs_of_a_thousand_samples(thousand: Path, engine: str) -> None:
    found = told(
        """
        sizes = []
        with opened() as views:
            for epoch in range(100):
                views.set_epoch(epoch)
                for batch in views:
                    pass
                if epoch % 10 == 9:
                    sizes.append(memory())
                if epoch == 19:
                    before = tasks(), files()
            after = tasks(), files()
        print(json.dumps({"sizes": sizes, "before": before, "after": after}))
        """,
        thousand,
        engine,
    )
    sizes = found["sizes"]
    print(engine, [round(size / 1e6, 1) for size in sizes])
    assert max(sizes[2:]) <= 1.02 * sizes[1]
    # what the process itself takes hides a small leak: 80,000 samples may not cost 100 bytes each
    assert max(sizes[2:]) <= sizes[1] + 8e6
    assert found["before"] == found["after"]


@pytest.mark.parametrize("engine", ENGINES[:1])
def test_threads_that_end_leave_no_decoder(tmp_path: Path, engine: str) -> None:
    """An epoch's threads end with it: of eight threads and 200 epochs 4 kB each would be more than 6 MB."""
    images = [jpeg(number % 20, 40, 30) for number in range(40)]
    found = told(
        """
        sizes = []
        with PairedViews(path, 10, engine, settings, workers=8) as views:
            for epoch in range(250):
                views.set_epoch(epoch)
                for batch in views:
                    pass
                if epoch in (49, 249):
                    sizes.append(memory())
        print(json.dumps(sizes))
        """,
        write_beton(tmp_path / "forty.beton", images, [(40, 30)] * 40),
        engine,
    )
    assert found[1] <= found[0] + 3e6


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_loaders_that_come_and_go(thousand: Path, engine: str) -> None:
    found = told(
        """
        sizes = []
        for number in range(150):
            with opened() as views:
                next(iter(views))
            del views
            if number in (49, 149):
                sizes.append((memory(), tasks(), files()))
        print(json.dumps(sizes))
        """,
        thousand,
        engine,
    )
    (memory, tasks, files), (later, *counts) = found
    assert later <= memory + 4e6  # 40 kB a loader, of which numba's and torch's own caches are some
    assert counts == [tasks, files]


@pytest.mark.parametrize("engine", ENGINES)
def test_no_thread_stays_behind(thousand: Path, engine: str) -> None:
    """An epoch left early, two at once, an iteration that is dropped, one that is never finished."""
    found = told(
        """
        with opened() as views:
            next(iter(views))
        gc.collect()
        before = tasks()
        views = opened()
        for batch in views:
            break
        gc.collect()
        # DALI's own threads are its pipeline's, which lives as long as the loader
        working = tasks() if engine == "dali" else before
        for _ in range(3):
            for batch in views:
                break
        early = settled(working)
        for _, first, second in zip(range(3), views, views):
            assert (first.index == second.index).all()
        del first, second
        gc.collect()
        both = views
        first, second = iter(both), iter(both)
        next(first), next(second), next(second)
        first.close()
        second.close()
        held = iter(views)
        next(held)
        views.close()
        closed = settled(before)
        assert next(held, None) is None
        del held, views
        print(json.dumps({"early": early, "closed": closed}))
        """,
        thousand,
        engine,
    )
    assert found == {"early": True, "closed": True}


@pytest.mark.parametrize("engine", ENGINES)
def test_ctrl_c(thousand: Path, engine: str) -> None:
    """A real SIGINT while the program waits for a batch, or works on one."""
    found = told(
        """
        with opened() as views:
            next(iter(views))
        before = tasks()
        ends = []

        def press(ended, after=0.1):
            # again after a while: Python passes over an interrupt that falls into a __del__
            while not ended.wait(after):
                os.kill(os.getpid(), signal.SIGINT)
                after = 3.0

        for pause in (0.0, 0.002, 0.05):
            ended = threading.Event()
            presser = threading.Thread(target=press, args=(ended,))
            presser.start()
            try:
                with opened() as views:
                    while True:
                        for batch in views:
                            time.sleep(pause)
            except KeyboardInterrupt:
                ended.set()
                presser.join()
                ends.append(settled(before))
        print(json.dumps(ends))
        """,
        thousand,
        engine,
    )
    assert found == [True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("left", ["at its end", "early"])
def test_ctrl_c_at_every_line(tmp_path: Path, left: str) -> None:
    """An interrupt before any line of the loader's own that the program runs, once before each."""
    few = write_beton(tmp_path / "few.beton", [jpeg(0, 40, 30)] * 4, [(40, 30)] * 4)
    found = told(
        f"""
        import linecache
        left = {left!r}
        OWN = ("stream.py", "runner.py", "paired.py")

        class Presser:
            # presses before the n-th line, and never again
            def __init__(self, n):
                self.left, self.where = n, None
            def __call__(self, frame, event, argument):
                if os.path.basename(frame.f_code.co_filename) not in OWN:
                    return None
                # a `with` is met again between its body and the lock's release, where no signal can fall
                line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
                if event == "line" and not line.strip().startswith("with "):
                    self.left -= 1
                    if self.left == 0:
                        self.where = f"{{os.path.basename(frame.f_code.co_filename)}}:{{frame.f_lineno}}"
                        raise KeyboardInterrupt
                return self

        # an interrupt in __del__ is passed over, by Python's rules
        sys.unraisablehook = lambda unraisable: None
        with opened(2) as views:
            next(iter(views))
        before = tasks()
        pressed, leaks = [], []
        while True:
            presser = Presser(len(pressed) + 1)
            sys.settrace(presser)
            try:
                with opened(2) as views:
                    for batch in views:
                        if left == "early":
                            break
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
            if presser.where is None:
                break
            pressed.append(presser.where)
            if not settled(before):
                leaks.append(presser.where)
                before = tasks()
        print(json.dumps([len(pressed), leaks]))
        """,
        few,
        "torch",
    )
    lines, leaks = found
    assert lines > 100
    assert leaks == []
