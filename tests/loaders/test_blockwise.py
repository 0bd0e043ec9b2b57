"""Masks of rectangles, against a plain form of the published rule that shares no code and no random numbers."""

import math
import random
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fastpmae_loaders import UserError
from fastpmae_loaders.blockwise import DINOv2Masks, DINOv3Masks, IBOTMasks, draw_blocks, draw_patches

# Fixed seeds: each test passes always or never. Were they drawn anew, a sound form would fail one of the statistical
# tests here once in a million runs.
ks_2samp: Any = stats.ks_2samp  # scipy hides what it returns
FALSE_ALARM = 1e-6

Cells = set[tuple[int, int]]


def plain_blocks(
    grid: tuple[int, int],
    wanted: float,
    smallest: float,
    largest: float = math.inf,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Cells:
    """The rule in words: up to ten tries for each rectangle, until enough is masked or all ten failed."""

    def rectangle(room: float, taken: Cells) -> Cells:
        for _ in range(10):
            area = random.uniform(smallest, min(room, largest))
            ratio = math.exp(random.uniform(math.log(aspect[0]), math.log(aspect[1])))
            high, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if high < grid[0] and wide < grid[1]:
                y, x = random.randint(0, grid[0] - high), random.randint(0, grid[1] - wide)
                new = set(product(range(y, y + high), range(x, x + wide))) - taken
                if new and len(new) <= min(room, largest):
                    return new
        return set()

    masked: Cells = set()
    while len(masked) < wanted:
        new = rectangle(wanted - len(masked), masked)
        if not new:
            break
        masked |= new
    return masked


def as_array(cells: Cells, grid: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(grid, bool)
    for cell in cells:
        mask[cell] = True
    return mask


def theirs(count: int, draw: Callable[[], Cells], grid: tuple[int, int]) -> np.ndarray:
    random.seed(1)
    return np.array([as_array(draw(), grid) for _ in range(count)])


def assert_alike(ours: np.ndarray, others: np.ndarray) -> None:
    """How many patches, where, in what shapes: the same laws."""

    def measures(masks: np.ndarray) -> list[np.ndarray]:
        count = masks.sum((1, 2))
        down, across = (masks[:, 1:] & masks[:, :-1]).sum((1, 2)), (masks[:, :, 1:] & masks[:, :, :-1]).sum((1, 2))
        high, wide = masks.any(2).sum(1), masks.any(1).sum(1)
        centre = (masks * np.arange(masks.shape[1])[:, None]).sum((1, 2)) / np.maximum(count, 1)
        return [count, down, across, high, wide, high * wide - count, centre]

    for a, b in zip(measures(ours), measures(others), strict=True):
        assert ks_2samp(a, b, method="asymp").pvalue > FALSE_ALARM
    # sizes and aspects of single rectangles: masks that fill the box around them; of many rectangles, hardly any does
    rectangles = []
    for masks in (ours, others):
        count, _, _, high, wide, gaps, _ = measures(masks)
        alone = (gaps == 0) & (count > 0)
        rectangles.append((high[alone], wide[alone], high[alone] / wide[alone]))
    assert abs(len(rectangles[0][0]) - len(rectangles[1][0])) <= 5 * math.sqrt(len(rectangles[1][0])) + 5
    for a, b in zip(*rectangles, strict=True):
        assert min(len(a), len(b)) < 20 or ks_2samp(a, b, method="asymp").pvalue > FALSE_ALARM
    # every patch as often masked
    hits = np.array([ours.sum(0).ravel(), others.sum(0).ravel()])
    share = hits.sum(0) / (len(ours) + len(others))
    error = np.sqrt(share * (1 - share) * (1 / len(ours) + 1 / len(others)))
    away = np.abs(hits[0] / len(ours) - hits[1] / len(others)) / np.maximum(error, 1e-12)
    assert away.max() < stats.norm.isf(FALSE_ALARM / hits.shape[1] / 2)


@pytest.mark.parametrize(
    ("grid", "wanted", "smallest", "largest", "aspect"),
    [
        ((14, 14), 75, 16, math.inf, (0.3, 1 / 0.3)),  # BEiT's own numbers
        ((14, 14), 58.8, 16, math.inf, (0.3, 1 / 0.3)),  # iBOT's at a ratio of 0.3
        ((16, 16), 128, 4, 128, (0.3, 1 / 0.3)),  # DINOv2's at its highest ratio
        ((16, 16), 200, 4, 40, (0.3, 1 / 0.3)),  # many rectangles
        ((9, 14), 30, 9, math.inf, (0.5, 1.5)),  # a grid that is no square
        ((14, 14), 40, 36, math.inf, (0.3, 1 / 0.3)),  # mostly one rectangle
    ],
)
def test_rectangles_are_distributed_as_published(grid, wanted, smallest, largest, aspect):
    count = 2000
    ours = draw_blocks(3, 1, np.arange(count), 0, grid, np.full(count, wanted), smallest, largest, aspect)
    assert_alike(ours, theirs(count, lambda: plain_blocks(grid, wanted, smallest, largest, aspect), grid))
    assert ours.sum((1, 2)).max() <= wanted


def test_ten_tries_are_made_for_each_rectangle():
    """Rectangles of one patch on nine: with k masked, ten tries in a row all miss with probability (k / 9)^10."""
    count = 100_000
    masks = draw_blocks(0, 0, np.arange(count), 0, (3, 3), np.full(count, 9), 1, 1, (1.0, 1.0))
    full = math.prod(1 - (k / 9) ** 10 for k in range(1, 9))
    assert stats.binomtest(int((masks.sum((1, 2)) == 9).sum()), count, full).pvalue > FALSE_ALARM


@pytest.mark.parametrize(
    ("ratio", "spread"), [(0.1, 0.0), (0.3, 0.0), (0.3, 0.2), ([0.0, 0.3], [0.0, 0.2]), ([0.1, 0.3, 0.5], 0.05)]
)
def test_ibots_ratios(ratio, spread):
    """As its help says: one of the ratios for each mask, drawn within its variance."""
    count, grid = 2000, (14, 14)
    ratios = ratio if isinstance(ratio, list) else [ratio]
    spreads = spread if isinstance(spread, list) else [spread] * len(ratios)

    def plain():
        choice = random.randrange(len(ratios))
        return plain_blocks(
            grid, random.uniform(ratios[choice] - spreads[choice], ratios[choice] + spreads[choice]) * 196, 16
        )

    ours = IBOTMasks(pred_ratio=ratio, pred_ratio_var=spread).draw(5, 0, np.arange(count), 1, grid)
    assert ours.dtype == bool
    assert_alike(ours, theirs(count, plain, grid))


def test_rand_masks_are_exact_and_even():
    grid, count = (14, 14), 4000
    masks = IBOTMasks(pred_ratio=0.3, pred_shape="rand").draw(5, 0, np.arange(count), 0, grid)
    assert (masks.sum((1, 2)) == int(0.3 * 196)).all()
    hits = masks.sum(0).ravel()
    # the counts of one mask are bound to their sum, so the scatter is a little smaller than of free ones
    assert stats.chisquare(hits).pvalue > FALSE_ALARM
    together = (masks[:, 3, 4] & masks[:, 3, 5]).mean()
    expected = 58 / 196 * 57 / 195
    assert abs(together - expected) < 5 * math.sqrt(expected * (1 - expected) / count)
    for wanted in (0, 1, 195, 196):
        assert (draw_patches(0, 0, np.arange(5), 0, grid, np.full(5, wanted)).sum((1, 2)) == wanted).all()
    varied = IBOTMasks(pred_ratio=0.3, pred_ratio_var=0.2, pred_shape="rand").draw(5, 0, np.arange(count), 0, grid)
    drawn = varied.sum((1, 2))
    assert stats.kstest(drawn + np.random.default_rng(0).random(count), stats.uniform(19.6, 78.4).cdf).pvalue > 1e-4


def test_nothing_is_masked_before_the_start_epoch():
    masks = IBOTMasks(pred_start_epoch=2)
    index = np.arange(50)
    assert not masks.draw(0, 1, index, 0, (14, 14)).any()
    assert masks.draw(0, 2, index, 0, (14, 14)).any((1, 2)).all()


@pytest.mark.parametrize("shape", ["block", "rand"])
def test_a_mask_depends_on_seed_epoch_sample_and_view_alone(shape):
    masks, grid = IBOTMasks(pred_ratio=0.4, pred_ratio_var=0.1, pred_shape=shape), (14, 14)
    index = np.array([9, 4, 700_000_000_000 % 2**31, 0, 9])
    together = masks.draw(7, 3, index, 0, grid)
    for row, sample in enumerate(index):
        assert (masks.draw(7, 3, np.array([sample]), 0, grid)[0] == together[row]).all()
    for other in (masks.draw(8, 3, index, 0, grid), masks.draw(7, 4, index, 0, grid), masks.draw(7, 3, index, 1, grid)):
        assert (other != together).any((1, 2)).all()


def plain_dinov2(crops: int, grid: tuple[int, int], masks: DINOv2Masks) -> tuple[np.ndarray, int]:
    """DINOv2's batch in words: equal parts of the range, one crop in each, the others empty, all shuffled."""
    patches = grid[0] * grid[1]
    count = int(crops * masks.mask_sample_probability)
    edges = torch.linspace(*masks.mask_ratio_min_max, count + 1)
    drawn, bound = [], 0
    for low, high in pairwise(edges):
        wanted = int(patches * random.uniform(float(low), float(high)))
        drawn.append(plain_blocks(grid, wanted, masks.min_num_patches, grid[0] // 2 * grid[1]))
        bound += int(patches * high)
    drawn += [set()] * (crops - count)
    random.shuffle(drawn)
    return np.array([as_array(cells, grid) for cells in drawn]), bound


@pytest.mark.slow
@pytest.mark.parametrize(("share", "ratios"), [(0.5, (0.1, 0.5)), (0.3, (0.2, 0.7)), (1.0, (0.5, 0.5))])
def test_dinov2s_batches_are_distributed_as_published(share, ratios):
    grid, batch, rounds = (14, 14), 12, 120
    masks = DINOv2Masks(mask_ratio_min_max=ratios, mask_sample_probability=share)
    random.seed(2)
    ours, others = [], []
    for number in range(rounds):
        drawn = masks.draw(1, 0, np.arange(number * batch, (number + 1) * batch), 2, grid)
        plain, bound = plain_dinov2(2 * batch, grid, masks)
        assert drawn.masks.shape == (2 * batch, 196)
        assert drawn.upperbound == bound >= drawn.masks.sum()
        masked = drawn.masks.sum(1)
        assert (masked > 0).sum() == int(2 * batch * share)
        ours.append(drawn.masks.reshape(-1, *grid))
        others.append(plain)
    ours, others = np.concatenate(ours), np.concatenate(others)
    assert_alike(ours[ours.any((1, 2))], others[others.any((1, 2))])
    # the masked crops are as often among the first views as among the second, and in every place
    places = ours.any((1, 2)).reshape(rounds, -1).sum(0)
    limit = stats.norm.isf(FALSE_ALARM) * math.sqrt(rounds * share * (1 - share))
    assert np.abs(places - rounds * int(2 * batch * share) / (2 * batch)).max() <= limit
    # sorted shares of a batch lie each within its own part of the range
    whole = masks.draw(1, 0, np.arange(64), 2, grid).masks.sum(1)
    shares = np.sort(whole[whole > 0]) / 196
    assert (shares <= np.linspace(ratios[0], ratios[1], len(shares) + 1)[1:] + 1e-6).all()


def test_dinov2s_masks_follow_their_samples_through_a_shuffled_batch():
    masks, grid, index = DINOv2Masks(), (16, 16), np.arange(40)
    one = masks.draw(0, 5, index, 2, grid).masks.reshape(2, 40, -1)
    order = np.random.default_rng(0).permutation(40)
    two = masks.draw(0, 5, index[order], 2, grid).masks.reshape(2, 40, -1)
    assert (one[:, order] == two).all()
    assert (one != masks.draw(0, 6, index, 2, grid).masks.reshape(2, 40, -1)).any()


def plain_dinov3(crops: int, grid: tuple[int, int], masks: DINOv3Masks) -> np.ndarray:
    """DINOv3's batch in words: as DINOv2's, but each to its upper bound, with single patches where needed."""
    patches, count = grid[0] * grid[1], int(crops * masks.mask_sample_probability)
    everywhere, drawn = set(product(range(grid[0]), range(grid[1]))), []
    for high in torch.linspace(*masks.mask_ratio_min_max, count + 1)[1:]:
        wanted = int(patches * high)
        cells = plain_blocks(grid, wanted, masks.min_num_patches, grid[0] // 2 * grid[1])
        cells |= set(random.sample(sorted(everywhere - cells), wanted - len(cells)))
        turn = (random.randint(0, grid[0] - 1), random.randint(0, grid[1] - 1))
        drawn.append(np.roll(as_array(cells, grid), turn if masks.mask_random_circular_shift else (0, 0), (0, 1)))
    return np.array(drawn)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [False, True])
def test_dinov3s_batches_are_distributed_as_published(shift):
    grid, batch = (14, 14), 12
    masks = DINOv3Masks(mask_random_circular_shift=shift)
    random.seed(3)
    ours, others = [], []
    for number in range(120):
        drawn = masks.draw(1, 0, np.arange(number * batch, (number + 1) * batch), 2, grid)
        others.append(plain_dinov3(2 * batch, grid, masks))
        masked = np.sort(drawn.masks.sum(1))
        assert masked.tolist() == [0] * batch + sorted(others[-1].sum((1, 2)).tolist())
        assert drawn.upperbound == masked.sum()
        ours.append(drawn.masks.reshape(-1, *grid))
    ours, others = np.concatenate(ours), np.concatenate(others)
    assert_alike(ours[ours.any((1, 2))], others)


def test_no_crop_or_no_sample():
    assert DINOv2Masks().draw(0, 0, np.zeros(0, np.int64), 2, (14, 14)).masks.shape == (0, 196)
    one = DINOv2Masks(mask_sample_probability=0.0).draw(0, 0, np.arange(3), 2, (14, 14))
    assert one.upperbound == 0
    assert not one.masks.any()
    assert IBOTMasks().draw(0, 0, np.zeros(0, np.int64), 0, (14, 14)).shape == (0, 14, 14)


@pytest.mark.parametrize(
    "make",
    [
        lambda: IBOTMasks(pred_ratio=1.2),
        lambda: IBOTMasks(pred_ratio=0.1, pred_ratio_var=0.2),
        lambda: IBOTMasks(pred_ratio=[]),
        lambda: IBOTMasks(pred_ratio=[0.1, 0.3], pred_ratio_var=[0.0, 0.1, 0.2]),
        lambda: IBOTMasks(pred_shape="blocks"),  # pyright: ignore[reportArgumentType]
        lambda: IBOTMasks(pred_aspect_ratio=(2.0, 1.0)),
        lambda: DINOv2Masks(mask_ratio_min_max=(0.5, 0.1)),
        lambda: DINOv2Masks(mask_sample_probability=1.5),
        lambda: DINOv2Masks(min_num_patches=0),
        lambda: DINOv2Masks(min_aspect=0.0),
        lambda: IBOTMasks().draw(-1, 0, np.arange(3), 0, (14, 14)),
    ],
)
@pytest.mark.untyped
def test_wrong_numbers_are_refused_in_a_sentence(make):
    with pytest.raises(UserError, match=r"masks: |seed"):
        make()
