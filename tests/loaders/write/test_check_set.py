"""`fastpmae-write --check SET/`: every part against the index, its bytes too, and every image in it."""

import shutil
import signal
import sys
from pathlib import Path

import pytest

from fastpmae_loaders.write import cli
from fastpmae_loaders.write.sets import write_set
from tests.made import write_tree
from tests.stores import BUCKET, faulty_server, told


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(write_tree(tmp_path / "raw", 12), tmp_path / "set", 3, workers=1)
    return tmp_path / "set"


def check(folder: Path | str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["fastpmae-write", "--check", str(folder), "--workers", "1"])
    status = cli.main()
    said = capsys.readouterr()
    return status, said.out + said.err


def test_a_sound_set(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    status, said = check(folder, monkeypatch, capsys)
    assert status == 0
    assert "12 images in 3 parts" in said
    assert "every part is what the index says" in said
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == handlers


def test_a_part_with_other_bytes_and_one_that_is_missing_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = bytearray((folder / "part-00001.beton").read_bytes())
    # between the tables and the first image, where nothing is
    changed[60_000] ^= 1
    (folder / "part-00001.beton").write_bytes(changed)
    (folder / "part-00002.beton").unlink()
    status, said = check(folder, monkeypatch, capsys)
    assert status == 2
    assert "part-00001.beton: its bytes are not those that the index was made for" in said
    assert "part-00002.beton does not exist" in said
    assert "2 of 3 parts are bad" in said


def test_a_set_and_a_file_in_a_store(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    # what a writer to a store has left there before anything was read
    (tmp_path / "caches" / "fastpmae" / "stores" / "writing").mkdir(parents=True)
    there = tmp_path / "data" / BUCKET / "set"
    shutil.copytree(folder, there)
    changed = bytearray((there / "part-00001.beton").read_bytes())
    changed[60_000] ^= 1
    (there / "part-00001.beton").write_bytes(changed)
    (there / "part-00002.beton").unlink()
    with faulty_server(tmp_path / "data") as server, told(server):
        status, said = check(f"s3://{BUCKET}/set", monkeypatch, capsys)
        assert status == 2
        assert f"s3://{BUCKET}/set/part-00001.beton" in said
        assert "part-00002.beton does not exist" in said
        assert "2 of 3 parts are bad" in said
        status, said = check(f"s3://{BUCKET}/set/part-00000.beton", monkeypatch, capsys)
        assert status == 0
        assert f"s3://{BUCKET}/set/part-00000.beton: 4 samples" in said
        assert "every image decodes" in said
