"""A .beton file, or a set of them, in a store: its tables are read at once, its pages when a batch asks for them."""

import hashlib
import os
from functools import partial

import numpy as np

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.sources.beton import Beton
from fastpmae_loaders.sources.beton_set import BetonSet
from fastpmae_loaders.sources.duplicates import DUPLICATES, read_duplicates
from fastpmae_loaders.sources.places import Places
from fastpmae_loaders.sources.set_index import INDEX, LARGEST_INDEX, SetIndex, Shard, read_index
from fastpmae_loaders.stores.address import Address, parse_address
from fastpmae_loaders.stores.cache import PAGE, CacheSettings
from fastpmae_loaders.stores.client import Missing, Refused, Store
from fastpmae_loaders.stores.pages import CachedFile
from fastpmae_loaders.stores.prefetch import side_by_side
from fastpmae_loaders.stores.reader import Reader

__all__ = ["RemoteBeton", "RemoteSet", "open_remote"]

MOST_AHEAD = 64
"""Pages, 512 MiB of them: a second of a fast network."""
_OPENING = 8


class RemoteBeton(Beton):
    """A .beton file in a store, opened and checked as any other; see Beton for its attributes.

    `path` is its address and `descriptor` that of a sparse file of this machine, in which an image's bytes are while
    what `locate` gives beside them lives.
    """

    path: Address

    def __init__(self, file: CachedFile, reader: Reader) -> None:
        self._file, self._reader = file, reader
        super().__init__(file.address)

    def __reduce__(self):
        return open_remote, (str(self.path), self._reader.settings)

    @property
    def data(self) -> np.ndarray:
        raise UserError(f"{self.path} lies in a store and is not mapped: ask for its images by payload()")

    def locate(self, indices: np.ndarray) -> tuple[Places, object]:
        """See Beton; waits for what has to be fetched."""
        places = self.describe(indices)
        return places, _Held(self._file, self._file.pages_of(places.pointer, places.size))

    def payload(self, index: int) -> np.ndarray:
        """The stored bytes of one image, uint8, read-only. UserError where they cannot be had."""
        start, size = self.pointer[index : index + 1].astype(np.int64), self.size[index : index + 1].astype(np.int64)
        with self._file.held(start, size):
            payload = np.frombuffer(os.pread(self.descriptor, int(size[0]), int(start[0])), np.uint8)
        payload.setflags(write=False)
        return payload

    def digest(self) -> str:
        """ "sha256:…" of the whole file, all of which is fetched for it. UserError where it cannot be had."""
        found, count = hashlib.sha256(), -(-self.nbytes // PAGE)
        for page in range(count):
            self._file.ahead(np.arange(page, min(page + self.window, count)))
            start, size = page * PAGE, min(PAGE, self.nbytes - page * PAGE)
            with self._file.held(np.array([start]), np.array([size])):
                found.update(os.pread(self.descriptor, size, start))
        return f"sha256:{found.hexdigest()}"

    def ahead(self, indices: np.ndarray) -> int:
        """Have the pages of some images fetched; how many were not there."""
        pages = self._file.pages_of(self.pointer[indices].astype(np.int64), self.size[indices].astype(np.int64))
        return self._file.ahead(pages)

    @property
    def window(self) -> int:
        """How many pages may be asked for before their time."""
        return _window(self._reader)

    def check_whole(self, unchanged: bool = False) -> None:
        """Nothing to see: one version of the file is read, and another is refused when a page is fetched."""

    def _open(self, path: str | os.PathLike[str]) -> None:
        self.path, self.nbytes, self.descriptor = self._file.address, self._file.size, self._file.descriptor

    def _read(self, start: int, size: int) -> np.ndarray:
        return self._file.read(start, size)


class RemoteSet(BetonSet):
    """A set of .beton files in a store; see BetonSet. `notes`: sentences about how it was understood."""

    def __init__(
        self,
        index: SetIndex,
        address: Address,
        reader: Reader,
        duplicates: np.ndarray | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(index, address, partial(_part, reader, address), duplicates)
        self._reader, self.notes = reader, notes

    def __reduce__(self):
        return RemoteSet, (self.index, self.path, self._reader, self.duplicates, self.notes)

    @property
    def window(self) -> int:
        """See RemoteBeton."""
        return _window(self._reader)

    def ahead(self, indices: np.ndarray) -> int:
        """See RemoteBeton; parts that are not open yet are opened, several at a time."""
        numbers = self.part_of(indices)
        parts = np.unique(numbers)

        def one(number: int) -> int:
            part = self.part(number)
            assert isinstance(part, RemoteBeton)
            return part.ahead(indices[numbers == number] - self._first[number])

        return side_by_side([partial(one, number) for number in parts.tolist()], _OPENING)


class _Held:
    """Pages that are there for as long as this lives."""

    def __init__(self, file: CachedFile, pages: np.ndarray) -> None:
        self._file, self._pages = file, pages
        self._held = False
        file.hold(pages)
        self._held = True

    def __del__(self) -> None:
        if self._held:
            self._file.release(self._pages)


def _window(reader: Reader) -> int:
    # what was fetched and not yet used must not be dropped for what comes after it
    return min(MOST_AHEAD, max(1, reader.cache.limit // PAGE // 4))


def open_remote(address: str | os.PathLike[str], settings: CacheSettings | None = None) -> RemoteBeton | RemoteSet:
    """The .beton file at an address, or, where its name does not end so, the set whose index lies there.

    Raises:
        UserError: where the store cannot be read, and for what is no sound .beton file or index.
    """
    address = parse_address(address)
    if address.suffix == ".beton":
        reader = Reader(address, settings)
        return RemoteBeton(reader.file(address), reader)
    if address.suffix in (".tar", ".parquet", ".arrow"):
        raise UserError(f"{address}: in a store .beton files and sets of them are read; fastpmae-write makes one of it")
    found: list[tuple[bytes, bytes | None, tuple[str, ...]]] = []
    reader = Reader(address, settings, lambda store: found.append(_beside(store, address)))
    told, noted, notes = found[0]
    index = read_index(told, str(address / INDEX))
    duplicates = None if noted is None else read_duplicates(noted, index, str(address / DUPLICATES))
    return RemoteSet(index, address, reader, duplicates, notes)


def _beside(store: Store, address: Address) -> tuple[bytes, bytes | None, tuple[str, ...]]:
    """A set's index, its duplicates where they are noted, and what is to be said of them."""
    index = _whole(store, address / INDEX)
    try:
        return index, _whole(store, address / DUPLICATES), ()
    except Missing:
        return index, None, ()
    except Refused:
        # whoever may not list a bucket is answered so of what is not there, and the index could be read
        note = (
            f"{address / DUPLICATES} is refused, as stores do with what is not there where a bucket may not be listed: "
            "no image is left out"
        )
        return index, None, (note,)


def _whole(store: Store, file: Address) -> bytes:
    size = store.stat(file.key).size
    if size > LARGEST_INDEX:
        raise UserError(f"{file} has {size:,} bytes, more than the {LARGEST_INDEX:,} that are read")
    return bytes(store.read(file.key))


def _part(reader: Reader, address: Address, shard: Shard) -> Beton:
    return RemoteBeton(reader.file(address / shard.name, shard.digest, shard.bytes), reader)
