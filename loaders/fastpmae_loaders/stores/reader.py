"""What a process reads of a bucket: its connection, its cache and the threads that fetch."""

import atexit
import time
import weakref
from collections.abc import Callable
from types import TracebackType

from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.stores.cache import Cache, CacheSettings, bytes_of
from fastpmae_loaders.stores.client import Stat, Store, StoreError
from fastpmae_loaders.stores.pages import CachedFile
from fastpmae_loaders.stores.prefetch import Fetcher

LAST_MOMENT = 2.0
"""Seconds that the end of a process waits for requests that are under way."""


class Reader:
    """Reads files of one bucket by way of a cache.

    The store is tried at once: what lacks credentials or cannot be reached is told here, within 20 s.

    Args:
        address: of a file or folder in the bucket.
        settings: of the cache.
        try_first: a request that shows whether the bucket can be read, in place of one for the size of the file at
            `address`.

    Raises:
        UserError: where the store cannot be read, or the cache not be written.
    """

    def __init__(
        self,
        address: Address,
        settings: CacheSettings | None = None,
        try_first: Callable[[Store], object] | None = None,
    ) -> None:
        self.address, self.settings = address, settings or CacheSettings()
        self.store = Store(address)
        self._stats: dict[str, Stat] = {}
        self.store.first_try(try_first or (lambda store: self._stats.update({address.key: store.stat(address.key)})))
        self.cache = Cache(self.settings.place, bytes_of(self.settings.size))
        self.fetcher = Fetcher()
        weakref.finalize(self, self.fetcher.close).atexit = False
        _open.add(self)

    def file(self, address: Address, digest: str | None = None, size: int | None = None) -> CachedFile:
        """A file of the bucket, opened.

        Args:
            digest: "sha256:…" of its bytes, where that is known.
            size: in bytes, that it should have.

        Raises:
            UserError: where it is not there, is empty, or of another size.
        """
        stat = self._stats.pop(address.key, None) or self.store.stat(address.key)
        if stat.size == 0:
            raise StoreError(f"{address} is empty")
        if size is not None and stat.size != size:
            raise StoreError(f"{address} has {stat.size:,} bytes, and the set's index says {size:,}")
        return CachedFile(self.store, address, stat, self.cache, self.fetcher, digest)

    def close(self) -> None:
        """Give up all that waits. Harmless when done twice."""
        self.store.close()
        self.fetcher.close()

    def __reduce__(self):
        return _reopen, (self.address, self.settings)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _reopen(address: Address, settings: CacheSettings) -> Reader:
    """A reader in another process: what it reads says whether the store is there."""
    return Reader(address, settings, lambda store: None)


_open: weakref.WeakSet[Reader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Let requests under way come to their end: a thread that comes back from one into an interpreter that is being
    taken down would abort the process."""
    readers = list(_open)
    for reader in readers:
        reader.close()
    end = time.monotonic() + LAST_MOMENT
    for reader in readers:
        reader.fetcher.join(end)
