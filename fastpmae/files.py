"""Files that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from fastpmae.errors import UserError
from fastpmae_loaders.listing import printable

PARTIAL = ".partial-"
"""What the hidden folders of unfinished files begin with."""


@contextlib.contextmanager
def appearing(path: Path, force: bool = True) -> Iterator[Path]:
    """A place to write a file, which takes the name `path` when the block succeeds and is gone when it does not.

    The place lies in a hidden folder beside `path`, so that what a library puts there on its way goes too.

    Args:
        force: replace a file that is there; without, one that has appeared since `outputs.check_output` is kept.

    Raises:
        UserError: when the file cannot be written.
    """
    folder = path.parent / f"{PARTIAL}{path.name[:200]}-{os.getpid()}"
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name the file to write")
        folder.mkdir()
        yield folder / path.name
        # Some writers keep their file to its owner; ours is as readable as any other file of the user's. The folder
        # tells: to ask for the mask is to change it, also for whatever else this process writes at the time.
        (folder / path.name).chmod(folder.stat().st_mode & 0o666)
        with (folder / path.name).open("rb") as file:
            os.fsync(file.fileno())
        if not force and os.path.lexists(path):
            raise UserError(f"{printable(str(path))} has appeared meanwhile; --force replaces it")
        (folder / path.name).replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder."""
    for leftover in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)
