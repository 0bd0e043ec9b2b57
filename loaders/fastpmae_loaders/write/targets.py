"""Where a set is written to: a folder, in which each file appears whole or not at all."""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

from fastpmae_loaders.cli.outputs import is_run_folder
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import PARTIAL, atomic_write
from fastpmae_loaders.printable import printable
from fastpmae_loaders.sources.reading import read_file
from fastpmae_loaders.stores.address import Address, is_address, parse_address, place_of
from fastpmae_loaders.values import local_path
from fastpmae_loaders.write.shards import number_of
from fastpmae_loaders.write.store_target import StoreTarget


@runtime_checkable
class Target(Protocol):
    """A place for the files of a set, by their names: a folder, or what lies behind a URL."""

    @property
    def shown(self) -> str:
        """What it is called in sentences."""
        ...

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """A place on this machine to write a file, which the target has whole after the block, replacing another.

        Nothing is left of it when the block or the process fails, at the latest after the next that writes the name.
        """
        ...

    def read(self, name: str) -> bytes | None:
        """The bytes of a small file; None where there is none. UserError where it cannot be read."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none. UserError where it cannot be read."""
        ...

    def remove(self, name: str) -> None:
        """See that there is no file of this name. UserError where it cannot be removed."""
        ...

    def names(self) -> Iterable[str]:
        """The names of all files. UserError where they cannot be listed."""
        ...


class FolderTarget:
    """A folder of this machine, or one that all machines share."""

    def __init__(self, folder: Path):
        self._folder = folder

    @property
    def shown(self) -> str:
        return printable(str(self._folder))

    def writing(self, name: str) -> AbstractContextManager[Path]:
        return atomic_write(self._folder / name)

    def read(self, name: str) -> bytes | None:
        path = self._folder / name
        try:
            return read_file(path)
        except FileNotFoundError:
            return None
        except (OSError, UserError) as error:
            raise _cannot_be(path, "read", error) from None

    def size(self, name: str) -> int | None:
        try:
            return (self._folder / name).stat().st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _cannot_be(self._folder / name, "read", error) from None

    def names(self) -> Iterator[str]:
        try:
            with os.scandir(self._folder) as entries:
                yield from (entry.name for entry in entries)
        except OSError as error:
            raise _cannot_be(self._folder, "read", error) from None

    def remove(self, name: str) -> None:
        try:
            (self._folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_be(self._folder / name, "removed", error) from None


def _cannot_be(path: Path, what: str, error: Exception) -> UserError:
    return UserError(f"{printable(str(path))} cannot be {what}: {getattr(error, 'strerror', None) or error}")


def open_target(out: str | os.PathLike[str] | Address) -> Target:
    """The target of this name or address; a folder is made where there is none.

    Raises:
        UserError: where no set can lie.
    """
    if isinstance(out, Address) or is_address(out):
        return StoreTarget(parse_address(out))
    folder = local_path(out)
    name = printable(str(folder))
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{name} is a file; a set of several parts is a folder: name one that is new or empty")
        if any(is_run_folder(place) for place in (folder.resolve(), *folder.resolve().parents)):
            raise UserError(f"{name} belongs to a run: name another folder")
        folder.mkdir(exist_ok=True)
    except FileNotFoundError:
        raise UserError(f"the folder {printable(str(folder.parent))} does not exist; make it first") from None
    except OSError as error:
        raise UserError(f"{name} cannot be written: {error.strerror or error}") from None
    return FolderTarget(folder)


def check_target(source: str | os.PathLike[str] | Address, out: str | os.PathLike[str] | Address) -> None:
    """UserError where a folder holds files of others, or one of source and set lies in the other.

    Files of a set are known by their names; what is in them is looked at by who replaces them.
    """
    place, origin = place_of(out), place_of(source)
    if isinstance(place, Address):
        _check_stored(place, origin)
        return
    folder, name = place, printable(str(place))
    if isinstance(origin, Path) and origin.exists():
        within, around = folder.resolve(), origin.resolve()
        if within == around or within.is_relative_to(around) or around.is_relative_to(within):
            raise UserError(f"{name} and the source lie in each other; name another folder for the set")
    if folder.is_dir():
        _check_names(FolderTarget(folder))


def _check_stored(address: Address, origin: Path | Address) -> None:
    """The same of an address in a store."""
    if isinstance(origin, Address) and (origin.scheme, origin.bucket) == (address.scheme, address.bucket):
        ours, theirs = f"/{address.key}/", f"/{origin.key}/"
        if ours.startswith(theirs) or theirs.startswith(ours):
            raise UserError(f"{address} and the source lie in each other; name another folder for the set")
    _check_names(StoreTarget(address))


def _check_names(target: Target) -> None:
    other = next((name for name in target.names() if not _is_of_a_set(name)), None)
    if other is not None:
        raise UserError(
            f"{target.shown} holds other files, such as {printable(other)}: a set is written to a new or an empty "
            "folder"
        )


def _is_of_a_set(name: str) -> bool:
    named = name in ("plan.json", "index.json", "duplicates.bits", "bad.txt")
    return named or name.startswith(PARTIAL) or number_of(name) is not None
