"""Sets of .beton files: what one file of the same images gives, and a sentence that names the part where one is bad."""

import gc
import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fastpmae_loaders import Beton, PairedViews, PlainViews, UserError, ViewSettings, epoch_order, open_samples
from fastpmae_loaders.errors import BetonError
from fastpmae_loaders.sources import beton_set
from fastpmae_loaders.sources.beton_set import BetonSet, open_set
from fastpmae_loaders.sources.set_index import SetIndex, shard_of
from tests.engines import FFCV
from tests.loaders.files import made_pixels, open_files, write_beton
from tests.made import made_image

ENGINES = ["native", FFCV, "torch"]
SETTINGS = ViewSettings(image_size=32, patch_size=8, folds=5)
PAGE = 1 << 14
SIZES = (7, 9, 5, 8)


def jpeg(number: int, width: int, height: int) -> bytes:
    file = io.BytesIO()
    made_image(number, width, height).save(file, "jpeg", quality=90)
    return file.getvalue()


def make_parts(folder: Path, broken: tuple[int, ...] = (), classes: tuple[str, ...] | None = None) -> Path:
    """29 images in one file and as a set of four; the one file's folder."""
    images, sizes = [], []
    for number in range(sum(SIZES)):
        width, height = 20 + number * 17 % 60, 20 + number * 29 % 60
        sizes.append((width, height))
        images.append(made_pixels(number, height, width) if number % 3 == 0 else jpeg(number, width, height))
    for number in broken:
        images[number] = b"\xff\xd8 no picture"
    folder.mkdir(exist_ok=True)
    write_beton(folder / "whole.beton", images, sizes, PAGE)
    (folder / "set").mkdir()
    first, shards = 0, []
    for number, count in enumerate(SIZES):
        here = slice(first, first + count)
        shards.append(shard_of(write_beton(folder / f"set/part-{number}.beton", images[here], sizes[here], PAGE)))
        first += count
    (folder / "set/index.json").write_text(SetIndex(tuple(shards), classes).to_json())
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("sets") / "sound")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A set whose parts a test may damage."""
    return make_parts(tmp_path / "copied") / "set"


def loader(path: Path | list[str] | BetonSet, batch_size: int = 4, engine: str = "torch", **options) -> PairedViews:
    return PairedViews(path, batch_size, engine, **{"settings": SETTINGS, "drop_last": False, **options})


def shown(views: PairedViews) -> list[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
    return [(batch.index.tolist(), batch.simple, batch.complex, batch.visible) for batch in views]


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        x[0] == y[0] and all(torch.equal(p, q) for p, q in zip(x[1:], y[1:], strict=True))
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_set_gives_the_bits_of_one_file(parts: Path, engine: str) -> None:
    with (
        loader(parts / "whole.beton", 6, "torch", page_order=False) as one,
        loader(parts / "set", 6, engine, page_order=False, workers=3) as many,
    ):
        assert len(many.samples) == 29
        assert same(shown(one), shown(many))
        labels = {int(i): int(n) for batch in many for i, n in zip(batch.index, batch.label, strict=True)}
    assert labels[0] == 0
    assert labels[7] == 0  # each part's own labels, 10 times the place
    assert labels[8] == 10


def test_dali_reads_a_set(parts: Path) -> None:
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("nvidia.nvimgcodec")
    with (
        loader(parts / "set", 6, "dali", page_order=False) as found,
        loader(parts / "set", 6, page_order=False) as ours,
    ):
        for batch, expected in zip(found, ours, strict=True):
            assert batch.index.tolist() == expected.index.tolist()
            assert batch.label.tolist() == expected.label.tolist()
            assert torch.equal(batch.boxes, expected.boxes)


def test_every_image_once_for_evaluation(parts: Path) -> None:
    with (
        PlainViews(parts / "whole.beton", 8, 32, engine="native") as one,
        PlainViews(parts / "set", 8, 32, engine="native") as many,
    ):
        for (a, _, i), (b, _, j) in zip(one, many, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(i, j)


def test_columns_are_those_of_one_file(parts: Path) -> None:
    one, many = open_samples(parts / "whole.beton"), open_samples(parts / "set")
    for name in ("height", "width", "size", "mode"):
        assert np.asarray(getattr(many, name)).tolist() == np.asarray(getattr(one, name)).tolist()
        assert getattr(many, name)[28] == getattr(many, name)[-1] == getattr(one, name)[28]
        assert getattr(many, name)[3:10].tolist() == getattr(one, name)[3:10].tolist()
    with pytest.raises(IndexError):
        many.height[29]
    assert all(many.payload(i).tobytes() == one.payload(i).tobytes() for i in range(29))


def test_the_pages_of_the_order_are_the_files_own(parts: Path) -> None:
    many = open_set(parts / "set")
    own = [open_samples(parts / f"set/part-{number}.beton").page_of for number in range(4)]
    numbers = np.concatenate([np.asarray(pages) + 1000 * number for number, pages in enumerate(own)])
    assert len(set(numbers.tolist())) > 6
    with loader(many, page_order=True) as views:
        assert views.order(3).tolist() == epoch_order(0, 3, 29, numbers).tolist()
    assert (np.diff(many.page_of[:]) != 0).tolist() == (np.diff(numbers) != 0).tolist()


def test_pages_that_the_index_does_not_tell_are_made_up(parts: Path) -> None:
    found = json.loads((parts / "set/index.json").read_text())
    for shard in found["shards"]:
        del shard["pages"]
    index = beton_set.read_index(json.dumps(found).encode())
    with loader(BetonSet(index, parts / "set"), page_order=True) as views:
        assert sorted(views.order(0).tolist()) == list(range(29))
        assert sum(len(batch) for batch in views) == 29


def test_a_set_goes_page_by_page_unless_told(parts: Path) -> None:
    with loader(parts / "set") as views, loader(parts / "whole.beton") as one:
        assert views.page_order
        assert not one.page_order


@pytest.mark.parametrize("indices", [None, [3, 25, 7, 8, 14, 2, 19]])
def test_ranks_show_the_global_batch_between_them(parts: Path, indices: list[int] | None) -> None:
    with loader(parts / "set", 12, page_order=True, indices=indices) as one:
        expected = [sorted(batch.index.tolist()) for batch in one]
    found: list[list[int]] = [[] for _ in expected]
    for rank in range(3):
        with loader(parts / "set", 4, page_order=True, rank=rank, world_size=3, indices=indices) as views:
            for number, batch in enumerate(views):
                assert batch.index.tolist() == views.samples_of(number).tolist()
                found[number] += batch.index.tolist()
    assert [sorted(batch) for batch in found] == expected


def test_resumed_on_another_number_of_ranks_exactly(parts: Path) -> None:
    with loader(parts / "set", 12, "native", drop_last=True) as views:
        whole = {int(i): row for batch in views for i, row in zip(batch.index, batch.simple, strict=True)}
        iteration = iter(views)
        first = next(iteration).index.tolist()
        state = views.state_dict()
    rest: dict[int, torch.Tensor] = {}
    for rank in range(2):
        with loader(parts / "set", 6, "native", drop_last=True, rank=rank, world_size=2) as views:
            views.load_state_dict(state)
            rest |= {int(i): row for batch in views for i, row in zip(batch.index, batch.simple, strict=True)}
    assert sorted([*first, *rest]) == sorted(whole)
    assert all(torch.equal(rest[i], whole[i]) for i in rest)


def test_a_position_of_another_set_is_a_sentence(parts: Path, copied: Path) -> None:
    write_beton(copied / "part-2.beton", [made_pixels(90 + i, 30, 30) for i in range(5)], page_size=PAGE)
    index = beton_set.read_index(copied / "index.json")
    shards = tuple(shard_of(copied / shard.name) for shard in index.shards)
    (copied / "index.json").write_text(SetIndex(shards).to_json())
    with loader(parts / "set") as saved, loader(copied) as views:
        assert views.state_dict()["images"] != saved.state_dict()["images"]
        with pytest.raises(UserError, match="of other images"):
            views.load_state_dict(saved.state_dict())


DAMAGE = {
    "missing": (lambda path: path.unlink(), "does not exist"),
    "cut short": (lambda path: os.truncate(path, path.stat().st_size - 10), "truncated|damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "another file": (lambda path: path.write_bytes((path.parent / "part-1.beton").read_bytes()), "its images: 9"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 40), "not a .beton file"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", DAMAGE)
def test_a_bad_part_is_named_when_it_is_needed(copied: Path, engine: str, case: str) -> None:
    damage, said = DAMAGE[case]
    damage(copied / "part-2.beton")
    with loader(copied, 4, engine, shuffle=False) as views:
        assert len(views.batch_of(range(16))) == 16  # all of the first two parts
        with pytest.raises(BetonError, match=said) as error:
            list(views)
    assert "part-2.beton" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_image_that_stands_in_may_lie_in_the_next_part(tmp_path: Path, engine: str) -> None:
    folder = make_parts(tmp_path / "broken", broken=(6, 7, 28))
    with (
        loader(folder / "whole.beton", 5, "torch", shuffle=False, bad_fraction=1.0) as one,
        loader(folder / "set", 5, engine, shuffle=False, bad_fraction=1.0) as many,
    ):
        assert same(shown(one), shown(many))
        assert many.failed == one.failed == [6, 7, 28]


def test_what_does_not_decode_is_told_by_its_part(tmp_path: Path) -> None:
    folder = make_parts(tmp_path / "broken", broken=(8,))
    with (
        PlainViews(folder / "set", 4, 32) as views,
        pytest.raises(UserError, match=r"look at sample 1 of its part part-1\.beton with fastpmae-write --check"),
    ):
        list(views)


def test_few_parts_are_open_at_a_time(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beton_set, "MOST_OPEN", 2)
    if not Path("/proc/self/fd").exists():
        pytest.skip("open descriptors are read from /proc")
    with loader(parts / "set", 29, "native", page_order=False, workers=1) as views:
        before = open_files(parts)
        peak = 0
        assert isinstance(views.samples, BetonSet)
        opened = views.samples.part

        def counted(number: int):
            nonlocal peak
            found = opened(number)
            peak = max(peak, open_files(parts))
            return found

        monkeypatch.setattr(views.samples, "part", counted)
        batch = next(iter(views))
    assert len(batch) == 29
    # two that are kept, and one for the part that is opened
    assert before < peak <= before + 3


def test_few_parts_of_all_sets_together_are_open(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beton_set, "MOST_OPEN", 3)
    if not Path("/proc/self/fd").exists():
        pytest.skip("open descriptors are read from /proc")
    gc.collect()
    before = open_files(parts)
    sets = [open_set(parts / "set") for _ in range(3)]
    whole = Beton(parts / "whole.beton")
    for turn in range(2):
        for index in range(turn, 29, 3):
            for each in sets:
                assert np.array_equal(each.payload(index), whole.payload(index))
                assert open_files(parts) <= before + 3 + 1  # and the whole file
    # what a set that is gone had open is no longer counted
    sets = sets[:1]
    gc.collect()
    for index in (0, 8, 17, 28):
        sets[0].payload(index)
    assert open_files(parts) == before + 3 + 1


def test_classes_are_the_sets_own_by_name(tmp_path: Path) -> None:
    """Parts that were written apart may count their classes from different names."""
    pytest.importorskip("PIL")
    from fastpmae_loaders.write.write import write_beton as write

    folder = tmp_path / "set"
    folder.mkdir()
    shards = []
    for number, names in enumerate((("cat", "dog"), ("bird", "dog"))):
        for name in names:
            (tmp_path / f"raw{number}" / name).mkdir(parents=True)
            made_image(number, 40, 40).save(tmp_path / f"raw{number}" / name / "a.png")
        write(tmp_path / f"raw{number}", folder / f"part-{number}.beton", workers=1)
        shards.append(shard_of(folder / f"part-{number}.beton"))
    (folder / "index.json").write_text(SetIndex(tuple(shards), ("bird", "cat", "dog")).to_json())
    samples = open_samples(folder)
    assert samples.class_names is not None
    assert [samples.class_names[label] for label in np.asarray(samples.label)] == ["cat", "dog", "bird", "dog"]
    (folder / "index.json").write_text(SetIndex(tuple(shards), ("bird", "dog")).to_json())
    with pytest.raises(BetonError, match=r"part-0\.beton: its class cat is not among"):
        np.asarray(open_samples(folder).label)


def test_a_set_in_another_process(parts: Path) -> None:
    again = pickle.loads(pickle.dumps(open_set(parts / "set")))
    assert again.identity == open_set(parts / "set").identity
    assert len(again.payload(28)) > 0


def test_a_part_may_lie_elsewhere(parts: Path, tmp_path: Path) -> None:
    asked = []

    def open_part(shard):
        asked.append(shard.name)
        return Beton(parts / "set" / shard.name)

    samples = BetonSet(beton_set.read_index(parts / "set/index.json"), tmp_path / "no folder", open_part)
    assert asked == []
    assert samples.height[8] > 0
    assert asked == ["part-1.beton"]


def test_an_index_that_is_not_sound_is_refused_at_the_opening(copied: Path) -> None:
    (copied / "index.json").write_text("{}")
    with pytest.raises(BetonError, match="no index of a set"):
        open_samples(copied)
