"""Whole files of a store, copied to this machine: weights and logs, which are read as files and not by pages.

Each address that is asked for has a folder among the copies, in which its files lie as they do in the store. A file of
which the store has another version by now is fetched anew. Who asks keeps the folder until its process ends; of the
others those that were not used for longest go once all together are larger than a cache may be.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import atomic_write
from fastpmae_loaders.locks import lock
from fastpmae_loaders.printable import printable
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.stores.cache import CacheSettings, bytes_of
from fastpmae_loaders.stores.client import Stat, Store
from fastpmae_loaders.stores.prefetch import side_by_side
from fastpmae_loaders.stores.range_locks import available, lock_range

_PART = 16 << 20
"""Bytes of a request."""
_THREADS = 8
_USED, _VERSIONS = ".used", ".versions.json"
_kept: dict[Path, int] = {}
"""Folders that this process uses, and the open file of each by which others see so."""


def fetch_file(store: Store, address: Address, path: Path, stat: Stat | None = None) -> None:
    """Write a store's file to a path of this machine, whole or not at all, by several requests at a time.

    Raises:
        StoreError: where it cannot be had, or is replaced meanwhile.
        UserError: where it cannot be written.
    """
    found = stat or store.stat(address.key)

    def one(beside: Path, start: int) -> int:
        data = store.read(address.key, start, min(_PART, found.size - start), found.version)
        with beside.open("r+b") as file:
            file.seek(start)
            return file.write(data)

    with atomic_write(path) as beside:
        beside.touch()
        os.truncate(beside, found.size)
        side_by_side([partial(one, beside, start) for start in range(0, found.size, _PART)], _THREADS)


def copy_here(
    store: Store, folder: Address, names: Iterable[str], asked: Address, settings: CacheSettings | None = None
) -> Path:
    """Files of a store in a folder of this machine, each the store's version of now; other files in it go.

    Args:
        folder: the address that the files lie below.
        names: of the files, relative to it.
        asked: whose copy it is: another address has a folder of its own.

    Raises:
        UserError: where the store cannot be read, or the folder not be written.
    """
    settings = settings or CacheSettings()
    copies = settings.place / "copies"
    digest = hashlib.sha256(str(asked).encode()).hexdigest()[:12]
    place = copies / f"{folder.name or folder.bucket}-{digest}"
    try:
        _keep(place)
        with (place / ".copying").open("w") as alone:
            lock(alone, wait=True)
            before = _versions(place)
            now = {}
            for name in names:
                address = folder / name
                stat = store.stat(address.key)
                now[name] = [stat.mark, stat.size]
                if before.get(name) != now[name] or not (place / name).is_file():
                    (place / name).parent.mkdir(parents=True, exist_ok=True)
                    fetch_file(store, address, place / name, stat)
            # where another process reads them the next one does it
            if lock_range(_kept[place], 0):
                for name in before.keys() - now.keys():
                    (place / name).unlink(missing_ok=True)
            else:
                now |= {name: before[name] for name in before.keys() - now.keys()}
            lock_range(_kept[place], 0, shared=True)
            (place / _VERSIONS).write_text(json.dumps(now))
        _drop(copies, bytes_of(settings.size))
    except OSError as error:
        raise UserError(f"{printable(str(place))} cannot be written: {error.strerror or error}") from None
    return place


def _keep(place: Path) -> None:
    """Make a folder that nobody removes while this process lives, and note that it is used now."""
    while place not in _kept or not (place / _USED).exists():
        place.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place / _USED, os.O_RDWR | os.O_CREAT, 0o666)
        if (not available() or lock_range(descriptor, 0, shared=True)) and (place / _USED).exists():
            _kept[place] = descriptor
        else:
            os.close(descriptor)
    os.utime(place / _USED)


def _versions(place: Path) -> dict[str, list[object]]:
    """Of each file that was fetched its version; of a record that a kill cut short none."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((place / _VERSIONS).read_text())
        if isinstance(found, dict):
            return found
    return {}


def _drop(copies: Path, limit: int) -> None:
    """Remove the folders that were not used for longest until all together have `limit` bytes."""
    found = []
    for place in copies.iterdir():
        with contextlib.suppress(OSError):
            size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
            found.append(((place / _USED).stat().st_mtime, size, place))
    total = sum(size for _, size, _ in found)
    for _, size, place in sorted(found):
        if total <= limit or not available():
            return
        descriptor = os.open(place / _USED, os.O_RDWR)
        try:
            if place not in _kept and lock_range(descriptor, 0):
                shutil.rmtree(place, ignore_errors=True)
                total -= size
        finally:
            os.close(descriptor)
