"""A store's file as a sparse file of this machine, whose pages are fetched when they are first read.

Who reads holds the pages meanwhile: a held page is not dropped from the cache, by whatever process. So compiled code
reads the sparse file as it reads any other. The records beside it say which pages are there; a page's bytes are written
before its record, so that a kill in between costs one request. A page that another process, or another start of the
machine, has left is believed when its CRC-32 is right.
"""

import contextlib
import errno
import functools
import hashlib
import os
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fastpmae_loaders.errors import BetonError, UserError
from fastpmae_loaders.printable import printable
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.stores.cache import FULL, OPEN, PAGE, RECORD, TABLE, Answer, Cache, punch
from fastpmae_loaders.stores.client import Changed, Closed, Stat, Store
from fastpmae_loaders.stores.prefetch import Fetcher
from fastpmae_loaders.stores.range_locks import lock_range, unlock_range

_FETCHING = 1 << 41
"""The places in a file of records, one a page, that whoever fetches a page keeps locked."""
_FIELDS = {name: (field[0], field[1]) for name, field in (RECORD.fields or {}).items()}


class SparseFile:
    """One sparse file with its records, as the cache has made them (see `Cache.entry`). Everything is shared.

    The records are not mapped: writing to a map ends the process where the disk is full.
    """

    def __init__(self, place: Path, kind: str, size: int, page: int) -> None:
        self.path, self.size, self.page = place / kind, size, page
        count = -(-size // page)
        self.descriptor = os.open(self.path, os.O_RDWR)
        weakref.finalize(self, os.close, self.descriptor).atexit = False
        self.locks = os.open(place / f"{kind}.records", os.O_RDWR)
        weakref.finalize(self, os.close, self.locks).atexit = False
        self.known = np.zeros(count, np.bool_)
        """Pages whose bytes this process has fetched or checked."""
        self._held: dict[int, int] = {}
        self._lock = threading.Lock()

    def pages_of(self, start: np.ndarray, size: np.ndarray) -> np.ndarray:
        """The pages that these ranges touch, each once, ascending: int64."""
        first = np.asarray(start, np.int64) // self.page
        last = (np.asarray(start, np.int64) + np.maximum(np.asarray(size, np.int64), 1) - 1) // self.page
        if not np.array_equal(first, last):
            spans = [np.arange(a, b + 1) for a, b in zip(first.tolist(), last.tolist(), strict=True)]
            return np.unique(np.concatenate(spans))
        return np.unique(first)

    def hold(self, page: int) -> None:
        """Keep a page from being dropped until `release`; it need not be there yet."""
        with self._lock:
            count = self._held.get(page, 0)
            # whoever drops a page is done in a moment
            while count == 0 and not lock_range(self.locks, page, shared=True):
                time.sleep(0.001)
            self._held[page] = count + 1

    def release(self, page: int) -> None:
        """Let go of a page that was held."""
        with self._lock:
            count = self._held.pop(page) - 1
            if count:
                self._held[page] = count
            else:
                unlock_range(self.locks, page)

    @property
    def here(self) -> np.ndarray:
        """Which pages are there by their records: uint8 [pages]."""
        count = len(self.known)
        return np.frombuffer(_read_whole(self.locks, 0, count * RECORD.itemsize, self.path), RECORD)["here"]

    def is_there(self, page: int) -> bool:
        """Whether a page that is held can be read, as far as this process knows."""
        return bool(self.known[page] and self._record(page)["here"])

    def is_sound(self, page: int) -> bool:
        """Whether a page is there, by the CRC-32 of its bytes where this process does not know it yet."""
        record = self._record(page)
        if not record["here"]:
            return False
        if not self.known[page]:
            start, size = self.range_of(page)
            self.known[page] = zlib.crc32(self.read(start, size).data) == int(record["crc"])
        return bool(self.known[page])

    def forget_damaged(self) -> bool:
        """Whether a page has not the bytes that were written for it; such pages count as missing from then on."""
        self.known[:] = False
        damaged = [page for page in range(len(self.known)) if not self.is_sound(page)]
        for page in damaged:
            self.forget(page)
        return bool(damaged)

    def forget(self, page: int) -> None:
        """A page counts as missing from now on."""
        self._note(page, "here", 0)

    def range_of(self, page: int) -> tuple[int, int]:
        """A page's first byte, and how many it has."""
        return page * self.page, min(self.page, self.size - page * self.page)

    def touch(self, pages: np.ndarray) -> None:
        """Note that pages are used now."""
        now = int(time.time())
        # the records of an old cache may not be allocated: its pages are not there, and the disk may be full
        with contextlib.suppress(OSError):
            for page in pages.tolist():
                self._note(page, "used", now)

    def fetch(self, page: int, get: Callable[[int, int], memoryview], stopped: Callable[[], bool]) -> int:
        """See that a page is there and sound; how many bytes were written for it. The caller holds it."""
        while not lock_range(self.locks, _FETCHING + page):  # another process is at it
            if stopped():
                raise Closed
            time.sleep(0.02)
        try:
            start, size = self.range_of(page)
            if self.is_sound(page):
                return 0
            self.forget(page)
            data = get(start, size)
            try:
                self._write(data, start)
            except OSError:
                punch(self.descriptor, start, size)  # a part of a page is room that nobody else would give back
                raise
            self._note(page, "crc", zlib.crc32(data))
            self._note(page, "used", int(time.time()))
            self._note(page, "here", 1)
            self.known[page] = True
            return size
        finally:
            unlock_range(self.locks, _FETCHING + page)

    def read(self, start: int, size: int) -> np.ndarray:
        """Bytes of pages that are there: uint8 [size]."""
        return _read_whole(self.descriptor, start, size, self.path)

    def _record(self, page: int) -> np.void:
        at = page * RECORD.itemsize
        return np.frombuffer(_read_whole(self.locks, at, RECORD.itemsize, self.path), RECORD)[0]

    def _note(self, page: int, field: str, value: int) -> None:
        # this field alone: others may write the rest of the record meanwhile
        kind, place = _FIELDS[field]
        os.pwrite(self.locks, value.to_bytes(kind.itemsize, "little"), page * RECORD.itemsize + place)

    def _write(self, data: memoryview, start: int) -> None:
        place = 0
        while place < len(data):
            place += os.pwrite(self.descriptor, data[place:], start + place)


class CachedFile:
    """A file in a store, read by way of a cache. Its methods may be called by any number of threads.

    Attributes: `address`; `size` in bytes; `path` and `descriptor` of the sparse file that pages of images are in. It
    takes two file descriptors.

    Args:
        digest: "sha256:…" of the whole file, where it is known: it is looked at when all pages are there together.

    Raises:
        UserError: where the cache cannot be written.
    """

    def __init__(
        self, store: Store, address: Address, stat: Stat, cache: Cache, fetcher: Fetcher, digest: str | None = None
    ) -> None:
        self.address, self.size = address, stat.size
        self._store, self._stat, self._cache, self._fetcher, self._digest = store, stat, cache, fetcher, digest
        with self._told():
            self._pages = self._opened()
        self.path, self.descriptor = self._pages.path, self._pages.descriptor
        self._known_tables = np.zeros(-(-self.size // TABLE), np.bool_)
        self._damage: str | None = None
        self._checked = digest is None or (self.path.parent / _checked_name(digest)).exists()
        self._whole = threading.Lock()

    def read(self, start: int, size: int) -> np.ndarray:
        """Bytes of a table, uint8 [size], which are kept apart from the images. StoreError where they cannot be had."""
        if size == 0:
            return np.empty(0, np.uint8)
        # opened for this read alone: the many parts of a set would take two descriptors more each
        with self._told():
            tables = SparseFile(self.path.parent, "tables", self.size, TABLE)
            tables.known = self._known_tables
            pages = tables.pages_of(np.array([start]), np.array([size]))
            # what is missing comes in few requests, each of a run of neighbours
            missing = np.array([page for page in pages if not tables.is_sound(int(page))], np.int64)
        runs = np.split(missing, np.flatnonzero(np.diff(missing) != 1) + 1) if len(missing) else []
        most = PAGE // TABLE
        parts = [run[place : place + most] for run in runs for place in range(0, len(run), most)]
        tasks = [((self, "tables", int(part[0]), len(part)), self._table_task(tables, part)) for part in parts]
        self._fetcher.ask(tasks)
        self._fetcher.wait([key for key, _ in tasks])
        with self._told():
            return tables.read(start, size)

    @contextlib.contextmanager
    def held(self, start: np.ndarray, size: np.ndarray) -> Iterator[None]:
        """Within it these bytes of the sparse file are there.

        Args:
            start, size: of each range, [n].

        Raises:
            StoreError: where they cannot be had.
            Closed: when whoever asked is to end.
        """
        pages = self._pages.pages_of(start, size)
        self.hold(pages)
        try:
            yield
        finally:
            self.release(pages)

    def pages_of(self, start: np.ndarray, size: np.ndarray) -> np.ndarray:
        """The pages that ranges touch (see `SparseFile.pages_of`)."""
        return self._pages.pages_of(start, size)

    def hold(self, pages: np.ndarray) -> None:
        """Have pages there, and keep them until `release`. Raises as `held`."""
        if self._damage is not None:
            raise BetonError(self._damage)
        numbers = pages.tolist()
        for page in numbers:
            self._pages.hold(page)
        try:
            self._pages.touch(pages)
            # More than once where a page was fetched ahead and dropped again before its task, which makes room for
            # others, has ended: from the second time on it is held.
            while missing := [page for page in numbers if not self._pages.is_there(page)]:
                keys = [(self, page) for page in missing]
                self._fetcher.ask([(key, self._page_task(key[1])) for key in keys])
                self._fetcher.wait(keys)
                if self._damage is not None:
                    break
        except BaseException:
            self.release(pages)
            raise
        if self._damage is not None:
            self.release(pages)
            raise BetonError(self._damage)

    def release(self, pages: np.ndarray) -> None:
        """Let go of pages that were held."""
        for page in pages.tolist():
            self._pages.release(page)
        self._cache.let_go()

    def ahead(self, pages: np.ndarray) -> int:
        """Have pages fetched, in this order, after what is waited for; how many were not there."""
        tasks = [((self, page), self._page_task(page)) for page in pages.tolist() if not self._pages.is_there(page)]
        if tasks:
            self._fetcher.ask(tasks, ahead=True)
        return len(tasks)

    def missing(self) -> int:
        """How many pages are not there."""
        return int((self._pages.here == 0).sum())

    def _opened(self) -> SparseFile:
        """The sparse file of images, in a folder that nobody removes while it is open."""
        while True:
            place = self._cache.with_room(lambda: self._cache.entry(self.address, self._stat))
            with contextlib.suppress(FileNotFoundError):
                pages = SparseFile(place, "pages", self.size, PAGE)
                if lock_range(pages.locks, OPEN, shared=True) and (place / "pages.records").exists():
                    return pages

    def _get(self, start: int, size: int) -> memoryview:
        try:
            return self._store.read(self.address.key, start, size, self._stat.version)
        except Changed:
            raise UserError(
                f"{self.address} is no longer the file that was opened: it has been replaced meanwhile. Begin again "
                "when it stays as it is"
            ) from None

    def _page_task(self, page: int) -> Callable[[], None]:
        def work() -> None:
            pages = self._pages
            get = functools.cache(self._get)  # what has come is not asked for again while room is made for it
            pages.hold(page)
            try:
                written = self._on_disk(lambda: pages.fetch(page, get, lambda: self._store.closed))
            finally:
                pages.release(page)
            if written:
                with self._told():
                    self._cache.added(written)
                    if not self._checked:
                        self._check_whole()

        return work

    def _table_task(self, tables: SparseFile, part: np.ndarray) -> Callable[[], None]:
        def work() -> None:
            begin = int(part[0]) * TABLE
            data = self._get(begin, min(self.size, (int(part[-1]) + 1) * TABLE) - begin)

            def cut(start: int, size: int) -> memoryview:
                return data[start - begin : start - begin + size]

            closed = lambda: self._store.closed  # noqa: E731
            written = sum(self._on_disk(lambda page=int(page): tables.fetch(page, cut, closed)) for page in part)
            with self._told():
                self._cache.added(written)

        return work

    def _on_disk(self, work: Callable[[], Answer]) -> Answer:
        """What `work` gives, with room on the disk (see `Cache.with_room`)."""
        with self._told():
            return self._cache.with_room(work)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Within it what the disk refuses is told as a UserError."""
        try:
            yield
        except OSError as error:
            shown = f"--cache {printable(str(self._cache.folder))}"
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise UserError(
                    f"{shown}: no further file can be opened ({error.strerror}). Raise the limit of open files before "
                    "the start: ulimit -n 65536"
                ) from None
            hint = ". Give a smaller --cache-size, or another folder" if error.errno in FULL else ""
            raise UserError(f"{shown} cannot be written: {error.strerror or error}{hint}") from None

    def _check_whole(self) -> None:
        """Look at the digest of the whole file, once its last pages are there."""
        here = self._pages.here
        missing = np.flatnonzero(here == 0)
        # those that hold tables alone are never asked for
        if 0 < len(missing) <= 2 and np.isin(missing, (0, len(here) - 1)).all():
            self.ahead(missing)
        if len(missing) or not self._whole.acquire(blocking=False):
            return
        try:
            if self._checked:
                return
            pages = np.arange(len(here))
            for page in pages.tolist():
                self._pages.hold(page)
            try:
                if not self._pages.here.all():
                    return
                with self.path.open("rb") as file:
                    found = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
                if found == self._digest:
                    self._checked = True
                    (self.path.parent / _checked_name(self._digest)).touch()
                    return
                # it is the disk's fault where a page is not what came from the store
                if self._pages.forget_damaged():
                    return
                self._checked = True
                for page in pages.tolist():
                    self._pages.forget(page)
            finally:
                self.release(pages)
            self._damage = (
                f"{self.address} is not what the set's index says: the digest of its bytes is another. It is damaged, "
                "or the index is of other files"
            )
        finally:
            self._whole.release()


def _read_whole(descriptor: int, start: int, size: int, path: Path) -> np.ndarray:
    """Bytes of an open file, uint8 [size]. OSError where it ends before."""
    data = np.empty(size, np.uint8)
    place = 0
    while place < size and (count := os.preadv(descriptor, [data.data[place:]], start + place)):
        place += count
    if place < size:
        raise OSError(errno.EIO, f"{path} has become shorter")
    return data


def _checked_name(digest: str | None) -> str:
    return f"checked-{(digest or '').removeprefix('sha256:')[:64]}"
