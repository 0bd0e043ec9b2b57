"""Only regular files of a bounded size are read, and of those that strangers name only some below a folder."""

import os
from pathlib import Path

import pytest

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.sources.reading import FILE_LIMIT, read_below, read_file


@pytest.mark.timeout(20)
def test_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    assert read_file(tmp_path / "a") == b"0123456789"
    assert read_file(tmp_path / "a", 3, 4) == b"3456"
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(FILE_LIMIT + 1)
    for name, says in [("pipe", "regular"), ("/dev/zero", "regular"), ("huge", "bytes, more than")]:
        with pytest.raises(UserError, match=says):
            read_file(tmp_path / name)
    with pytest.raises(UserError, match="shorter"):
        read_file(tmp_path / "a", 5, 6)
    with pytest.raises(OSError, match="No such file"):
        read_file(tmp_path / "missing")


@pytest.mark.timeout(20)
def test_what_a_stranger_may_name(tmp_path: Path) -> None:
    base = tmp_path / "set"
    (base / "images").mkdir(parents=True)
    (base / "images" / "a").write_bytes(b"here")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "set2").mkdir()
    (tmp_path / "set2" / "b").write_bytes(b"secret")
    (base / "link").symlink_to("images/a")
    (base / "out").symlink_to("../secret")
    (base / "above").symlink_to("..")
    (base / "circle").symlink_to("circle")
    os.mkfifo(base / "pipe")
    for name in ("images/a", "link", "./images/../images/a", str(base / "images/a")):
        assert read_below(base, name) == b"here"
    for name in ("../secret", str(tmp_path / "secret"), "out", "above/secret", "../set2/b", "/dev/zero", "/etc/passwd"):
        with pytest.raises(UserError, match="outside"):
            read_below(base, name)
    for name in (
        "a\0b",
        "pipe",
        "images",
        "circle",
        "x" * 5000,
        "missing",
        "caf\udce9\x1b[31m",
        "hf://sets/a/b.jpg",
        "",
    ):
        with pytest.raises((UserError, OSError)) as caught:
            read_below(base, name)
        if isinstance(caught.value, UserError):
            assert str(caught.value).isprintable()
