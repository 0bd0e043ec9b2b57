"""Images in a store: the batches of the local file to the bit, whatever becomes of the store meanwhile."""

import pickle
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastpmae_loaders import PairedViews, UserError, ViewSettings, open_samples
from fastpmae_loaders.engines.lookahead import Fetched
from fastpmae_loaders.sources.beton_set import BetonSet
from fastpmae_loaders.sources.remote_beton import RemoteBeton, RemoteSet, open_remote
from fastpmae_loaders.stores.cache import CacheSettings
from fastpmae_loaders.stores.client import StoreError
from tests.loaders.files import made_pixels, write_beton
from tests.loaders.test_sets import make_parts
from tests.stores import BUCKET, Server, faulty_server, told

SETTINGS = ViewSettings(image_size=32, patch_size=8, folds=5)
ADDRESS = f"s3://{BUCKET}"
Shown = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket with a file of 90 MB (raw pixels, so that it has many pages and is made soon), and a set."""
    folder = tmp_path_factory.mktemp("store") / "data"
    (folder / BUCKET).mkdir(parents=True)
    images = [np.tile(made_pixels(number, 40, 50), (16, 10, 1)) for number in range(96)]
    write_beton(folder / BUCKET / "large.beton", images, page_size=1 << 23)
    make_parts(folder / BUCKET)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Buckets of which one is a set as a whole."""
    shutil.copytree(make_parts(tmp_path / "made") / "set", tmp_path / "data" / BUCKET)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def faulty(files: Path) -> Iterator[Server]:
    """20 ms before each answer, and one request in a hundred answered 503."""
    with faulty_server(files, latency_ms=20, error_rate=0.01) as server:
        yield server


def cache(tmp_path: Path, size: str = "1GB") -> CacheSettings:
    return CacheSettings(tmp_path / "cache", size)


def loader(samples: object, **settings) -> PairedViews:
    return PairedViews(samples, 8, settings=SETTINGS, seed=3, **settings)  # pyright: ignore[reportArgumentType]


def shown(samples: object, epochs: int = 2, **settings) -> Shown:
    found = []
    with loader(samples, **settings) as batches:
        for epoch in range(epochs):
            batches.set_epoch(epoch)
            found += [(b.index.numpy(), b.label.numpy(), np.concatenate([v.numpy() for v in b.views])) for b in batches]
    return found


def assert_same(ours: Shown, theirs: Shown) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("page_order", [False, True])
def test_a_file_in_a_store_with_latency_and_errors_gives_the_local_bits(files, faulty, tmp_path, engine, page_order):
    local = shown(files / BUCKET / "large.beton", engine=engine, page_order=page_order)
    with told(faulty):
        samples = open_samples(f"{ADDRESS}/large.beton", cache=cache(tmp_path))
        assert isinstance(samples, RemoteBeton)
        assert str(samples.path) == f"{ADDRESS}/large.beton"
        assert_same(shown(samples, engine=engine, page_order=page_order), local)
        # warm: nothing is asked but what the file is
        count = faulty.log.read_bytes().count(b"GET")
        again = open_samples(f"{ADDRESS}/large.beton", cache=cache(tmp_path))
        assert_same(shown(again, engine=engine, page_order=page_order), local)
        assert faulty.log.read_bytes().count(b"GET") == count


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_set_in_a_store_gives_the_local_bits(files, faulty, tmp_path, engine):
    local = shown(files / BUCKET / "set", engine=engine)
    with told(faulty):
        samples = open_samples(f"{ADDRESS}/set/", cache=cache(tmp_path))
        assert isinstance(samples, RemoteSet)
        assert_same(shown(samples, engine=engine), local)
        assert samples.identity == BetonSet(samples.index, files / BUCKET / "set").identity


def test_a_mixture_of_what_lies_here_and_in_a_store(files, faulty, tmp_path):
    own = files / BUCKET / "whole.beton"
    local = shown(open_samples([f"{files / BUCKET / 'large.beton'}:0.7", f"{own}:0.3"]))
    with told(faulty):
        there = open_samples([f"{ADDRESS}/large.beton:0.7", f"{own}:0.3"], cache=cache(tmp_path))
        assert isinstance(there, Fetched)
        assert_same(shown(there), local)


def test_a_set_at_a_buckets_root(root, tmp_path):
    local = shown(root / BUCKET, epochs=1)
    with faulty_server(root) as server, told(server):
        assert_same(shown(open_samples(ADDRESS, cache=cache(tmp_path)), epochs=1), local)


def test_a_cache_that_is_smaller_than_the_file_gives_the_same_bits(files, faulty, tmp_path):
    local = shown(files / BUCKET / "large.beton", epochs=1)
    with told(faulty):
        samples = open_samples(f"{ADDRESS}/large.beton", cache=cache(tmp_path, str(8 << 23)))
        assert_same(shown(samples, epochs=1, workers=2), local)
        used = sum(512 * path.stat().st_blocks for path in (tmp_path / "cache").rglob("pages"))
        assert used <= 10 << 23


def test_a_server_that_is_killed_and_comes_back_in_mid_epoch_is_waited_for(files, tmp_path):
    local = shown(files / BUCKET / "large.beton", epochs=1, page_order=True)
    with faulty_server(files) as server, told(server):
        samples = open_remote(f"{ADDRESS}/large.beton", cache(tmp_path, str(8 << 23)))
        found = []
        with loader(samples, page_order=True) as batches:
            for number, b in enumerate(batches):
                found.append((b.index.numpy(), b.label.numpy(), np.concatenate([v.numpy() for v in b.views])))
                if number == 3:
                    server.kill()
                    threading.Timer(1.0, server.start).start()
        assert_same(found, local)


def test_a_server_that_stays_away_ends_it_with_a_sentence_and_it_goes_on_later(files, tmp_path):
    local = shown(files / BUCKET / "large.beton", epochs=1)
    with faulty_server(files) as server, told(server):
        samples = open_remote(f"{ADDRESS}/large.beton", cache(tmp_path))
        assert isinstance(samples, RemoteBeton)
        samples._reader.store.deadline = 1.0
        found = []

        def show(batches: PairedViews) -> None:
            for b in batches:
                found.append((b.index.numpy(), b.label.numpy(), np.concatenate([v.numpy() for v in b.views])))
                if len(found) == 2:
                    server.kill()

        with loader(samples, ahead=1) as batches:
            # what is fetched ahead may outlast the server
            samples._reader.fetcher.ask = _without_ahead(samples._reader.fetcher.ask)
            with pytest.raises(StoreError, match=r"large.beton: the store cannot be connected to; it was tried for"):
                show(batches)
            state = batches.state_dict()
        assert 2 <= len(found) < len(local)
        server.start()
        with loader(open_remote(f"{ADDRESS}/large.beton", cache(tmp_path))) as batches:
            batches.load_state_dict(state)
            show(batches)
        assert_same(found, local)


def _without_ahead(ask):
    return lambda tasks, *, ahead=False: None if ahead else ask(tasks)


def test_a_close_does_not_wait_for_a_store_that_is_away(files, tmp_path):
    with faulty_server(files) as server, told(server):
        samples = open_remote(f"{ADDRESS}/large.beton", cache(tmp_path))
        server.pause()
        try:
            batches = loader(samples)
            iter(batches)
            time.sleep(0.3)
            began = time.monotonic()
            batches.close()
            assert time.monotonic() - began < 5
        finally:
            server.resume()


def test_it_opens_in_another_process(files, faulty, tmp_path):
    with told(faulty):
        for name in ("large.beton", "set"):
            samples = open_remote(f"{ADDRESS}/{name}", cache(tmp_path))
            again = pickle.loads(pickle.dumps(samples))
            assert len(again) == len(samples)
            assert again.payload(1).tobytes() == samples.payload(1).tobytes()


def test_what_is_not_there_or_no_beton_is_a_sentence(files, faulty, tmp_path):
    (files / BUCKET / "text.beton").write_text("no beton" * 100)
    (files / BUCKET / "empty.beton").touch()
    with told(faulty):
        for name, words in (
            ("missing.beton", "missing.beton does not exist"),
            ("missing", "missing/index.json does not exist"),
            ("text.beton", "not a .beton file"),
            ("empty.beton", "is empty"),
            ("a.tar", "fastpmae-write makes one of it"),
        ):
            with pytest.raises(UserError, match=words):
                open_samples(f"{ADDRESS}/{name}", cache=cache(tmp_path))


def test_a_part_that_is_missing_is_named(root, tmp_path):
    (root / BUCKET / "part-0.beton").unlink()
    with faulty_server(root) as server, told(server), pytest.raises(UserError, match=r"part-0.*does not exist"):
        shown(open_samples(ADDRESS, cache=cache(tmp_path)), epochs=1)
