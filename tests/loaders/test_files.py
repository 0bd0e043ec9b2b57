"""Files that appear whole or not at all, and what becomes of those whose writers were killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastpmae_loaders import locks
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import ALIVE, LATE, SOON, atomic_write, remove_partial
from tests.made import REPOSITORY


def partial(folder: Path) -> list[Path]:
    return list(folder.glob(".partial-*"))


def writer(path: Path) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "loaders")])
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.programs.slow_writer", path],
        env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "file") as beside:
        beside.write_text("whole")
        assert not (tmp_path / "file").exists()
    assert (tmp_path / "file").read_text() == "whole"

    def breaks_off() -> None:
        with atomic_write(tmp_path / "file") as beside:
            beside.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks_off()
    assert (tmp_path / "file").read_text() == "whole"
    assert partial(tmp_path) == []


def test_what_a_killed_writer_left_goes_with_the_next_one_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    killed, living = writer(tmp_path / "one"), writer(tmp_path / "two")
    try:
        assert len(partial(tmp_path)) == 2
        killed.kill()
        killed.wait()
        with atomic_write(tmp_path / "three") as beside:
            beside.write_text("whole")
        (left,) = partial(tmp_path)
        assert left.name.startswith(".partial-two-")
        assert (left / "two").read_text() == "half"
    finally:
        for process in (killed, living):
            process.kill()
            process.communicate()
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["three"]


def test_a_number_of_a_process_that_comes_again_is_no_matter(tmp_path: Path) -> None:
    """In a container every run has the same number."""
    (tmp_path / f".partial-file-{os.getpid()}").mkdir()
    for _ in range(2):
        with atomic_write(tmp_path / "file") as one, atomic_write(tmp_path / "file") as other:
            assert one != other
            one.write_text("one")
            other.write_text("other")
    assert (tmp_path / "file").read_text() == "one"


def aged(path: Path, seconds: float) -> None:
    for file in [*path.iterdir(), path]:
        os.utime(file, (time.time() - seconds, time.time() - seconds))


def test_what_was_never_locked_goes_after_a_while(tmp_path: Path) -> None:
    made = tmp_path / ".partial-just-made"
    made.mkdir()
    remove_partial(tmp_path)
    assert made.exists()
    aged(made, SOON + 1)
    remove_partial(tmp_path)
    assert not made.exists()


def test_without_locks_only_what_is_old_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", refuses)
    left = tmp_path / ".partial-file-somebody"
    left.mkdir()
    (left / ALIVE).touch()
    with atomic_write(tmp_path / "file") as beside:
        beside.write_text("whole")
    assert partial(tmp_path) == [left]
    aged(left, LATE + 1)
    remove_partial(tmp_path)
    assert partial(tmp_path) == []


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "\U0001f600" * 63])
def test_a_name_as_long_as_a_name_may_be(tmp_path: Path, name: str) -> None:
    with atomic_write(tmp_path / name) as beside:
        beside.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written: No such file"), atomic_write(tmp_path / "no" / "file"):
        pass


@pytest.mark.slow
def test_a_killed_writer_of_a_beton_leaves_nothing_for_ever(tmp_path: Path) -> None:
    from tests.loaders.write.test_write import in_the_midst, pngs, write_beton
    from tests.made import write_tree

    (tmp_path / "out").mkdir()
    process, _ = in_the_midst(pngs(tmp_path / "many", 600), tmp_path / "out" / "f.beton")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(partial(tmp_path / "out")) == 1
    write_beton(write_tree(tmp_path / "few", 4), tmp_path / "out" / "g.beton", workers=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["g.beton"]
