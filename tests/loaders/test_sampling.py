import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from fastpmae_loaders import UserError, ViewSettings, draw_samples, epoch_order, uniforms
from fastpmae_loaders.jit.elementary import exponential, round_half_even
from fastpmae_loaders.jit.philox import philox
from fastpmae_loaders.sampling import BLURRED, GRAY, JITTER, SOLARISED

# Every statistical test here runs on fixed seeds, so it passes always or never; were the seeds drawn anew, a
# sound sampler would fail one of them once in a million runs.
ks_2samp: Any = stats.ks_2samp  # scipy hides what it returns
FALSE_ALARM = 1e-6


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    assert tuple(int(w) for w in philox(*map(np.uint64, (*counter, *key)))) == expected


def draws(count=4000, height=375, width=500, seed=3, epoch=1, **changes):
    index = np.arange(count)
    return draw_samples(seed, epoch, index, np.full(count, height), np.full(count, width), ViewSettings(**changes))


def torchvision_crops(count, height, width, scale):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    return np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)])


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 64), (500, 120), (33, 400), (11, 7)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.14, 1.0), (0.7, 0.9)])
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    count = 4000
    theirs = torchvision_crops(count, height, width, scale)
    drawn = draws(count, height, width, simple_scale=scale, complex_scale=scale).boxes
    for view in (0, 1):
        ours = drawn[:, view]
        assert (ours[:, :2] >= 0).all()
        assert (ours[:, 0] + ours[:, 2] <= height).all()
        assert (ours[:, 1] + ours[:, 3] <= width).all()

        def measures(boxes):
            top, left, h, w = boxes.T
            return h * w, w / h, top, left, top * (left + 1), h

        for a, b in zip(measures(ours), measures(theirs), strict=True):
            assert ks_2samp(a, b, method="asymp").pvalue > FALSE_ALARM


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 1), (1, 300), (300, 400)])
def test_fallback_is_torchvisions(height, width):
    """A share of the whole image that fits no tall or wide crop: ten tries fail, the centre is cut."""
    scale = (1.0, 1.0) if (height, width) != (300, 400) else (0.9999, 1.0)
    theirs = torchvision_crops(50, height, width, scale)
    ours = draws(50, height, width, simple_scale=scale).boxes[:, 0]
    if len(np.unique(theirs, axis=0)) == 1:
        assert (ours == theirs).all()
    else:
        assert {tuple(box) for box in ours} & {tuple(box) for box in theirs}


def test_factors_and_coins_follow_their_laws():
    count = 20_000
    drawn = draws(count)
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), (0.1, 2.0)]
    for column, (low, high) in enumerate(ranges):
        values = drawn.factors[:, 1, column]
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > FALSE_ALARM
    coins = {JITTER: 0.8, GRAY: 0.2, BLURRED: 0.55, SOLARISED: 0.1}
    for column, share in coins.items():
        hits = int(drawn.choices[:, 1, column].sum())
        assert stats.binomtest(hits, count, share).pvalue > FALSE_ALARM
    for view in (0, 1):
        assert stats.binomtest(int(drawn.flips[:, view].sum()), count, 0.5).pvalue > FALSE_ALARM
    orders, times = np.unique(drawn.choices[:, 1, :4], axis=0, return_counts=True)
    assert len(orders) == 24
    assert stats.chisquare(times).pvalue > FALSE_ALARM
    # blur and solarise come out of one recipe or the other, never solarise with the first
    first = drawn.choices[:, 1, 8] == 1
    assert drawn.choices[first, 1, BLURRED].all()
    assert not drawn.choices[first, 1, SOLARISED].any()
    assert (
        stats.binomtest(int(drawn.choices[~first, 1, SOLARISED].sum()), int((~first).sum()), 0.2).pvalue > FALSE_ALARM
    )


@pytest.mark.parametrize(("recipe", "blur", "solarise"), [("t1", 1.0, 0.0), ("t2", 0.1, 0.2)])
def test_recipes(recipe, blur, solarise):
    drawn = draws(complex_recipe=recipe)
    for column, share in ((BLURRED, blur), (SOLARISED, solarise)):
        hits = int(drawn.choices[:, 1, column].sum())
        assert stats.binomtest(hits, 4000, share).pvalue > FALSE_ALARM


def test_masks_are_uniform():
    """Each patch is visible equally often, and each pair of first two patches appears about equally often."""
    drawn = draws(20_000, image_size=64)
    visible = drawn.order[:, :4]
    times = np.bincount(visible.ravel(), minlength=16)
    assert stats.chisquare(times).pvalue > FALSE_ALARM
    pairs = np.bincount(visible[:, 0] * 16 + visible[:, 1], minlength=256).reshape(16, 16)
    assert (np.diag(pairs) == 0).all()
    assert stats.chisquare(pairs[~np.eye(16, dtype=bool)]).pvalue > FALSE_ALARM


@settings(max_examples=60, deadline=None)
@given(
    side=st.integers(2, 20),
    patch=st.sampled_from([1, 4, 16]),
    ratio=st.floats(0.01, 0.99),
    folds=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 2**32 - 1),
)
def test_visible_and_folds_partition_the_patches(side, patch, ratio, folds, seed, epoch):
    patches = side * side
    kept = max(int(patches * (1 - ratio) + 1e-6), 1)
    if folds >= patches or folds > patches - kept:
        with pytest.raises(UserError, match="folds"):
            ViewSettings(image_size=side * patch, patch_size=patch, mask_ratio=ratio, folds=folds)
        return
    view = ViewSettings(image_size=side * patch, patch_size=patch, mask_ratio=ratio, folds=folds)
    sizes = view.fold_sizes
    assert view.visible >= 1
    assert sum(sizes) == patches - view.visible
    assert len(sizes) == folds
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)
    assert view.visible == kept
    order = draw_samples(seed, epoch, np.array([5]), np.array([30]), np.array([40]), view).order[0]
    assert sorted(order) == list(range(patches))


def test_the_papers_numbers():
    view = ViewSettings()
    assert (view.patches, view.visible, view.fold_sizes) == (196, 49, (49, 49, 49))


def test_one_purpose_shifts_no_other():
    base = draws(200)
    other = draws(
        200, jitter=(0.1, 0.0, 0.9, 0.0), jitter_probability=0.1, simple_scale=(0.5, 0.6), flip=0.9, complex_recipe="t2"
    )
    assert (base.order == other.order).all()
    assert (base.boxes[:, 1] == other.boxes[:, 1]).all()
    assert (base.boxes[:, 0] != other.boxes[:, 0]).any()
    assert (base.choices[:, :, :4] == other.choices[:, :, :4]).all()
    assert (base.factors[:, :, 4] == other.factors[:, :, 4]).all()


def test_keys_are_apart():
    """Seeds (their high half too), epochs and samples all give other masks."""
    view = ViewSettings()
    at = (np.array([7]), np.array([300]), np.array([300]), view)
    seen = {
        tuple(draw_samples(seed, epoch, index, *at[1:]).order[0])
        for seed in (0, 1, 1 << 32, 1 << 62)
        for epoch in (0, 1, 2**32 - 1)
        for index in (np.array([0]), np.array([7]), np.array([2**32 - 1]))
    }
    assert len(seen) == 4 * 3 * 3


def test_a_plan_does_not_depend_on_its_neighbours():
    index = np.array([9, 2, 31])
    sizes = np.array([300, 20, 77]), np.array([200, 400, 77])
    together = draw_samples(1, 2, index, *sizes, ViewSettings())
    for i in range(3):
        alone = draw_samples(1, 2, index[i : i + 1], sizes[0][i : i + 1], sizes[1][i : i + 1], ViewSettings())
        for a, b in zip(together, alone, strict=True):
            assert (a[i] == b[0]).all()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 400), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000))
def test_epoch_order_is_a_permutation(n, seed, epoch):
    assert sorted(epoch_order(seed, epoch, n)) == list(range(n))
    pages = np.arange(n) * 7 % 13
    assert sorted(epoch_order(seed, epoch, n, pages, pages_together=3)) == list(range(n))


def test_epoch_order_is_uniform_and_new_each_epoch():
    first = np.array([epoch_order(5, epoch, 10) for epoch in range(5000)])
    for place in (0, 4, 9):
        assert stats.chisquare(np.bincount(first[:, place], minlength=10)).pvalue > FALSE_ALARM
    assert (epoch_order(5, 0, 100) != epoch_order(5, 1, 100)).any()
    assert (epoch_order(5, 0, 100) != epoch_order(6, 0, 100)).any()


def test_pages_stay_together():
    page_of = np.repeat(np.arange(40), 25)
    order = epoch_order(1, 0, 1000, page_of, pages_together=4)
    groups = page_of[order].reshape(10, 100)
    pages = [tuple(np.unique(group)) for group in groups]
    assert all(len(group) == 4 for group in pages)
    assert len({page for group in pages for page in group}) == 40
    assert pages != sorted(pages)
    assert (np.diff(page_of[order[:100]]) != 0).sum() > 40  # within a group the pages are mixed
    assert (order != epoch_order(1, 1, 1000, page_of, pages_together=4)).any()
    with pytest.raises(UserError, match="page_of"):
        epoch_order(0, 0, 3, page_of)


def test_uniforms():
    drawn = uniforms(4, 2, np.arange(3000), 1, 7)
    assert drawn.dtype == np.float32
    assert drawn.shape == (3000, 7)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > FALSE_ALARM
    assert (uniforms(4, 2, np.array([17, 5]), 1, 7) == drawn[[17, 5]]).all()
    # more numbers leave the first ones alone; another purpose, epoch or seed has other numbers
    assert (uniforms(4, 2, np.array([17]), 1, 3) == drawn[17, :3]).all()
    for other in ((4, 2, 2), (4, 3, 1), (5, 2, 1)):
        assert (uniforms(other[0], other[1], np.array([17]), other[2], 7) != drawn[17]).all()


@pytest.mark.parametrize(("seed", "epoch"), [(-1, 0), (2**63, 0), (0, -1), (0, 2**32)])
def test_keys_out_of_range_are_refused(seed, epoch):
    with pytest.raises(UserError, match=r"seed|epoch"):
        epoch_order(seed, epoch, 3)


@settings(deadline=None)
@given(x=st.floats(-600, 100))
def test_exponential(x):
    assert math.isclose(exponential(x), math.exp(x), rel_tol=2e-15)


@settings(deadline=None)
@given(x=st.one_of(st.floats(0, 1e6), st.integers(0, 10**6).map(lambda n: n + 0.5)))
def test_rounding_is_pythons(x):
    assert round_half_even(x) == round(x)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 225},
        {"mask_ratio": 1.0},
        {"folds": 0},
        {"folds": 196},
        {"simple_scale": (0.5, 0.2)},
        {"complex_scale": (0.0, 1.0)},
        {"complex_recipe": "t3"},
        {"flip": 1.5},
        {"sigma": (0.0, 2.0)},
        {"jitter": (0.4, 0.4, 0.2, 0.6)},
        {"ratio": (0.0, 1.0)},
        {"solarise_threshold": 256},
    ],
)
@pytest.mark.untyped
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        ViewSettings(**wrong)
