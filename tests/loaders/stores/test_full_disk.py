"""A cache on a disk that is full: it gets room for as long as there is something to drop, and what fails is told."""

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.stores import pages as pages_module
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.stores.cache import PAGE, TABLE, Cache
from fastpmae_loaders.stores.client import Stat, Store
from fastpmae_loaders.stores.pages import CachedFile
from fastpmae_loaders.stores.prefetch import Fetcher
from tests.made import REPOSITORY


class Zeros(Store):
    """A store whose files are zeros; `requests`, the ranges that were asked for."""

    closed = False  # pyright: ignore

    def __init__(self) -> None:
        self.requests: list[tuple[int, int]] = []

    def read(self, key: str, start: int = 0, size: int | None = None, version: str | None = None) -> memoryview:
        assert size is not None
        self.requests.append((start, size))
        time.sleep(0.01)
        return memoryview(bytes(size))


def opened(cache: Cache, fetcher: Fetcher, name: str = "a", size: int = 50 * PAGE) -> tuple[CachedFile, Zeros]:
    store = Zeros()
    return CachedFile(store, Address("s3", "b", name), Stat(size, None, "m"), cache, fetcher), store


def taken(folder: Path) -> int:
    """Bytes of the disk that a cache's images take."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("pages"))


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def fetcher():
    fetcher = Fetcher()
    yield fetcher
    fetcher.close()


def test_many_threads_read_all_on_a_disk_that_is_smaller_than_the_limit(tmp_path, monkeypatch, fetcher):
    """A disk of 12 pages, a limit of 18, 16 threads; each write leaves half a page before it fails."""
    write = pages_module.SparseFile._write

    def on_small_disk(self, data, start):
        if taken(tmp_path) + len(data) > 12 * PAGE:
            write(self, data[: len(data) // 2], start)
            raise full()
        write(self, data, start)

    monkeypatch.setattr(pages_module.SparseFile, "_write", on_small_disk)
    file, store = opened(Cache(tmp_path, 18 * PAGE), fetcher)
    for start in range(0, 50, 8):
        file.ahead(np.arange(start, min(start + 16, 50)))
        for page in range(start, min(start + 8, 50)):
            pages = np.array([page])
            file.hold(pages)
            assert os.pread(file.descriptor, 8, page * PAGE) == bytes(8)
            file.release(pages)
    assert {start for start, _ in store.requests} == set(range(0, 50 * PAGE, PAGE))


def test_a_page_comes_once_while_room_is_made_for_it(tmp_path, monkeypatch, fetcher):
    file, store = opened(Cache(tmp_path, 18 * PAGE), fetcher)
    for page in range(3):
        file.hold(np.array([page]))
        file.release(np.array([page]))
    write, failed = pages_module.SparseFile._write, []

    def once(self, data, start):
        if not failed:
            failed.append(start)
            raise full()
        write(self, data, start)

    monkeypatch.setattr(pages_module.SparseFile, "_write", once)
    file.hold(np.array([7]))
    assert failed == [7 * PAGE]
    assert [start for start, _ in store.requests].count(7 * PAGE) == 1


def test_what_is_kept_is_dropped_for_a_new_start_and_a_new_part(tmp_path, monkeypatch, fetcher):
    cache = Cache(tmp_path, 18 * PAGE)
    file, _ = opened(cache, fetcher)
    for page in range(8):
        file.hold(np.array([page]))
        file.release(np.array([page]))
    limit, try_to_drop, allocate = [8 * PAGE], Cache._try_to_drop, os.posix_fallocate

    def refuse_when_full(*_) -> None:
        if taken(tmp_path) >= limit[0]:
            raise full()

    monkeypatch.setattr(Cache, "_try_to_drop", lambda self: refuse_when_full() or try_to_drop(self))
    Cache(tmp_path, 18 * PAGE)
    limit[0] = taken(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: refuse_when_full() or allocate(*arguments))
    opened(cache, fetcher, "b")
    assert 0 < taken(tmp_path) < limit[0]
    limit[0] = 0
    with pytest.raises(UserError, match=r"cannot be written: No space left on device\. Give a smaller --cache-size"):
        opened(cache, fetcher, "c")
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        Cache(tmp_path, 18 * PAGE)


TOUCHED = """
import contextlib
import sys
from pathlib import Path
from tests.loaders.stores.test_full_disk import *
folder = Path(sys.argv[1])
file, _ = opened(Cache(folder / "cache", 18 * PAGE), Fetcher())
with (folder / "fill").open("wb", buffering=0) as fill, contextlib.suppress(OSError):
    while True:
        fill.write(bytes(1 << 12))
try:
    file.hold(np.array([0]))
except UserError as error:
    print(error)
"""


def test_no_record_is_touched_on_a_full_disk_by_a_map(tmp_path):
    """The first touch of a map that the disk has no room for ends a process."""
    script = f"mount -t tmpfs -o size=4m none {tmp_path} && exec {sys.executable} -c '{TOUCHED}' {tmp_path}"
    alone = ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*alone, "mount", "-t", "tmpfs", "none", tmp_path]).returncode:
        pytest.skip("a disk of a test's own cannot be mounted here")
    ended = subprocess.run([*alone, "sh", "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert "cannot be written: No space left on device" in ended.stdout, ended.stderr
    assert ended.returncode == 0


def test_records_are_allocated_when_a_part_is_opened(tmp_path, fetcher):
    file, _ = opened(Cache(tmp_path, 18 * PAGE), fetcher)
    for kind, page in (("pages", PAGE), ("tables", TABLE)):
        found = file.path.with_name(f"{kind}.records").stat()
        assert found.st_size == 12 * 50 * PAGE // page
        assert 512 * found.st_blocks >= found.st_size


def descriptors(folder: Path) -> int:
    """How many of this process are of files below a folder."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += entry.readlink().is_relative_to(folder)
    return found


def lowest_free() -> int:
    """The number that the next descriptor gets."""
    with Path("/dev/null").open("rb") as file:
        return file.fileno()


def test_a_part_takes_two_descriptors_and_too_many_are_told(tmp_path, fetcher):
    cache = Cache(tmp_path, 18 * PAGE)
    kept = [opened(cache, fetcher, f"part-{number}")[0] for number in range(8)]
    assert kept[0].read(3, 1000).tobytes() == bytes(1000)
    # the thread that has fetched the tables lets go of them a moment later
    deadline = time.monotonic() + 10
    while descriptors(tmp_path) != 2 * 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert descriptors(tmp_path) == 2 * 8
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free() + 1, limits[1]))
    try:
        with pytest.raises(UserError, match=r"no further file can be opened .* before the start: ulimit -n 65536"):
            opened(cache, fetcher, "one-more")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
