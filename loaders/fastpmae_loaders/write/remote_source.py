"""A source in a store: its files by their names, as a folder of this machine into which those that are read come.

What a part of a set is made of is brought when the part is written, and given up after it; the images of a single file
are brought some at a time. So the disk holds little of the source at a time, whatever its size.
"""

import atexit
import contextlib
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import PARTIAL, claim_partial, remove_partial
from fastpmae_loaders.printable import printable
from fastpmae_loaders.sources.listing import Item, is_container
from fastpmae_loaders.sources.names import Names
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.stores.cache import CacheSettings
from fastpmae_loaders.stores.client import Missing, Store, StoreError
from fastpmae_loaders.stores.prefetch import side_by_side

_THREADS = 8
_TOGETHER = 256
"""Images that are brought together for a single file: few enough that the first are soon there."""
_PART = 32 << 20
"""Bytes of a request: a file's parts come one after another, several files side by side."""


@dataclass(frozen=True)
class RemoteSource:
    """Files of a store, and the folder of this machine that they are brought into.

    It travels to other processes and machines, which bring what they need into a folder of the same name.
    """

    address: Address
    folder: Path
    sizes: dict[str, int] = field(default_factory=dict, kw_only=True)
    """Of each tar shard or table its bytes, by its name relative to the source, where it was looked for."""

    def bring(self, names: Iterable[str]) -> None:
        """Have these files, by names relative to the source, on this machine.

        Raises:
            StoreError: where one of them cannot be had.
        """
        store = Store(self.address)
        wanted = [name for name in dict.fromkeys(names) if not self._is_here(name)]
        side_by_side([partial(self._bring, store, name) for name in wanted], _THREADS)

    @contextlib.contextmanager
    def by_address(self) -> Iterator[None]:
        """Within it a UserError that names files of the folder names their addresses instead."""
        try:
            yield
        except UserError as error:
            raise type(error)(str(error).replace(printable(str(self.folder)), str(self.address))) from None

    def name_of(self, item: Item) -> str:
        """What an image's file is called in the source."""
        return item.path.removeprefix(f"{self.folder}/")

    def give_up(self, names: Iterable[str]) -> None:
        """Keep none of these files on this machine."""
        for name in names:
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()

    @contextlib.contextmanager
    def present(self, names: list[str]) -> Iterator[None]:
        """Within it these files are here."""
        try:
            self.bring(names)
            yield
        finally:
            self.give_up(names)

    @contextlib.contextmanager
    def in_turn(self, items: Sequence[Item], behind: int) -> Iterator[Sequence[Item]]:
        """The same items, whose files are brought when they are first asked for, some at a time and the next meanwhile.

        Args:
            behind: so many items before the last that was asked for may be asked for again; those before are given up.
        """
        with ThreadPoolExecutor(1) as brings:
            turn = _InTurn(self, items, behind, brings)
            try:
                yield turn
            finally:
                turn.close()

    def _is_here(self, name: str) -> bool:
        return (self.folder / name).exists()

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


class _InTurn(Sequence[Item]):
    """See `RemoteSource.in_turn`."""

    def __init__(self, source: RemoteSource, items: Sequence[Item], behind: int, brings: Executor) -> None:
        self._source, self._items, self._behind, self._brings = source, items, behind, brings
        self._coming: dict[int, Future[None]] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return self._items[place]
        if place < 0:
            raise IndexError("counted from the first alone")
        item, turn = self._items[place], place // _TOGETHER
        for number in (turn, turn + 1):
            if number not in self._coming and number * _TOGETHER < len(self._items):
                self._coming[number] = self._brings.submit(self._source.bring, self._names(number))
        if item.kind != "bad":
            self._coming[turn].result()
        for number in [number for number in self._coming if (number + 1) * _TOGETHER <= place - self._behind]:
            self._coming.pop(number).result()
            self._source.give_up(self._names(number))
        return item

    def close(self) -> None:
        """Give up all that is here."""
        for number, coming in self._coming.items():
            coming.cancel()
            self._source.give_up(self._names(number))

    def _names(self, number: int) -> list[str]:
        some = (self._items[place] for place in range(number * _TOGETHER, min((number + 1) * _TOGETHER, len(self))))
        return [self._source.name_of(item) for item in some if item.kind != "bad"]


def list_source(address: Address) -> tuple[RemoteSource, Path, Names]:
    """The files of a store below an address, or the one there, as a folder that is this process's own; what lies in it
    under the address's name; and the names of the files in it.

    Raises:
        UserError: where the store cannot be read, or there is nothing.
    """
    store = Store(address)
    alone, names, sizes = store.first_try(lambda store: _names(store, address), address.key)
    parent = CacheSettings().place / "sources"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_partial(parent)
        place, alive = claim_partial(parent / (address.name or address.bucket))
        atexit.register(_remove, place, alive)
        folder = place / (address.name or address.bucket)
        source = RemoteSource(address.parent if alone else address, folder, sizes=sizes)
        source.folder.mkdir()
    except OSError as error:
        raise UserError(f"{printable(str(parent))} cannot be written: {error.strerror or error}") from None
    return source, source.folder / names[0] if alone else source.folder, names


def _names(store: Store, address: Address) -> tuple[bool, Names, dict[str, int]]:
    """Whether there is one file alone, the names of all, and the bytes of those that hold many images."""
    names, sizes = Names(), dict[str, int]()
    if address.suffix in (".tar", ".parquet", ".arrow") or address.scheme in ("https", "http"):
        with contextlib.suppress(Missing):
            sizes[address.name] = store.stat(address.key).size
            names.add("", [address.name])
            return True, names, sizes
    prefix = address.key and address.key + "/"

    def found() -> Iterator[str]:
        for key, size in store.files(address.key):
            name = key.removeprefix(prefix)
            if size:
                if is_container(name):
                    sizes[name] = size
                yield name

    for folder, some in groupby(found(), lambda name: name.rpartition("/")[0]):
        own = [name[len(folder) + (folder != "") :] for name in some]
        parts = [*(folder.split("/") if folder else ()), *own]
        for part in parts:
            if part in ("", ".", "..") or "\0" in part:
                name = f"{folder}/{part}" if part in own else folder
                raise StoreError(
                    f"{address} holds a file called {printable(name)!r}, which no file of this machine can be"
                )
        names.add(folder, own)
    if not len(names):
        raise Missing(f"{address} does not exist, or holds no files")
    return False, names, sizes


def _remove(place: Path, alive: IO[bytes]) -> None:
    alive.close()
    shutil.rmtree(place, ignore_errors=True)
