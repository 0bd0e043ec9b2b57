"""Files that appear whole or not at all."""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.locks import lock
from fastpmae_loaders.printable import printable
from fastpmae_loaders.values import check_replaceable

PARTIAL = ".partial-"
"""What the hidden folders of unfinished files begin with."""
ALIVE = ".alive"
"""The file in such a folder that its writer keeps locked."""
SOON, LATE = 60.0, 24 * 3600.0
"""Seconds without a change after which a folder is left over: without the file above, and where nothing is locked."""


@contextlib.contextmanager
def atomic_write(path: Path, force: bool = True) -> Iterator[Path]:
    """A place to write a file, which takes the name `path` when the block succeeds and is gone when it does not.

    The place lies in a hidden folder beside `path`, so that what a library puts there on its way goes too. Those of
    writers that were killed are removed first.

    Args:
        force: replace a file that is there; without, one that has appeared since `outputs.check_output` is kept.

    Raises:
        UserError: when the file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            check_replaceable(path)
            remove_partial(path.parent)
            folder, alive = claim_partial(path)
            # Closed first: a folder with an open file in it cannot be removed on NFS.
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(alive)
            yield folder / path.name
            # Some writers keep their file to its owner; ours is as readable as any other file of the user's. The folder
            # tells: to ask for the mask is to change it, also for whatever else this process writes at the time.
            (folder / path.name).chmod(folder.stat().st_mode & 0o666)
            with (folder / path.name).open("rb") as file:
                os.fsync(file.fileno())
            if not force and os.path.lexists(path):
                raise UserError(f"{printable(str(path))} has appeared meanwhile; --force replaces it")
            (folder / path.name).replace(path)
            _flush_names(path.parent)
        except OSError as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{printable(str(path))} cannot be written: {reason}") from None


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` when the block succeeds and is gone when it does not.

    It replaces what has the name. What is in it is the caller's to flush.

    Raises:
        UserError: when it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_partial(path.parent)
            partial, alive = claim_partial(path)
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            stack.enter_context(alive)
            (partial / path.name).mkdir()
            yield partial / path.name
            _flush_names(partial / path.name)
            if os.path.lexists(path):  # a folder that is not empty gives way to none
                path.rename(partial / "replaced")
            (partial / path.name).rename(path)
            _flush_names(path.parent)
        except OSError as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{printable(str(path))} cannot be written: {reason}") from None


def _flush_names(folder: Path) -> None:
    """See that a new name survives a loss of power too; a folder cannot be flushed on every file system."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def remove_partial(folder: Path, alone: bool = False) -> None:
    """Remove what killed processes left unfinished in a folder. What another process is writing stays.

    A writer keeps a file in its folder locked, and the lock dies with it, on whatever machine it ran. Where nothing can
    be locked, what has not changed for a day is taken for left over.

    Args:
        alone: nobody else writes here, since the caller holds the folder's own lock: all of it is left over.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(PARTIAL):
                continue
            if alone:
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                _remove_if_left(Path(entry.path))


def _remove_if_left(partial: Path) -> None:
    with contextlib.suppress(OSError):
        try:
            alive = (partial / ALIVE).open("r+b")
        except FileNotFoundError:  # it is just being made, or was never finished
            if _unchanged(partial) > SOON:
                shutil.rmtree(partial, ignore_errors=True)
            return
        with alive:
            # Under the lock: a writer that has lost its folder between making and locking it sees so.
            if (locked := lock(alive)) or (locked is None and _unchanged(partial) > LATE):
                shutil.rmtree(partial, ignore_errors=True)


def _unchanged(partial: Path) -> float:
    """Seconds since anything in a folder last changed."""
    return time.time() - max(path.stat().st_mtime for path in [partial, *partial.iterdir()])


def claim_partial(path: Path) -> tuple[Path, IO[bytes]]:
    """A new folder beside `path`, and the locked file in it that shows others that somebody writes there.

    Once that is closed, `remove_partial` removes the folder.
    """
    while True:
        # A name that nobody has had: a process's number comes again, in a container always. Of 255 bytes at most, of
        # which a character may take four.
        folder = path.parent / f"{PARTIAL}{path.name[:50]}-{uuid.uuid4().hex[:16]}"
        folder.mkdir()
        try:
            alive = (folder / ALIVE).open("wb")
            lock(alive, wait=True)
            if (folder / ALIVE).exists():
                return folder, alive
            alive.close()
        except FileNotFoundError:  # somebody has cleared it away meanwhile
            continue
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
