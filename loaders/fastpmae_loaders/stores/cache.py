"""A folder of this machine that keeps parts of a store's files, up to a size: what was not used for longest goes first.

Each version of a file has a folder in it: two sparse files of the file's own size, one for pages of images and one for
the tables of .beton files, and beside each a record for every page (see `pages.py`). Any number of processes use a
cache at once; a kill at any moment leaves it sound.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.locks import lock
from fastpmae_loaders.printable import printable
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.stores.client import Stat
from fastpmae_loaders.stores.range_locks import available, lock_range, unlock_range
from fastpmae_loaders.values import Typed

Answer = TypeVar("Answer")

PAGE = 8 << 20
"""Bytes of a request and of what is kept or dropped at a time: some 84 photographs."""
TABLE = 256 << 10
"""The same of tables, which are small and lie at a file's beginning and end."""
LEAST = 8 * PAGE
RECORD = np.dtype([("here", "u1"), ("", "u1", 3), ("crc", "<u4"), ("used", "<u4")])
"""Of a page: whether it is there, the CRC-32 of its bytes, and when it was last asked for (seconds since 1970)."""
OPEN = 1 << 40
"""The place in a file of records that whoever has the file open keeps locked."""
_MARK = "fastpmae-cache"
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What writing to a disk without room ends in."""
_BESIDE = frozenset(("copies", "runs", "sources", "writing"))
"""Folders that others of our modules keep in a cache's folder, maybe before there is a cache."""
_UNITS = {"": 1} | {
    letter + more: base**power for power, letter in enumerate("KMGT", 1) for more, base in (("", 1000), ("I", 1024))
}


@dataclass(frozen=True)
class CacheSettings(Typed):
    """Where parts of a store's files are kept on this machine.

    Attributes:
        folder: of the cache; None takes fastpmae/stores in the user's folder of caches (XDG_CACHE_HOME).
        size: up to which it grows, in bytes or with a unit, as "200GB" or "1.5TiB".
    """

    folder: Path | None = None
    size: str = "100GB"

    def __post_init__(self) -> None:
        super().__post_init__()
        bytes_of(self.size)

    @property
    def place(self) -> Path:
        """The folder."""
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return self.folder or Path(home).expanduser() / "fastpmae" / "stores"


def bytes_of(size: str) -> int:
    """How many bytes "200GB" are. UserError for what is no size, and for less than a cache works with."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,6})?) ?([KMGT]?I?)B?", size.strip().upper())
    if found is None or found[2] not in _UNITS:
        raise UserError(f"a cache's size is {printable(size)!r}; expected a number of bytes such as 200GB or 1.5TiB")
    count = int(float(found[1]) * _UNITS[found[2]])
    if count < LEAST:
        raise UserError(f"a cache of {printable(size)} is too small: it takes {LEAST:,} bytes at least")
    return count


class Cache:
    """A cache's folder, made where there is none.

    Args:
        limit: bytes on the disk above which pages are dropped. Those that a batch is being made of stay.

    Raises:
        UserError: for a folder that is somebody's own, cannot be written, or whose file system cannot drop parts of a
            file.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        if not sys.platform.startswith("linux") or not available():
            raise UserError("reading from an object store takes Linux, whose locks and sparse files its cache needs")
        self.folder, self.limit = folder, limit
        self._over = False
        self._alone = threading.Lock()
        shown = printable(str(folder))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark = folder / _MARK
            if not mark.exists():
                if any(path.name not in _BESIDE for path in folder.iterdir()):
                    raise UserError(f"--cache {shown} holds other files: name a new or empty folder, which is its own")
                mark.touch()
            self._clear()
            self.with_room(self._try_to_drop)
        except OSError as error:
            raise UserError(f"--cache {shown} cannot be written: {error.strerror or error}") from None

    def entry(self, address: Address, stat: Stat) -> Path:
        """The folder of one version of a file, with its sparse files and records; made where there is none."""
        name = hashlib.sha256(f"{address}\n{stat.mark}\n{stat.size}".encode()).hexdigest()[:32]
        place = self.folder / name
        if place.is_dir():
            return place
        beside = self.folder / f".partial-{uuid.uuid4().hex[:16]}"
        beside.mkdir()
        try:
            for kind, page in (("pages", PAGE), ("tables", TABLE)):
                with (beside / kind).open("wb") as file:
                    file.truncate(stat.size)
                with (beside / f"{kind}.records").open("wb") as file:
                    # allocated: that a page is there or dropped can then be noted on a disk that is full, too
                    os.posix_fallocate(file.fileno(), 0, -(-stat.size // page) * RECORD.itemsize)
            about = {"address": str(address), "version": stat.mark, "bytes": stat.size}
            (beside / "about.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
            beside.rename(place)
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)
            if not place.is_dir():  # else another process was first
                raise
        return place

    def added(self, count: int) -> None:
        """So many bytes have been written: count them, and drop others where they are too many."""
        with self._usage() as usage:
            usage[0] += count
            over = usage[0] > self.limit
        if over:
            self.drop(self.limit - self.limit // 10)

    def let_go(self) -> None:
        """Pages are no longer held: drop some where too many were held for the limit to be kept."""
        if self._over:
            self.drop(self.limit - self.limit // 10)

    def drop(self, target: int) -> int:
        """Drop what was not used for longest until the cache takes `target` bytes of the disk; what it takes then.

        Another process that does so already is left to it.
        """
        with (self.folder / ".drop").open("w") as alone:
            return target if lock(alone) is False else self._dropped_to(self._measure(), target)

    def with_room(self, work: Callable[[], Answer]) -> Answer:
        """What `work` gives, which writes; while the disk is full, pages are dropped and it is tried again.

        Raises:
            OSError: of `work`; for a full disk once nothing is left to drop.
        """
        try:
            return work()
        except OSError as error:
            if error.errno not in FULL:
                raise
        # one thread at a time: several would take the room from each other
        with self._alone:
            while True:
                made = self._make_room()
                try:
                    return work()
                except OSError as error:
                    if error.errno not in FULL or not made:
                        raise

    def _make_room(self) -> bool:
        """Drop a quarter of what is kept, two pages at least; whether there is more room now."""
        with (self.folder / ".drop").open("w") as alone:
            if lock(alone) is False:
                # who has it drops pages: there is room, or nothing to drop, when it is done
                lock(alone, wait=True)
                return True
            used = self._measure()
            return self._dropped_to(used, used - max(used // 4, 2 * PAGE)) < used

    def _dropped_to(self, used: int, target: int) -> int:
        """See `drop`, of a cache that takes `used` bytes. The caller holds the lock."""
        victims = []
        for place in self._entries():
            records = _records_of(place)
            victims += [(int(records["used"][page]), place, int(page)) for page in np.flatnonzero(records["here"])]
        for _, place, page in sorted(victims, key=lambda victim: victim[0]):
            if used <= target:
                break
            used -= drop_page(place, page)
        if used > target:
            used -= self._drop_leftovers()
        with self._usage() as usage:
            usage[0] = used
        self._over = used > self.limit
        return used

    @contextlib.contextmanager
    def _usage(self) -> Iterator[np.ndarray]:
        """The bytes that all processes have counted, int64 [1], for this process alone."""
        descriptor = os.open(self.folder / ".usage", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(descriptor, wait=True)
            usage = np.frombuffer(os.pread(descriptor, 8, 0).ljust(8, b"\0"), np.int64).copy()
            yield usage
            with contextlib.suppress(OSError):  # of a disk that is full: who makes room there measures anew
                os.pwrite(descriptor, usage.tobytes(), 0)
        finally:
            os.close(descriptor)

    def _measure(self) -> int:
        """Bytes that the entries take on the disk, whatever became of whoever wrote them."""
        total = 0
        for place in self._entries():
            with contextlib.suppress(OSError):
                total += sum(512 * (place / kind).stat().st_blocks for kind in ("pages", "tables"))
        return total

    def _entries(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if re.fullmatch("[0-9a-f]{32}", path.name)]

    def _drop_leftovers(self) -> int:
        """Remove what no record speaks of (of killed processes), and files without a page that nobody has open."""
        freed = 0
        for place in self._entries():
            with contextlib.suppress(OSError):
                records = _records_of(place)
                before = 512 * (place / "pages").stat().st_blocks
                if before > PAGE * int(records["here"].sum()):
                    for page in np.flatnonzero(records["here"] == 0):
                        drop_page(place, int(page))
                    freed += before - 512 * (place / "pages").stat().st_blocks
                if not records["here"].any():
                    freed += _remove_if_closed(place)
        return freed

    def _try_to_drop(self) -> None:
        """See that this file system can drop a part of a file."""
        path = self.folder / f".try-{uuid.uuid4().hex[:16]}"
        try:
            with path.open("w+b") as file:
                file.write(bytes(1 << 16))
                file.flush()
                punch(file.fileno(), 0, 1 << 16)
                locked = lock_range(file.fileno(), 0)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK):
                raise
            locked = False
        finally:
            path.unlink(missing_ok=True)
        if not locked:
            raise UserError(
                f"--cache {printable(str(self.folder))}: this file system cannot drop or lock a part of a file: name a "
                "folder on a local disk (ext4, xfs, btrfs) or in memory (tmpfs)"
            )

    def _clear(self) -> None:
        """Remove what killed processes left half made."""
        for path in self.folder.glob(".partial-*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > 60:
                    shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(".try-*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > 60:
                    path.unlink()


def drop_page(place: Path, page: int) -> int:
    """Drop one page of a file's images, unless somebody holds it; how many bytes that frees."""
    with contextlib.ExitStack() as stack:
        try:
            locks = os.open(place / "pages.records", os.O_RDWR)
            stack.callback(os.close, locks)
            file = os.open(place / "pages", os.O_RDWR)
            stack.callback(os.close, file)
        except OSError:
            return 0
        if not lock_range(locks, page):
            return 0
        before = os.fstat(file).st_blocks
        os.pwrite(locks, b"\0", page * RECORD.itemsize)  # first: who finds it there may read it
        punch(file, page * PAGE, PAGE)
        unlock_range(locks, page)
        return 512 * (before - os.fstat(file).st_blocks)


def _remove_if_closed(place: Path) -> int:
    """Remove a file's folder where no process has it open; how many bytes that frees."""
    descriptor = os.open(place / "pages.records", os.O_RDWR)
    try:
        if not lock_range(descriptor, OPEN):
            return 0
        freed = 512 * (place / "tables").stat().st_blocks
        shutil.rmtree(place, ignore_errors=True)
        return freed
    finally:
        os.close(descriptor)


def _records_of(place: Path) -> np.ndarray:
    try:
        return np.fromfile(place / "pages.records", RECORD)
    except OSError:
        return np.zeros(0, RECORD)


def punch(descriptor: int, start: int, size: int) -> None:
    """Give the disk back a part of a file, which reads as zeros from then on. OSError where that cannot be."""
    libc = ctypes.CDLL(None, use_errno=True)
    keep_size_and_punch = 0x01 | 0x02
    if libc.fallocate(descriptor, keep_size_and_punch, ctypes.c_int64(start), ctypes.c_int64(size)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
