"""I-JEPA's and CAPI's masks against their rules, written down anew with sets of patches and fed with the same draws."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from numba import njit
from scipy import stats

from fastpmae_loaders import UserError
from fastpmae_loaders.jit.philox import uniform_pair
from fastpmae_loaders.multiblock import CAPI, PLACES, SIZES, CAPIMasks, IJEPAMasks

GRIDS = [(16, 16), (14, 14), (9, 20)]
SAMPLES = np.array([5, 0, 77, 10**7, 3, 4, 1, 2])


@njit
def pair(seed, epoch, index, purpose, block):
    return uniform_pair(seed, epoch, index, purpose, block)


def draws(index: int, purpose: int, batch_key: tuple[int, int] = (7, 2)) -> Iterator[float]:
    return itertools.chain.from_iterable(pair(*batch_key, index, purpose, block) for block in itertools.count())


# I-JEPA.


def block_size(drawn: float, scale: tuple[float, float], aspect: tuple[float, float], grid: tuple[int, int]):
    """A share and a shape from one number; a side that fills the grid is made one less."""
    count = int(grid[0] * grid[1] * (scale[0] + drawn * (scale[1] - scale[0])))
    shape = aspect[0] + drawn * (aspect[1] - aspect[0])
    sides = [round(math.sqrt(count * shape)), round(math.sqrt(count / shape))]
    return [side if side < whole else whole - 1 for side, whole in zip(sides, grid, strict=True)]


def block(size: list[int], grid: tuple[int, int], numbers: Iterator[float]) -> set[int]:
    """The patches of a block that lies anywhere but at the last row or column."""
    top, left = (int(next(numbers) * (whole - side)) for side, whole in zip(size, grid, strict=True))
    return {y * grid[1] + x for y in range(top, top + size[0]) for x in range(left, left + size[1])}


def reference(masks: IJEPAMasks, batch: int, grid: tuple[int, int]):
    first, second = pair(7, 2, batch, SIZES, 0)
    small = block_size(first, masks.pred_mask_scale, masks.aspect_ratio, grid)
    large = block_size(second, masks.enc_mask_scale, (1, 1), grid)
    contexts, targets = [], []
    for sample in SAMPLES.tolist():
        mine = [block(small, grid, draws(sample, PLACES + number)) for number in range(masks.num_pred_masks)]
        targets.append(mine)
        contexts.append([])
        for number in range(masks.num_enc_masks):
            numbers = draws(sample, PLACES + masks.num_pred_masks + number)
            for attempt in itertools.count():
                left = 0 if masks.allow_overlap else max(0, len(mine) - attempt // 20)
                seen = block(large, grid, numbers).difference(*mine[:left])
                if len(seen) > masks.min_keep:
                    contexts[-1].append(seen)
                    break
    return tuple(
        [
            [sorted(image[number])[: min(len(one) for image in images for one in image)] for image in images]
            for number in range(len(images[0]))
        ]
        for images in (contexts, targets)
    )


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "masks",
    [
        IJEPAMasks(),
        IJEPAMasks(allow_overlap=True, min_keep=0),
        # targets so large that hardly a context is left: targets are then let in, one after the other
        IJEPAMasks((0.3, 0.6), (0.3, 0.5), (0.5, 2.0), 2, 3, 25),
    ],
)
def test_multiblock_masks_follow_the_rule(masks, grid):
    for batch in range(12):
        drawn = masks.draw(7, 2, batch, SAMPLES, grid)
        assert [len(part) for part in drawn] == [masks.num_enc_masks, masks.num_pred_masks]
        for ours, theirs in zip(drawn, reference(masks, batch, grid), strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert one.dtype == np.int64
                assert one.tolist() == other


def test_multiblock_masks_of_a_sample_do_not_depend_on_its_batch_mates():
    masks, grid = IJEPAMasks(), (16, 16)
    whole = masks.draw(7, 2, 3, SAMPLES, grid)
    alone = masks.draw(7, 2, 3, SAMPLES[2:3], grid)
    for part, one in zip(whole.targets, alone.targets, strict=True):
        assert part[2].tolist() == one[0].tolist()
    # a context only in how much of it is left to all
    assert whole.contexts[0][2].tolist() == alone.contexts[0][0][: whole.contexts[0].shape[1]].tolist()


@pytest.mark.slow
def test_multiblock_sizes_are_spread_as_the_number_that_they_come_from():
    masks, grid = IJEPAMasks(), (1024, 1024)  # so fine that sizes are all but continuous
    sizes = np.array([masks.sizes(1, 0, batch, grid) for batch in range(4000)])
    area, aspect = sizes[:, 0].prod(1) / 1024**2, sizes[:, 0, 0] / sizes[:, 0, 1]
    assert stats.kstest(area, stats.uniform(0.15, 0.05).cdf).pvalue > 1e-4
    assert stats.kstest(aspect, stats.uniform(0.75, 0.75).cdf).pvalue > 1e-4
    # one number for both
    assert np.corrcoef(area, aspect)[0, 1] > 0.98
    assert (sizes[:, 1, 0] == sizes[:, 1, 1]).all()
    assert abs(np.corrcoef(area, sizes[:, 1, 0])[0, 1]) < 0.06


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"enc_mask_scale": (0.5, 1.2)}, "enc_mask_scale"),
        ({"pred_mask_scale": (0.3, 0.2)}, "pred_mask_scale"),
        ({"aspect_ratio": (0.0, 1.0)}, "aspect_ratio"),
        ({"num_pred_masks": 0}, "num_pred_masks"),
        ({"min_keep": -1}, "min_keep"),
        ({"enc_mask_scale": 0.5}, "enc_mask_scale is 0.5; expected 2 values"),
        ({"num_pred_masks": "4"}, "num_pred_masks is '4'; expected a whole number"),
    ],
)
@pytest.mark.untyped
def test_impossible_multiblock_masks_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        IJEPAMasks(**wrong)


@pytest.mark.parametrize("grid", [(4, 4), (1, 30), (2, 2)])
def test_a_grid_too_small_for_multiblock_masks_ends_in_a_sentence(grid):
    """Their code would look for a block of more than ten patches for ever."""
    with pytest.raises(UserError, match="min_keep = 10"):
        IJEPAMasks().draw(0, 0, 0, SAMPLES, grid)


# CAPI.


def inverse_block(masks: CAPIMasks, sample: int, grid: tuple[int, int]) -> set[int]:
    """The patches that are seen."""
    height, width = grid
    count = height * width - int(height * width * masks.mask_ratio)
    numbers = draws(sample, CAPI)
    low = max(math.log(masks.min_aspect), math.log(count / width**2))
    high = min(math.log(masks.max_aspect or 1 / masks.min_aspect), math.log(height**2 / (count + 1e-5)))
    aspect = math.exp(low + next(numbers) * (high - low))
    rows, columns = math.ceil(math.sqrt(count * aspect)), math.ceil(math.sqrt(count / aspect))
    top, left = int(next(numbers) * (height - rows + 1)), int(next(numbers) * (width - columns + 1))
    patches = [(y, x) for y in range(top, top + rows) for x in range(left, left + columns)][:count]
    down, across = (int(next(numbers) * side) for side in grid) if masks.roll else (0, 0)
    return {(y + down) % height * width + (x + across) % width for y, x in patches}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "masks", [CAPIMasks(), CAPIMasks(0.3, 1.0), CAPIMasks(0.8, roll=False), CAPIMasks(0.65, 0.2, True, 0.2, 4.0)]
)
def test_inverse_blocks_follow_the_rule(masks, grid):
    index = np.arange(200)
    drawn = masks.draw(7, 2, index, grid)
    hidden = int(grid[0] * grid[1] * masks.mask_ratio)
    assert (drawn.masks.sum((1, 2)) == hidden).all()
    for sample in index.tolist():
        seen = inverse_block(masks, sample, grid)
        assert set(np.flatnonzero(~drawn.masks[sample])) == seen
        assert drawn.visible[sample].tolist() == sorted(seen)
        predicted = drawn.predicted[sample].tolist()
        assert len(predicted) == len(set(predicted)) == int(hidden * masks.prediction_subsampling)
        assert not seen.intersection(predicted)


def test_rolled_blocks_and_predictions_are_spread_evenly():
    drawn = CAPIMasks().draw(3, 0, np.arange(8000), (8, 8))
    patches = np.bincount(drawn.visible.ravel(), minlength=64)
    # a block's patches go together, so the counts vary by more than independent ones would
    assert abs(patches / patches.mean() - 1).max() < 0.06
    hidden = drawn.masks.reshape(len(drawn.masks), -1).sum(0)
    predicted = np.bincount(drawn.predicted.ravel(), minlength=64)
    assert stats.chisquare(predicted, predicted.sum() * hidden / hidden.sum()).pvalue > 1e-4


@pytest.mark.parametrize("ratio", [0.0, 0.004, 0.99, 1.0])
def test_inverse_blocks_at_their_ends(ratio):
    for grid in GRIDS:
        drawn = CAPIMasks(ratio, 0.5).draw(0, 0, SAMPLES, grid)
        assert (drawn.masks.sum((1, 2)) == int(grid[0] * grid[1] * ratio)).all()


@pytest.mark.parametrize(
    "wrong", [{"mask_ratio": 1.1}, {"prediction_subsampling": -0.1}, {"min_aspect": 0.0}, {"roll": "no"}]
)
@pytest.mark.untyped
def test_impossible_inverse_blocks_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        CAPIMasks(**wrong)


@pytest.mark.parametrize("grid", [(4, 16), (16, 4), (8, 24), (1, 30)])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.65])
def test_an_inverse_block_in_a_wide_grid_does_not_lie_over_itself(grid, ratio):
    """Its shape is then not within the aspects that are asked for: no such one holds the patches."""
    drawn = CAPIMasks(ratio, 0.5).draw(0, 0, np.arange(40), grid)
    flat = drawn.masks.reshape(40, -1)
    assert (flat.sum(1) == int(flat.shape[1] * ratio)).all()
    assert not np.take_along_axis(flat, drawn.visible, 1).any()
    assert np.take_along_axis(flat, drawn.predicted, 1).all()
