"""A .beton file that is cut short, or written over, under its readers: a sentence, and no process dies of SIGBUS."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from fastpmae_loaders.sources.jpeg import turbo_available
from tests.loaders.conftest import jpeg
from tests.loaders.files import write_beton
from tests.made import REPOSITORY

PROGRAM = """
import os, sys
from pathlib import Path
from fastpmae_loaders import Beton, PairedViews, PlainViews, UserError, ViewSettings

path, settings, whole = Path(sys.argv[1]), ViewSettings(image_size=32, patch_size=8), Path(sys.argv[1]).read_bytes()
cut = 9000

def told(what, function):
    try:
        function()
        print(what, "- nothing", flush=True)
    except UserError as error:
        print(what, "-", error, flush=True)

def drain(batches):
    for _ in batches:
        pass

for engine in sys.argv[2:]:
    path.write_bytes(whole)
    views, plain = PairedViews(path, 4, engine, settings, ahead=1), PlainViews(path, 4, 32, engine=engine)
    with views, plain:
        beton, begun, plainly = Beton(path), iter(views), iter(plain)
        next(begun), next(plainly)
        os.truncate(path, cut)
        told(engine + " goes on", lambda: drain(begun))
        told(engine + " begins", lambda: next(iter(views)))
        told(engine + " one batch", lambda: views.batch_of([150]))
        told(engine + " plainly", lambda: drain(plainly))
        told(engine + " bytes", lambda: beton.payload(150))
        path.write_bytes(bytes(len(whole)))
        os.utime(path, (1, 1))
        told(engine + " written over", lambda: drain(iter(views)))
"""


def test_every_reader_says_so(tmp_path: Path) -> None:
    images = [jpeg(number % 20, 60, 50) for number in range(200)]
    path = write_beton(tmp_path / "cut.beton", images, [(60, 50)] * 200)
    assert path.stat().st_size > 100_000
    dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    engines = [*(["ffcv"] if turbo_available() else []), *(["dali"] if dali else []), "torch"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(path), *engines],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
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
    opened = Path("/proc/self/fd")
    if not opened.exists():
        pytest.skip("open files are counted in /proc")
    before = len(list(opened.iterdir()))
    for _ in range(20):
        assert Beton(path).payload(0).tobytes() == jpeg(0, 40, 30)
    assert len(list(opened.iterdir())) == before
