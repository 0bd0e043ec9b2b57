"""A set, or one file, written to a store: each file is written here and put there whole."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import atomic_write
from fastpmae_loaders.sources.reading import FILE_LIMIT
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.stores.cache import CacheSettings
from fastpmae_loaders.stores.client import Missing, Store


class StoreTarget:
    """A folder in a store (see `Target`). It travels to other processes by its address.

    Raises:
        UserError: within 20 s, where nothing can be written there.
    """

    def __init__(self, address: Address):
        self._address = address
        self._store = Store(address)
        self._store.try_to_write(address)
        name = hashlib.sha256(str(address).encode()).hexdigest()[:16]
        self._scratch = CacheSettings().place / "writing" / name

    def __reduce__(self):
        return StoreTarget, (self._address,)

    @property
    def shown(self) -> str:
        return str(self._address)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A place on this machine; what killed processes left in it goes with the next file."""
        try:
            self._scratch.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self._scratch} cannot be written: {error.strerror}") from None
        with atomic_write(self._scratch / name) as beside:
            yield beside
            self._store.put(self._key(name), beside)
        # it lies in the store: here nobody asks for it
        (self._scratch / name).unlink(missing_ok=True)

    def put(self, name: str, file: Path) -> None:
        """Put a file of this machine there, whole or not at all. UserError where it cannot be written."""
        self._store.put(self._key(name), file)

    def read(self, name: str) -> bytes | None:
        size = self.size(name)
        if size is None:
            return None
        if size > FILE_LIMIT:
            raise UserError(f"{self._address}/{name} has {size:,} bytes, more than the {FILE_LIMIT:,} that are read")
        return bytes(self._store.read(self._key(name)))

    def size(self, name: str) -> int | None:
        try:
            return self._store.stat(self._key(name)).size
        except Missing:
            return None

    def remove(self, name: str) -> None:
        self._store.delete(self._key(name))

    def names(self) -> Iterator[str]:
        """What lies in it, by names relative to it."""
        prefix = self._address.key and self._address.key + "/"
        return (key.removeprefix(prefix) for key, _ in self._store.files(self._address.key))

    def _key(self, name: str) -> str:
        return (self._address / name).key
