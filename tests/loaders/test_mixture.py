"""Several sources as one: shares, repetition, classes, and exact resume."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastpmae_loaders import PairedViews, UserError, ViewSettings, open_samples
from fastpmae_loaders.mixture import Mixture, sources_named, split_weight
from fastpmae_loaders.order import FileOrder, shuffled_order
from tests.engines import FFCV
from tests.loaders.files import made_pixels, write_beton
from tests.loaders.test_sets import make_parts
from tests.made import made_image

SETTINGS = ViewSettings(image_size=32, patch_size=8, folds=5)


class Some:
    """As much of a source as an order asks for."""

    class_names: list[str] | None = None
    nbytes = 0

    def __init__(self, count: int) -> None:
        self.path = Path(f"{count}")
        self._count = count
        self.height = self.width = self.size = self.mode = self.label = self.page_of = np.ones(count, np.int64)

    def __len__(self) -> int:
        return self._count

    def payload(self, index: int) -> np.ndarray:
        raise NotImplementedError


def mixed(counts: list[int], weights: list[float] | None) -> Mixture:
    return Mixture([Some(count) for count in counts], weights)


def sources(mixture: Mixture, keys: np.ndarray) -> np.ndarray:
    return np.searchsorted(mixture._first, keys % len(mixture), side="right") - 1


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1, 2], [3, 1e-3], None])
def test_every_stretch_has_its_shares(weights) -> None:
    counts = [500, 3000, 100][: len(weights or [1, 2, 3])]
    mixture = mixed(counts, weights)
    order = mixture.order(0, lambda source, epoch: FileOrder(len(source)))
    assert len(order) == sum(counts)
    found = sources(mixture, order.places(0, len(order)))
    shares = np.array(weights or counts) / sum(weights or counts)
    for start, stop in ((0, 100), (37, 900), (0, len(order))):
        for number, share in enumerate(shares):
            assert abs((found[start:stop] == number).sum() - share * (stop - start)) <= len(counts)


def test_any_places_are_those_of_the_whole() -> None:
    mixture = mixed([30, 7, 200], [0.2, 0.5, 0.3])
    order = mixture.order(4, lambda source, epoch: shuffled_order(5, epoch, len(source)))
    whole = order.places(0, len(order))
    noise = np.random.default_rng(0)
    for _ in range(40):
        start, stop = map(int, sorted(noise.integers(0, len(order) + 1, 2)))
        assert order.places(start, stop).tolist() == whole[start:stop].tolist()


def test_a_source_goes_on_where_the_epoch_before_ended() -> None:
    """Of a large one every image comes before any comes again; a small one is repeated, each time with another key."""
    mixture = mixed([1000, 10], [0.5, 0.5])

    def listed(source, epoch):
        return shuffled_order(5, epoch, len(source))

    first, second = (mixture.order(epoch, listed).places(0, 1010) for epoch in (0, 1))
    assert len(set(first.tolist())) == 1010
    large = [int(key) for keys in (first, second) for key in keys % 1010 if key % 1010 < 1000]
    assert len(large) == 1010
    assert sorted(large[:1000]) == list(range(1000))
    small = Counter(int(key) % 1010 for key in first if key % 1010 >= 1000)
    assert len(small) == 10
    assert max(small.values()) - min(small.values()) <= 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a.beton:0.7", ("a.beton", 0.7)),
        ("b/:3", ("b/", 3.0)),
        ("b/:.5", ("b/", 0.5)),
        ("b/:1e-3", ("b/", 1e-3)),
        ("a.beton", ("a.beton", None)),
        ("C:part.beton", ("C:part.beton", None)),
        ("s3://bucket/set", ("s3://bucket/set", None)),
        ("s3://bucket:0.3", ("s3://bucket", 0.3)),
        ("https://host:8080", ("https://host:8080", None)),
        ("https://host:8080/set", ("https://host:8080/set", None)),
        ("https://host:8080/set:2", ("https://host:8080/set", 2.0)),
        ("a:nan", ("a:nan", None)),
    ],
)
def test_only_a_number_at_the_end_is_a_weight(source: str, expected) -> None:
    assert split_weight(source) == expected


def test_a_file_of_that_name_is_meant(tmp_path: Path) -> None:
    path = tmp_path / "a:1"
    path.touch()
    assert split_weight(str(path)) == (str(path), None)


@pytest.mark.parametrize("weight", ["0", "-1", "1e999", "-0.0"])
def test_a_weight_is_above_0(weight: str) -> None:
    with pytest.raises(UserError, match="above 0"):
        split_weight(f"a.beton:{weight}")


@pytest.mark.parametrize("behind", ["nan", "inf", "0,7", "", "half"])
def test_what_is_behind_a_source_and_no_weight_is_told(behind: str, tmp_path: Path) -> None:
    (tmp_path / "a.beton").touch()
    (tmp_path / "b.beton").touch()
    wrong = f"{tmp_path / 'a.beton'}:{behind}"
    for sources in (wrong, [wrong], [f"{tmp_path / 'b.beton'}:0.3", wrong]):
        with pytest.raises(UserError, match=rf"a.beton exists, and {behind!r} behind it is no weight: expected a num"):
            open_samples(sources)


def test_a_weight_behind_one_source_alone_says_nothing(files: Path) -> None:
    path = str(files / "small.beton")
    for source in (f"{path}:0.7", [f"{path}:1"], Path(f"{path}:2")):
        assert open_samples(source).path == Path(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_parts(tmp_path_factory.mktemp("mixed") / "sources")
    write_beton(folder / "small.beton", [made_pixels(70 + i, 40, 36) for i in range(3)])
    return folder


def loader(files: Path, batch_size: int = 8, engine: str = "native", **options) -> PairedViews:
    both = [f"{files / 'small.beton'}:0.5", f"{files / 'set'}:0.5"]
    return PairedViews(both, batch_size, engine, settings=SETTINGS, **options)


@pytest.mark.parametrize("engine", ["native", FFCV])
def test_the_engines_agree(files: Path, engine: str) -> None:
    with loader(files, engine="torch") as a, loader(files, engine=engine, workers=3) as b:
        for x, y in zip(a, b, strict=True):
            assert x.index.tolist() == y.index.tolist()
            assert x.label.tolist() == y.label.tolist()
            assert torch.equal(x.simple, y.simple)
            assert torch.equal(x.complex, y.complex)
            assert torch.equal(x.visible, y.visible)


def test_an_image_that_comes_again_looks_different(files: Path) -> None:
    with loader(files, 32) as views:
        (batch,) = views
    again = np.flatnonzero(batch.index.numpy() == 1)
    assert len(again) > 3
    boxes = {tuple(batch.boxes[row].reshape(-1).tolist()) for row in again}
    assert len(boxes) == len(again)


def test_resumed_on_another_number_of_ranks_exactly(files: Path) -> None:
    with loader(files, 8) as views:
        views.set_epoch(1)
        iteration = iter(views)
        next(iteration)
        state = views.state_dict()
        expected = [sorted(batch.index.tolist()) for batch in iteration]
    found: list[list[int]] = [[] for _ in expected]
    for rank in range(2):
        with loader(files, 4, rank=rank, world_size=2) as views:
            views.load_state_dict(state)
            for number, batch in enumerate(views):
                found[number] += batch.index.tolist()
    assert [sorted(batch) for batch in found] == expected


def test_other_weights_are_another_mixture(files: Path) -> None:
    with (
        loader(files) as views,
        PairedViews([f"{files / 'small.beton'}:0.4", f"{files / 'set'}:0.6"], 8, settings=SETTINGS) as other,
        pytest.raises(UserError, match="other images"),
    ):
        other.load_state_dict(views.state_dict())


def test_weights_for_all_or_none(files: Path) -> None:
    with pytest.raises(UserError, match="has no weight and others have"):
        open_samples([f"{files / 'small.beton'}:0.5", str(files / "set")])
    assert len(open_samples([str(files / "small.beton"), str(files / "set")])) == 32
    assert open_samples([str(files / "small.beton")]).path == files / "small.beton"


def test_a_folder_of_images_is_refused_at_the_opening_or_works(files: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        for number in range(4):
            made_image(number, 40, 40).save(tmp_path / "raw" / name / f"{number}.png")
    both = [str(files / "set"), str(tmp_path / "raw")]
    with pytest.raises(UserError, match=r"reads \.beton files alone"):
        PairedViews(both, 8, "native", settings=SETTINGS)
    with PairedViews(both, 37, "torch", settings=SETTINGS) as views:
        (batch,) = views
    # the set has no names for its classes, so that its labels cannot be joined
    labels = dict(zip(batch.index.tolist(), batch.label.tolist(), strict=True))
    assert {labels[number] for number in range(29)} == {-1}
    assert [labels[number] for number in range(29, 37)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_what_does_not_decode_is_told_by_its_source(tmp_path: Path) -> None:
    folder = make_parts(tmp_path / "broken", broken=tuple(range(29)))
    small = write_beton(folder / "small.beton", [made_pixels(70 + i, 40, 36) for i in range(3)])
    with (
        PairedViews([str(small), str(folder / "set")], 8, settings=SETTINGS) as views,
        pytest.raises(UserError, match=r"part-[0-9]\.beton with fastpmae-write --check"),
    ):
        list(views)


def test_some_images_alone_are_shown_once_each(files: Path) -> None:
    some = [1, 30, 17, 2, 5]
    with loader(files, 5, indices=some) as views:
        (batch,) = views
    assert sorted(batch.index.tolist()) == sorted(some)


def test_the_source_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tree").mkdir()
    (tmp_path / "with blanks").mkdir()
    for text in ("tree:0.7 treee:0.3", "treee tree", "s3://bucket/set treee"):
        with pytest.raises(UserError, match=f"of the sources in '{text}' treee does not exist"):
            sources_named(text)
    for text in ("with blanks", "with blanks:0.5", "no such thing"):
        assert sources_named(text) == text
    assert sources_named("tree:0.7 s3://bucket/set") == ("tree:0.7", "s3://bucket/set")


def test_a_list_of_images_that_are_open_is_a_sentence(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="of images that are open make a Mixture"):
        open_samples([open_samples(tmp_path)] * 2)  # pyright: ignore[reportArgumentType]
