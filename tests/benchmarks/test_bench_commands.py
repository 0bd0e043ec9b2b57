"""`bench_commands`: what it types runs in a terminal, and its labelled CamVid is all of CamVid."""

import stat
import sys
from pathlib import Path

import pytest

from benchmarks import bench_commands
from benchmarks.bench_commands import labelled_folders, time_rows, typed
from benchmarks.common import SHARED


def command(path: Path, body: str) -> list[str]:
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return [str(path)]


def test_a_command_runs_in_a_terminal_and_its_time_is_its_own(tmp_path: Path):
    body = "import sys, time\nassert sys.stdout.isatty()\nprint('a', 'b' * 100_000)\ntime.sleep(0.3)\nsys.exit(3)"
    status, seconds, used, shown = typed(command(tmp_path / "it", body))
    assert (status, shown.count("b")) == (3, 100_000)
    assert seconds > 0.3
    assert 0 < used < seconds + 1


def test_a_command_that_fails_leaves_nothing_or_shows_nothing_fails_its_check(tmp_path: Path, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    there, missing = images, tmp_path / "missing"
    good, bad = command(tmp_path / "good", "print('x')"), command(tmp_path / "bad", "import sys; sys.exit(1)")
    bar = command(tmp_path / "bar", "print('1 of 2', end='\\r'); print('2 of 2')")
    steps = [("good", good, there), ("bad", bad, there), ("leaves nothing", good, missing), ("bar", bar, there)]
    monkeypatch.setattr(bench_commands, "labelled_folders", lambda name, folder: images)
    monkeypatch.setattr(bench_commands, "commands", lambda images, out, epochs: steps)
    gates = {row.case: row.gate for row in time_rows("camvid", 1)}
    assert gates == {f"camvid: {name}": name in ("good", "bar") for name, _, _ in steps}
    monkeypatch.setattr(bench_commands, "SOON", 0.0)
    gates = {row.case: row.gate for row in time_rows("camvid", 1)}
    assert gates == {f"camvid: {name}": name == "bar" for name, _, _ in steps}


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_camvid_by_the_class_that_covers_most(tmp_path: Path):
    images = labelled_folders("camvid", tmp_path)
    train, val = ({path.name for path in (images / split).glob("*/*.jpg")} for split in ("train", "val"))
    assert (len(train), len(val)) == (367, 101)
    classes = [{path.name for path in (images / split).iterdir()} for split in ("train", "val")]
    assert classes[1] <= classes[0]
    assert len(classes[0]) > 1
