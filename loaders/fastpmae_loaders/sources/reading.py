"""Bytes of files that came from strangers: regular files alone, and never more than a limit."""

import os
import stat
from pathlib import Path
from typing import IO

from fastpmae_loaders.errors import BetonError, UserError
from fastpmae_loaders.printable import printable, short

FILE_LIMIT = 1 << 30
"""Larger image files are not taken: one is read as a whole."""


def open_file(path: str | os.PathLike[str]) -> IO[bytes]:
    """A file to read from, as for a picture's header alone.

    Raises:
        UserError: where it is no regular file (a pipe or device may never end), or larger than FILE_LIMIT.
        OSError: where it cannot be opened.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # a pipe without a writer opens at once
    try:
        _check_limit(_size_of(file))
    except BaseException:
        file.close()
        raise
    return file


def _size_of(file: IO[bytes]) -> int:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise UserError("not a regular file")
    return status.st_size


def _check_limit(wanted: int) -> None:
    if wanted > FILE_LIMIT:
        raise UserError(f"the file has {wanted:,} bytes, more than the {FILE_LIMIT:,} that are read")


def read_file(path: str | os.PathLike[str], offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of a file, or `size` of them from `offset` on.

    Raises:
        UserError: where it is no regular file (a pipe or device may never end), shorter, or larger than FILE_LIMIT.
        OSError: where it cannot be read.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe without a writer opens at once
        there = _size_of(file)
        wanted = max(0, there - offset) if size is None else size
        _check_limit(wanted)
        if offset + wanted > there:
            raise UserError("the file has become shorter")
        file.seek(offset)
        return file.read(wanted)


def given_bytes(source: bytes | str | os.PathLike[str], where: str | None, name: str) -> tuple[bytes, str]:
    """What is given as bytes, or lies in the file of that path, and what it is called in sentences.

    Args:
        where: what to call it; without it the path, or for bytes `name`.

    Raises:
        BetonError: where the file cannot be read.
    """
    if isinstance(source, bytes):
        return source, printable(where or name)
    where = printable(where or os.fspath(source))
    try:
        return read_file(source), where
    except Exception as error:
        raise BetonError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_below(folder: Path, name: str) -> bytes:
    """The bytes of a file that a stranger's file names, which must lie below a folder: links are followed before.

    Raises:
        UserError: for a file elsewhere, and as `read_file`.
        OSError: where it cannot be read.
    """
    return read_file(_below(folder, name))


def open_below(folder: Path, name: str) -> IO[bytes]:
    """The same file to read from. Raises as `read_below`."""
    return open_file(_below(folder, name))


def _below(folder: Path, name: str) -> Path:
    try:
        base = folder.resolve()
        target = (base / name).resolve()
    except (ValueError, RuntimeError):  # a NUL in the name, links in a circle
        raise UserError(f"the file {short(name)} cannot be read: that is no path") from None
    if not target.is_relative_to(base):
        raise UserError(f"the file {short(name)} lies outside {printable(str(folder))}, where alone files are read")
    return target
