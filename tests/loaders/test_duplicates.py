"""A set whose duplicates are noted: no epoch shows them, and all else is as of a set without them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastpmae_loaders import PairedViews, PlainViews, UserError
from fastpmae_loaders.errors import BetonError
from fastpmae_loaders.order import PageOrder, Pages
from fastpmae_loaders.sources.beton_set import BetonSet, open_set
from fastpmae_loaders.sources.duplicates import DUPLICATES, duplicates_file
from fastpmae_loaders.sources.remote_beton import RemoteSet, open_remote
from fastpmae_loaders.sources.set_index import read_index
from fastpmae_loaders.stores.cache import CacheSettings
from tests.loaders.test_sets import loader, make_parts
from tests.stores import BUCKET, faulty_server, told, unlisted_server

LEFT_OUT = np.array([0, 4, 8, 9, 20, 28])
KEPT = np.setdiff1d(np.arange(29), LEFT_OUT)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same set without and with duplicates noted."""
    plain = make_parts(tmp_path_factory.mktemp("plain") / "made") / "set"
    noted = tmp_path_factory.mktemp("noted") / "set"
    shutil.copytree(plain, noted)
    bits = np.packbits(np.isin(np.arange(29), LEFT_OUT), bitorder="little")
    (noted / DUPLICATES).write_bytes(duplicates_file(bits, read_index(noted / "index.json")))
    return plain, noted


@pytest.mark.parametrize("options", [{"page_order": True}, {"page_order": False}, {"shuffle": False}])
def test_an_epoch_is_that_of_the_other_images_alone(sets: tuple[Path, Path], options: dict) -> None:
    plain, noted = sets
    with loader(noted, **options) as views, loader(plain, indices=KEPT.tolist(), **options) as alone:
        assert len(views) == len(alone) == 6
        for epoch in range(3):
            assert views.order(epoch).tolist() == alone.order(epoch).tolist()
            assert sorted(views.order(epoch).tolist()) == KEPT.tolist()
        for one, other in zip(views, alone, strict=True):
            assert one.index.tolist() == other.index.tolist()
            assert torch.equal(one.simple, other.simple)


def test_evaluation_shows_every_image(sets: tuple[Path, Path]) -> None:
    with PlainViews(sets[1], 32) as views:
        assert sum(len(label) for _, label, _ in views) == 29


def test_resumed_on_another_number_of_ranks_exactly(sets: tuple[Path, Path]) -> None:
    noted = sets[1]
    with loader(noted, 12) as views:
        whole = [sorted(batch.index.tolist()) for batch in views]
        iteration = iter(views)
        next(iteration)
        state = views.state_dict()
    rest: list[int] = []
    for rank in range(2):
        with loader(noted, 6, rank=rank, world_size=2) as views:
            views.load_state_dict(state)
            rest += [index for batch in views for index in batch.index.tolist()]
    assert sorted(rest) == whole[1]
    assert len(whole) == 2


def test_a_position_of_the_set_with_all_images_is_refused(sets: tuple[Path, Path]) -> None:
    plain, noted = sets
    with loader(plain) as views:
        iteration = iter(views)
        next(iteration)
        state = views.state_dict()
    with loader(noted) as views, pytest.raises(UserError):
        views.load_state_dict(state)


def test_mixed_with_another(sets: tuple[Path, Path]) -> None:
    plain, noted = sets
    with loader([str(noted), str(plain)], 8) as views:
        assert views.count == 23 + 29
        shown = [int(index) for batch in views for index in batch.index]
    assert sorted(shown) == [*KEPT.tolist(), *range(29, 58)]


def test_of_a_set_in_a_store(sets: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(sets[1], tmp_path / "data" / BUCKET / "set")
    with faulty_server(tmp_path / "data") as server, told(server), loader(sets[1]) as here:
        samples = open_remote(f"s3://{BUCKET}/set", CacheSettings(tmp_path / "cache", "1GB"))
        assert isinstance(samples, BetonSet)
        with loader(samples) as there:
            assert [there.order(epoch).tolist() for epoch in range(2)] == [
                here.order(0).tolist(),
                here.order(1).tolist(),
            ]


def test_a_store_that_refuses_what_is_missing_has_a_set_without_notes(
    sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, folder in zip(("plain", "noted"), sets, strict=True):
        shutil.copytree(folder, tmp_path / "data" / BUCKET / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    with unlisted_server(tmp_path / "data") as environment, told(environment):
        plain, noted = (open_remote(f"s3://{BUCKET}/{name}") for name in ("plain", "noted"))
        assert isinstance(plain, RemoteSet)
        assert isinstance(noted, RemoteSet)
        assert (plain.shown, noted.shown) == (29, 23)
        (note,) = plain.notes
        assert "duplicates.bits is refused" in note
        assert noted.notes == ()
        assert bytes(plain.payload(3)) == bytes(open_set(sets[0]).payload(3))
        with pytest.raises(UserError, match="refuses these credentials"):
            open_remote(f"s3://{BUCKET}/nothing")


def test_notes_on_another_index_are_refused_at_the_opening(sets: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(sets[1], tmp_path / "set")
    other = make_parts(tmp_path / "made", broken=(3,)) / "set"
    shutil.copy(other / "index.json", tmp_path / "set" / "index.json")
    with pytest.raises(BetonError, match="made for another index"):
        open_set(tmp_path / "set")
    with pytest.raises(BetonError, match="made for another index"):
        PairedViews(tmp_path / "set", 4, "torch")


def test_pages_that_lose_all_their_samples() -> None:
    bits = np.packbits([0, 0, 1, 1, 0, 1, 0, 0, 1], bitorder="little")
    starts = np.array([0, 2, 4, 9])
    pages = Pages(starts, left_out=bits)
    assert pages.shown_before.tolist() == [0, 2, 2, 5]
    assert pages.together(np.array([2, 1])).tolist() == [4, 6, 7]
    assert pages.together(np.array([1])).tolist() == []
    for epoch in range(4):
        order = PageOrder(0, epoch, pages, together=1)
        assert sorted(order.places(0, 5).tolist()) == [0, 1, 4, 6, 7]
        assert [order.places(place, place + 1)[0] for place in range(5)] == order.places(0, 5).tolist()
