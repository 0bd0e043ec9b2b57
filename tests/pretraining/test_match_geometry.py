"""Matches against geometry: rectangles by fractions and by painting, figures by counting, one patch at a time."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from fastpmae import Config, pretrain
from fastpmae.pretraining.match_geometry import match_geometry, overlaps, patch_rectangles
from fastpmae_loaders import Batch, PairedViews, ViewSettings
from tests.tiny import made_batch, tiny_config

ROWS = 4


def rectangle(box: list[int], flip: bool, patch: int) -> tuple[Fraction, ...]:
    """Top, left, bottom, right of a patch in source pixels, in the words of the definition."""
    top, left, height, width = box
    down, across = divmod(patch, ROWS)
    if flip:
        across = ROWS - 1 - across
    return (
        top + Fraction(down * height, ROWS),
        left + Fraction(across * width, ROWS),
        top + Fraction((down + 1) * height, ROWS),
        left + Fraction((across + 1) * width, ROWS),
    )


def shared(one: tuple[Fraction, ...], other: tuple[Fraction, ...]) -> bool:
    """Whether two rectangles share an area."""
    down = min(one[2], other[2]) - max(one[0], other[0])
    across = min(one[3], other[3]) - max(one[1], other[1])
    return down > 0 and across > 0


def batch_with(boxes: list[list[list[int]]], flips: list[list[bool]], seed: int = 0) -> Batch:
    batch = made_batch(seed, len(boxes))
    return replace(batch, boxes=torch.tensor(boxes, dtype=torch.int32), flips=torch.tensor(flips))


def random_batch(seed: int) -> Batch:
    """Crops that mostly overlap, some in odd places, some not at all, with and without flips."""
    generator = np.random.default_rng(seed)
    boxes = np.stack(
        [
            np.concatenate([generator.integers(0, 30, (6, 2)), generator.integers(1, 40, (6, 2))], axis=1)
            for _ in range(2)
        ],
        axis=1,
    )
    return batch_with(boxes.tolist(), generator.integers(0, 2, (6, 2)).astype(bool).tolist(), seed)


@pytest.mark.parametrize("scope", ["image", "fold"])
@pytest.mark.parametrize("view", [0, 1])
def test_figures_are_those_counted_one_pair_at_a_time(scope: str, view: int):
    config = tiny_config(match_scope=scope, labelling_view=("simple", "complex")[view])
    for seed in range(4):
        batch = random_batch(seed)
        match = torch.randint(0, 12, (6, 12), generator=torch.Generator().manual_seed(seed))
        fold = [0] * 4 + [1] * 4 + [2] * 4
        reachable = right = same = 0
        chance = Fraction(0)
        for image in range(6):
            ids, boxes, flips = batch.folds[image].tolist(), batch.boxes[image].tolist(), batch.flips[image].tolist()
            for place, patch in enumerate(ids):
                own = rectangle(boxes[0], flips[0], patch)
                hits = [shared(own, rectangle(boxes[view], flips[view], other)) for other in ids]
                could = [hit for other, hit in enumerate(hits) if scope == "image" or fold[other] == fold[place]]
                if any(could):
                    reachable += 1
                    same += hits[place]
                    right += hits[int(match[image, place])]
                    chance += Fraction(sum(could), len(could))
        figures = match_geometry(batch, match, config)
        assert reachable > 0
        assert figures["match_reachable"] == pytest.approx(reachable / 72)
        assert figures["match_overlap"] == pytest.approx(right / reachable)
        assert figures["match_chance"] == pytest.approx(float(chance / reachable))
        assert figures["match_same_place"] == pytest.approx(same / reachable)


def test_so_many_pairs_are_looked_at_and_one_image_at_least(monkeypatch: pytest.MonkeyPatch):
    """12 masked patches an image: 144 pairs. The crops of the first two images lie apart, those of the others agree."""
    apart, together = [[0, 0, 8, 8], [20, 20, 8, 8]], [[0, 0, 8, 8], [0, 0, 8, 8]]
    batch = batch_with([apart] * 2 + [together] * 4, [[False, False]] * 6)
    match = torch.arange(12).expand(6, 12)
    for most, reachable in ((6 * 144, 4 / 6), (4 * 144, 2 / 4), (3 * 144 - 1, 0), (143, 0)):
        monkeypatch.setattr("fastpmae.pretraining.match_geometry.MOST_PAIRS", most)
        assert match_geometry(batch, match, tiny_config())["match_reachable"] == pytest.approx(reachable)


def test_rectangles_are_what_the_loader_cuts_out(small_beton: Path):
    """A picture whose colours tell its places: each patch of each view shows the colours of its own rectangle."""
    settings = ViewSettings(image_size=64, patch_size=16)
    with PairedViews(small_beton, 8, settings=settings, shuffle=False) as loader:
        batch = next(iter(loader))
        images = [loader.samples.decode(int(index)) for index in batch.index]  # pyright: ignore
    ids = torch.arange(16).expand(8, 16)
    places = patch_rectangles(batch.boxes[:, 0], batch.flips[:, 0], ids, ROWS)
    closest = 0
    for row, image in enumerate(images):
        view = batch.simple[row].float()
        shown = view.view(3, 4, 16, 4, 16).mean(dim=(2, 4)).flatten(1).T.numpy()
        cut = []
        for top, left, bottom, right in (places[row].numpy() / ROWS).round().astype(int):
            cut.append(image[top : max(bottom, top + 1), left : max(right, left + 1)].mean(axis=(0, 1)))
        distance = np.abs(shown[:, None] - np.stack(cut)[None]).sum(axis=2)
        closest += int((distance.argmin(axis=1) == np.arange(16)).sum())
    assert closest > 0.85 * 8 * 16  # mirrored or shifted places reach less than half


def test_edges_that_touch_are_no_overlap_and_a_sliver_is():
    one = torch.tensor([[[0, 0, 4, 4]]])
    others = torch.tensor([[[4, 0, 8, 4], [0, 4, 4, 8], [3, 3, 9, 9], [-5, -5, 1, 1], [1, 1, 2, 2], [5, 5, 6, 6]]])
    assert overlaps(one, others).tolist() == [[[False, False, True, True, True, False]]]


def test_the_same_crop_matched_with_itself_is_always_right_and_a_crop_apart_is_never_reachable():
    same = batch_with([[[3, 5, 17, 23], [3, 5, 17, 23]]], [[True, True]])
    own = torch.arange(12).expand(1, 12)
    figures = match_geometry(same, own, tiny_config())
    shares = {"match_overlap": 1.0, "match_chance": pytest.approx(1 / 12), "match_same_place": 1.0}
    assert figures == {"match_reachable": 1.0} | shares
    apart = batch_with([[[0, 0, 10, 10], [20, 20, 10, 10]]], [[False, False]])
    assert match_geometry(apart, own, tiny_config()) == {"match_reachable": 0.0}


def test_random_matches_are_as_good_as_chance():
    batch = random_batch(1)
    config = tiny_config()
    generator = torch.Generator().manual_seed(0)
    hits = [match_geometry(batch, torch.randint(0, 12, (6, 12), generator=generator), config) for _ in range(400)]
    assert np.mean([figures["match_overlap"] for figures in hits]) == pytest.approx(hits[0]["match_chance"], abs=0.02)


@pytest.mark.slow
def test_every_row_of_a_run_tells_and_a_run_without_matches_does_not(tiny: Config, tmp_path: Path):
    rows = (pretrain(tiny.using(steps=2)) / "metrics.jsonl").read_text().splitlines()
    for row in map(json.loads, rows):
        assert 0 < row["match_reachable"] <= 1
        assert 0 < row["match_chance"] < 1
        assert 0 <= row["match_overlap"] <= 1
    alone = pretrain(tiny.using(steps=1, teachers="reconstruction", lambda_c=0.0, lambda_p=0.0, out=tmp_path / "other"))
    assert "match_overlap" not in json.loads((alone / "metrics.jsonl").read_text())
