"""Files of a store by way of the cache: the same bytes, whatever was dropped, killed, damaged or replaced meanwhile."""

import contextlib
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from fastpmae_loaders.errors import BetonError, UserError
from fastpmae_loaders.stores import pages as pages_module
from fastpmae_loaders.stores.cache import PAGE, RECORD, Cache, CacheSettings, bytes_of, drop_page
from fastpmae_loaders.stores.client import Store
from fastpmae_loaders.stores.reader import Reader
from tests.made import REPOSITORY


def made(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@pytest.fixture
def data(place) -> bytes:
    content = made(5 * PAGE + 12_345)
    Store(place).put(f"{place.key}/file", content)
    return content


def settings(tmp_path, size="1GB") -> CacheSettings:
    return CacheSettings(tmp_path / "cache", size)


def read_held(file, start: int, size: int) -> bytes:
    with file.held(np.array([start]), np.array([size])):
        return os.pread(file.descriptor, size, start)


def test_what_is_read_is_what_is_stored_and_comes_once(place, data, tmp_path):
    with Reader(place / "file", settings(tmp_path)) as reader:
        file = reader.file(place / "file")
        asked = []
        read = reader.store.read
        reader.store.read = lambda key, start=0, size=None, version=None: (
            asked.append((start, size)) or read(key, start, size, version)
        )
        rng = np.random.default_rng(1)
        starts = rng.integers(0, len(data) - 200_000, 40)
        with file.held(starts, np.full(40, 200_000)):
            for start in starts.tolist():
                assert os.pread(file.descriptor, 200_000, start) == data[start : start + 200_000]
        first = len(asked)
        assert first == len({start for start, _ in asked}) <= 6
        assert read_held(file, 17, 1000) == data[17:1017]
        assert read_held(file, len(data) - 10, 10) == data[-10:]
        count = len(asked)
        # another opening, of another process say, takes what is there
        with Reader(place / "file", settings(tmp_path)) as again:
            other = again.file(place / "file")
            again.store.read = lambda *_, **__: pytest.fail("asked again")
            assert read_held(other, 5 * PAGE, 12_345) == data[5 * PAGE :]
        assert len(asked) == count


def test_tables_are_fetched_in_few_requests_and_kept_apart(place, data, tmp_path):
    with Reader(place / "file", settings(tmp_path)) as reader:
        file = reader.file(place / "file")
        asked = []
        read = reader.store.read
        reader.store.read = lambda key, start=0, size=None, version=None: (
            asked.append((start, size)) or read(key, start, size, version)
        )
        assert file.read(0, 24).tobytes() == data[:24]
        assert file.read(24, 70_000).tobytes() == data[24:70_024]
        assert file.read(len(data) - 5000, 5000).tobytes() == data[-5000:]
        assert file.read(1000, 3_000_000).tobytes() == data[1000:3_001_000]
        assert len(asked) == 3
        assert file.missing() == 6
        assert file.read(10, 0).size == 0


def test_the_cache_keeps_to_its_size_and_what_is_held_stays(place, tmp_path):
    content = made(14 * PAGE)
    Store(place).put(f"{place.key}/file", content)
    limit = 8 * PAGE
    with Reader(place / "file", settings(tmp_path, str(limit))) as reader:
        file = reader.file(place / "file")
        first = np.array([3])
        file.hold(first)
        for page in range(14):
            assert read_held(file, page * PAGE, PAGE) == content[page * PAGE : (page + 1) * PAGE]
            used = sum(512 * path.stat().st_blocks for path in (tmp_path / "cache").rglob("pages"))
            assert used <= limit + PAGE
        assert os.pread(file.descriptor, PAGE, 3 * PAGE) == content[3 * PAGE : 4 * PAGE]
        file.release(first)
        # those that were used last are there
        assert file.missing() >= 6
        reader.store.read = lambda *_, **__: pytest.fail("was dropped")
        assert read_held(file, 13 * PAGE, 100) == content[13 * PAGE : 13 * PAGE + 100]


def test_a_page_dropped_before_its_fetch_has_ended_is_fetched_again(place, data, tmp_path):
    """Whoever holds it meanwhile waits for the task that has fetched it, and finds nothing of it when that ends."""
    with Reader(place / "file", settings(tmp_path)) as reader:
        file = reader.file(place / "file")
        dropped, may_end = threading.Event(), threading.Event()

        def drop(count: int) -> None:
            if not dropped.is_set():
                assert drop_page(file.path.parent, 1) > 0
                dropped.set()
                assert may_end.wait(20)

        reader.cache.added = drop
        assert file.ahead(np.array([1])) == 1
        assert dropped.wait(20)
        threading.Timer(0.5, may_end.set).start()
        assert read_held(file, PAGE, PAGE) == data[PAGE : 2 * PAGE]


def test_a_page_that_is_damaged_on_the_disk_is_fetched_again(place, data, tmp_path):
    with Reader(place / "file", settings(tmp_path)) as reader:
        assert read_held(reader.file(place / "file"), 2 * PAGE, 1000) == data[2 * PAGE : 2 * PAGE + 1000]
    (path,) = (tmp_path / "cache").rglob("pages")
    with path.open("r+b") as file:
        file.seek(2 * PAGE + 77)
        file.write(b"damage")
    with Reader(place / "file", settings(tmp_path)) as reader:
        assert read_held(reader.file(place / "file"), 2 * PAGE, 1000) == data[2 * PAGE : 2 * PAGE + 1000]


def test_another_version_has_a_place_of_its_own_and_one_that_comes_meanwhile_is_told(place, data, tmp_path):
    with Reader(place / "file", settings(tmp_path)) as reader:
        file = reader.file(place / "file")
        assert read_held(file, 0, 10) == data[:10]
        other = made(len(data), seed=5)
        Store(place).put(f"{place.key}/file", other)
        with pytest.raises(UserError, match=f"{place}/file is no longer the file that was opened"):
            read_held(file, 3 * PAGE, 10)
        assert read_held(file, 0, 10) == data[:10]
    with Reader(place / "file", settings(tmp_path)) as reader:
        assert read_held(reader.file(place / "file"), 0, 10) == other[:10]


def wait_for(done) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_digest_of_a_whole_file_is_looked_at_once(place, data, tmp_path):
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    with Reader(place / "file", settings(tmp_path)) as reader:
        file = reader.file(place / "file", digest)
        # all but the first page, which as a rule holds tables alone
        with file.held(np.arange(1, 6) * PAGE, np.full(5, 1)):
            pass
        wait_for(lambda: any((tmp_path / "cache").rglob("checked-*")))
        assert file.missing() == 0


def test_what_the_disk_has_damaged_is_not_laid_to_the_store(place, data, tmp_path):
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    with Reader(place / "file", settings(tmp_path)) as reader:
        file = reader.file(place / "file", digest)
        assert read_held(file, 2 * PAGE, 10) == data[2 * PAGE : 2 * PAGE + 10]
        with file.path.open("r+b") as sparse:
            sparse.seek(2 * PAGE + 77)
            sparse.write(b"damage")
        with file.held(np.arange(1, 6) * PAGE, np.full(5, 1)):
            pass
        records = file.path.with_name("pages.records")
        wait_for(lambda: np.fromfile(records, RECORD)["here"].tolist() == [1, 1, 0, 1, 1, 1])
        assert not any((tmp_path / "cache").rglob("checked-*"))
        assert read_held(file, 2 * PAGE, 1000) == data[2 * PAGE : 2 * PAGE + 1000]
        wait_for(lambda: any((tmp_path / "cache").rglob("checked-*")))


def test_what_was_held_beyond_the_size_goes_when_it_is_let_go(place, tmp_path):
    Store(place).put(f"{place.key}/file", made(14 * PAGE))
    limit = 8 * PAGE
    with Reader(place / "file", settings(tmp_path, str(limit))) as reader:
        file = reader.file(place / "file")
        with file.held(np.arange(14) * PAGE, np.full(14, PAGE)):
            assert file.missing() == 0
        wait_for(lambda: sum(512 * path.stat().st_blocks for path in (tmp_path / "cache").rglob("pages")) <= limit)


def test_a_disk_that_takes_no_such_file_is_left_as_it_was(place, data, tmp_path, monkeypatch):
    """As under `ulimit -f`."""
    folder = tmp_path / "cache"
    Cache(folder, 1 << 30)
    before = sorted(folder.iterdir())

    def refuse(*_):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    with Reader(place / "file", settings(tmp_path)) as reader, pytest.raises(UserError, match="File too large"):
        reader.file(place / "file")
    assert sorted(folder.iterdir()) == before


def test_a_file_of_another_digest_is_told(place, data, tmp_path):
    digest = "sha256:" + hashlib.sha256(b"other").hexdigest()
    with Reader(place / "file", settings(tmp_path)) as reader:
        file = reader.file(place / "file", digest)
        with contextlib.suppress(BetonError), file.held(np.arange(6) * PAGE, np.full(6, 1)):
            pass
        wait_for(lambda: file.missing() == 6)
        with pytest.raises(BetonError, match=f"{place}/file is not what the set's index says"):
            read_held(file, PAGE, 1)


def test_a_file_of_another_size_than_the_index_says_is_told(place, data, tmp_path):
    with Reader(place / "file", settings(tmp_path)) as reader, pytest.raises(UserError, match="index says 7"):
        reader.file(place / "file", size=7)


KILLED = """
import sys, numpy as np
from pathlib import Path
from fastpmae_loaders.stores.address import parse_address
from fastpmae_loaders.stores.cache import CacheSettings
from fastpmae_loaders.stores.reader import Reader
address = parse_address(sys.argv[1])
with Reader(address, CacheSettings(Path(sys.argv[2]), sys.argv[3])) as reader:
    file = reader.file(address)
    pages = np.random.default_rng(int(sys.argv[4])).permutation(-(-file.size // (8 << 20)))
    print("begins", flush=True)
    for turn in range(1000):
        for page in pages:
            with file.held(np.array([page << 23]), np.array([1])):
                pass
"""


@pytest.mark.slow
def test_several_processes_with_kills_leave_it_sound(place, tmp_path):
    """Two times four processes read more than the cache holds and are killed in the midst; then every byte is right."""
    content = made(16 * PAGE)
    Store(place).put(f"{place.key}/file", content)
    limit = str(8 * PAGE)
    for round_ in range(2):
        arguments = [sys.executable, "-c", KILLED, str(place / "file"), str(tmp_path / "cache"), limit]
        processes = [
            subprocess.Popen([*arguments, str(4 * round_ + seed)], stdout=subprocess.PIPE, cwd=REPOSITORY)
            for seed in range(4)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begins\n"
        time.sleep(1)
        for process in processes:
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.communicate()
    with Reader(place / "file", settings(tmp_path, limit)) as reader:
        file = reader.file(place / "file")
        for page in np.random.default_rng(9).permutation(16).tolist():
            assert read_held(file, page * PAGE, PAGE) == content[page * PAGE : (page + 1) * PAGE]
        reader.cache.drop(0)
    assert sum(512 * path.stat().st_blocks for path in (tmp_path / "cache").rglob("pages")) == 0


def test_a_kill_between_bytes_and_record_costs_a_request(place, data, tmp_path, monkeypatch):
    with Reader(place / "file", settings(tmp_path)) as reader:
        file = reader.file(place / "file")
        write = pages_module.SparseFile._write

        def torn(self, content, start):
            write(self, content[: len(content) // 2], start)
            raise KeyboardInterrupt

        monkeypatch.setattr(pages_module.SparseFile, "_write", torn)
        with pytest.raises(KeyboardInterrupt):
            read_held(file, PAGE, 10)
        monkeypatch.undo()
        assert read_held(file, PAGE, 10) == data[PAGE : PAGE + 10]


def test_a_folder_of_somebodys_own_is_no_cache(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "file").touch()
    with pytest.raises(UserError, match="holds other files"):
        Cache(tmp_path / "own", 1 << 30)
    (tmp_path / "flat").touch()
    with pytest.raises(UserError, match="cannot be written"):
        Cache(tmp_path / "flat", 1 << 30)


@pytest.mark.parametrize(
    ("text", "count"),
    [("200GB", 200 * 10**9), ("1.5TiB", 3 << 39), ("300000000", 300_000_000), ("2 gb", 2 * 10**9), ("4G", 4 * 10**9)],
)
def test_a_size_is_read(text, count):
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["", "much", "-1GB", "1XB", "1kB", "nan", "9" * 30])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="cache"):
        CacheSettings(size=text)


def test_records_say_where_a_version_is_from(place, data, tmp_path):
    with Reader(place / "file", settings(tmp_path)) as reader:
        reader.file(place / "file")
    (about,) = (tmp_path / "cache").rglob("about.json")
    assert json.loads(about.read_text())["address"] == str(place / "file")
