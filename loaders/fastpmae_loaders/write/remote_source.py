"""A source in a store: its files by their names, as a folder of this machine into which those that are read come.

The folder holds an empty file for each of the store's; what a part of a set is made of is brought when the part is
written, and given up after it. So the disk holds a few parts of the source at a time, whatever its size.
"""

import atexit
import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import PARTIAL, claim_partial, remove_partial
from fastpmae_loaders.printable import printable
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.stores.cache import CacheSettings
from fastpmae_loaders.stores.client import Missing, Store, StoreError
from fastpmae_loaders.stores.prefetch import side_by_side

_THREADS = 8
_PART = 32 << 20
"""Bytes of a request: a file's parts come one after another, several files side by side."""


@dataclass(frozen=True)
class RemoteSource:
    """Files of a store, and the folder of this machine that they are brought into.

    It travels to other processes and machines, which bring what they need into a folder of the same name.
    """

    address: Address
    folder: Path

    def bring(self, names: Iterable[str]) -> None:
        """Have these files, by names relative to the source, on this machine.

        Raises:
            StoreError: where one of them cannot be had.
        """
        store = Store(self.address)
        wanted = [name for name in dict.fromkeys(names) if not self._is_here(name)]
        side_by_side([partial(self._bring, store, name) for name in wanted], _THREADS)

    def give_up(self, names: Iterable[str]) -> None:
        """Keep no more of these files than that there are such."""
        for name in names:
            with contextlib.suppress(OSError):
                _make_empty(self.folder / name)

    @contextlib.contextmanager
    def present(self, names: list[str]) -> Iterator[None]:
        """Within it these files are here."""
        try:
            self.bring(names)
            yield
        finally:
            self.give_up(names)

    def _is_here(self, name: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / name).stat().st_mtime_ns != 0
        return False

    def _bring(self, store: Store, name: str) -> int:
        path, place = self.folder / name, self.address / name
        stat = store.stat(place.key)
        beside = path.with_name(f"{PARTIAL}{uuid.uuid4().hex[:16]}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                for start in range(0, stat.size, _PART):
                    file.write(store.read(place.key, start, min(_PART, stat.size - start), stat.version))
            beside.replace(path)
        except OSError as error:
            raise UserError(f"{printable(str(self.folder))} cannot be written: {error.strerror or error}") from None
        finally:
            beside.unlink(missing_ok=True)
        return stat.size


def list_source(address: Address) -> tuple[RemoteSource, Path]:
    """The files of a store below an address, or the one there, as a folder that is this process's own; and what lies
    in it under the address's name.

    Raises:
        UserError: where the store cannot be read, or there is nothing.
    """
    store = Store(address)
    alone, names = store.first_try(lambda store: _names(store, address), address.key)
    parent = CacheSettings().place / "sources"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_partial(parent)
        place, alive = claim_partial(parent / (address.name or address.bucket))
        atexit.register(_remove, place, alive)
        source = RemoteSource(address.parent if alone else address, place / (address.name or address.bucket))
        for name in names:
            path = source.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _make_empty(path)
    except OSError as error:
        raise UserError(f"{printable(str(parent))} cannot be written: {error.strerror or error}") from None
    return source, source.folder / names[0] if alone else source.folder


def _names(store: Store, address: Address) -> tuple[bool, list[str]]:
    """Whether there is one file alone, and the names of all."""
    if address.suffix in (".tar", ".parquet", ".arrow") or address.scheme in ("https", "http"):
        with contextlib.suppress(Missing):
            store.stat(address.key)
            return True, [address.name]
    prefix = address.key and address.key + "/"
    names = [key.removeprefix(prefix) for key, size in store.files(address.key) if size]
    if not names:
        raise Missing(f"{address} does not exist, or holds no files")
    for name in names:
        if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
            raise StoreError(f"{address} holds a file called {printable(name)!r}, which no file of this machine can be")
    return False, names


def _remove(place: Path, alive: IO[bytes]) -> None:
    alive.close()
    shutil.rmtree(place, ignore_errors=True)


def _make_empty(path: Path) -> None:
    """A file without contents, known by a time that no other has."""
    path.write_bytes(b"")
    os.utime(path, ns=(0, 0))
