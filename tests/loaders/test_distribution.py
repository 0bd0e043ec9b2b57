"""The views are distributed as torchvision's and DINO's: a statistical test with a stated false-alarm rate.

All seeds are fixed, so every test here passes always or never. Were they drawn anew, sound code would fail this file
once in a million runs: a test that makes `n` comparisons demands p > TOTAL / TESTS / n of each (Bonferroni; the
Kolmogorov-Smirnov test is conservative on the whole numbers that crops are). What such a test can see is tested
too: plausible mistakes must fail it by far.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import ColorJitter, GaussianBlur, RandomResizedCrop

from fastpmae_loaders import View, dino_global, dino_local, draw_samples, mae_view
from fastpmae_loaders.sampling import BLURRED, FIRST_RECIPE, GRAY, JITTER, SIGMA, SOLARISED

TOTAL = 1e-6
COUNT = 4000
SHAPES = [(375, 500), (500, 375), (64, 64), (1200, 1600), (500, 120), (33, 400), (11, 7)]
SCALES = {"mae": (0.2, 1.0), "dino": (0.14, 1.0), "local": (0.05, 0.4)}
# tests of this file that may raise a false alarm
TESTS = len(SHAPES) * len(SCALES) + 5

# scipy hides what they return
chi2_contingency: Any = stats.chi2_contingency
ks_2samp: Any = stats.ks_2samp


def all_above(values: list[float]) -> None:
    assert min(values) > TOTAL / TESTS / len(values), f"smallest of {len(values)} p-values: {min(values):.2e}"


def draws(views: list[View], count: int = COUNT, height: int = 375, width: int = 500, seed: int = 11):
    index = np.arange(count)
    return draw_samples(seed, 2, index, np.full(count, height), np.full(count, width), views)


def torchvision_crops(height: int, width: int, scale: tuple[float, float], count: int = COUNT) -> np.ndarray:
    torch.manual_seed(5)
    image = torch.empty(3, height, width)
    get = RandomResizedCrop.get_params
    return np.array([get(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)])


def same_shares(a: np.ndarray, b: np.ndarray) -> float:
    """p-value that two samples of categories have the same law; rare categories are put together."""
    names, place = np.unique(np.concatenate([a, b]), return_inverse=True)
    counts = np.stack([np.bincount(part, minlength=len(names)) for part in (place[: len(a)], place[len(a) :])])
    rare = counts.sum(0) < 20
    table = np.column_stack([counts[:, ~rare], counts[:, rare].sum(1)]) if rare.any() else counts
    table = table[:, table.sum(0) > 0]
    return 1.0 if table.shape[1] == 1 else float(chi2_contingency(table).pvalue)


def thirds(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.searchsorted(edges, values)


def crop_comparisons(ours: np.ndarray, theirs: np.ndarray, height: int, width: int) -> list[float]:
    """p-values of area, aspect, position, the edges that are touched, and of all of these together."""

    def measures(boxes: np.ndarray) -> dict[str, np.ndarray]:
        top, left, h, w = boxes.T.astype(float)
        down, across = height - h, width - w
        return {
            "area": h * w, "aspect": w / h, "height": h, "width": w, "top": top, "left": left,
            "middle": top + h / 2, "centre": left + w / 2,
            # where in the room that it has; crops without any all count as in the middle
            "fall": np.where(down > 0, top / np.maximum(down, 1), 0.5),
            "shift": np.where(across > 0, left / np.maximum(across, 1), 0.5),
        }  # fmt: skip

    def touching(boxes: np.ndarray) -> np.ndarray:
        top, left, h, w = boxes.T
        return (top == 0) + 2 * (left == 0) + 4 * (top + h == height) + 8 * (left + w == width)

    a, b = measures(ours), measures(theirs)
    found = [float(ks_2samp(a[name], b[name], method="asymp").pvalue) for name in a]
    found.append(same_shares(touching(ours), touching(theirs)))
    found += [same_shares(touching(ours) & edge, touching(theirs) & edge) for edge in (1, 2, 4, 8)]
    found.append(same_shares(touching(ours) > 0, touching(theirs) > 0))
    together = []
    for m in (a, b):
        parts = [thirds(m[name], np.quantile(b[name], [1 / 3, 2 / 3])) for name in ("area", "aspect", "fall", "shift")]
        together.append(parts[0] + 3 * parts[1] + 9 * parts[2] + 27 * parts[3])
    found.append(same_shares(*together))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_crops(height: int, width: int, scale: str) -> None:
    theirs = torchvision_crops(height, width, SCALES[scale])
    views = [mae_view(scale=SCALES[scale]), dino_global(scale=SCALES[scale])]
    boxes = draws(views, height=height, width=width).boxes
    all_above([p for view in (0, 1) for p in crop_comparisons(boxes[:, view], theirs, height, width)])


def wrong_crops(mistake: str, height: int, width: int) -> np.ndarray:
    """Crops with a mistake that other loaders make, or that would be easily made."""
    rng = np.random.default_rng(3)
    boxes = np.empty((2 * COUNT, 4), np.int64)
    for row in boxes:
        while True:
            area = height * width * rng.uniform(0.2, 1.0)
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            if mistake == "aspect not on a log scale":
                aspect = rng.uniform(3 / 4, 4 / 3)
            if mistake == "side, not area":
                area = height * width * rng.uniform(math.sqrt(0.2), 1.0) ** 2
            if mistake == "aspect of the crop in the image's own":
                aspect *= width / height
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if mistake == "too large crops cut down, not drawn anew":
                w, h = min(w, width), min(h, height)
            if 0 < w <= width and 0 < h <= height:
                break
        top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        if mistake == "moved back inside":  # the crop's centre anywhere
            top = min(max(int(rng.integers(0, height)) - h // 2, 0), height - h)
            left = min(max(int(rng.integers(0, width)) - w // 2, 0), width - w)
        if mistake == "the last place never taken":
            top, left = (int(rng.integers(0, max(room, 1))) for room in (height - h, width - w))
        row[:] = top, left, h, w
    return boxes


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake",
    [
        "aspect not on a log scale", "side, not area", "aspect of the crop in the image's own",
        "too large crops cut down, not drawn anew", "moved back inside", "the last place never taken",
    ],
)  # fmt: skip
def test_mistakes_would_be_seen(mistake: str) -> None:
    # one place less is seen where there are few
    height, width = (28, 37) if "last place" in mistake else (375, 500)
    found = crop_comparisons(
        wrong_crops(mistake, height, width), torchvision_crops(height, width, (0.2, 1)), height, width
    )
    assert min(found) < TOTAL / TESTS / len(found) / 2
    right = crop_comparisons(
        wrong_crops("none", height, width), torchvision_crops(height, width, (0.2, 1)), height, width
    )
    assert min(right) > 1e-4


def test_few_crops_touch_an_edge() -> None:
    """The share that a careless loader gets wrong most: torchvision's is about one in fifty on large images."""
    shares = []
    for boxes in (draws([mae_view()], height=1200, width=1600).boxes[:, 0], torchvision_crops(1200, 1600, (0.2, 1.0))):
        top, left, h, w = boxes.T
        shares.append(float(((top == 0) | (left == 0) | (top + h == 1200) | (left + w == 1600)).mean()))
    assert max(shares) < 0.04
    assert abs(shares[0] - shares[1]) < 0.01


def test_jitter_factors_and_their_order() -> None:
    torch.manual_seed(6)
    limits = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
    theirs = [ColorJitter.get_params(*map(list, limits)) for _ in range(COUNT)]
    factors = np.array([row[1:] for row in theirs], float)
    orders = np.array([np.polyval(row[0].numpy(), 4) for row in theirs])
    # of DINO's global and local crops alike, and of the third as well as the first of a list of views
    drawn = draws([dino_global(), dino_local(), dino_global("t2")], 2 * COUNT)
    found = []
    for view in range(3):
        for column, (low, high) in enumerate(limits):
            ours = drawn.factors[:, view, column]
            found.append(float(ks_2samp(ours, factors[:, column], method="asymp").pvalue))
            found.append(float(stats.kstest(ours, stats.uniform(low, high - low).cdf).pvalue))
        order = drawn.choices[:, view, :4].astype(int)
        assert (np.sort(order, 1) == np.arange(4)).all()
        codes = np.array([np.polyval(row, 4) for row in order])
        _, times = np.unique(codes, return_counts=True)
        assert len(times) == math.factorial(4)
        found += [float(stats.chisquare(times).pvalue), same_shares(codes, orders)]
    all_above(found)


def test_blur_widths() -> None:
    torch.manual_seed(7)
    theirs = np.array([GaussianBlur.get_params(0.1, 2.0) for _ in range(COUNT)])
    drawn = draws([dino_global("t1"), dino_local()], 2 * COUNT)
    found = []
    for view in (0, 1):
        # also of those alone that are blurred: the coin and the width come from one draw
        for some in (slice(None), drawn.choices[:, view, BLURRED] == 1):
            ours = drawn.factors[some, view, SIGMA]
            found.append(float(ks_2samp(ours, theirs, method="asymp").pvalue))
            found.append(float(stats.kstest(ours, stats.uniform(0.1, 1.9).cdf).pvalue))
    all_above(found)


RATES = {
    "mae": (mae_view(), {JITTER: 0.0, GRAY: 0.0, BLURRED: 0.0, SOLARISED: 0.0}),
    "t1": (dino_global("t1"), {JITTER: 0.8, GRAY: 0.2, BLURRED: 1.0, SOLARISED: 0.0, FIRST_RECIPE: 1.0}),
    "t2": (dino_global("t2"), {JITTER: 0.8, GRAY: 0.2, BLURRED: 0.1, SOLARISED: 0.2, FIRST_RECIPE: 0.0}),
    "coin": (dino_global(), {JITTER: 0.8, GRAY: 0.2, BLURRED: 0.55, SOLARISED: 0.1, FIRST_RECIPE: 0.5}),
    # RandomApply(p=1 - p) of DINOv2's and DINOv3's GaussianBlur(p), p 1 and 0.1
    "t1 of the code": (dino_global("t1", blur="code"), {JITTER: 0.8, GRAY: 0.2, BLURRED: 0.0, SOLARISED: 0.0}),
    "t2 of the code": (dino_global("t2", blur="code"), {JITTER: 0.8, GRAY: 0.2, BLURRED: 0.9, SOLARISED: 0.2}),
    "local": (dino_local(), {JITTER: 0.8, GRAY: 0.2, BLURRED: 0.5, SOLARISED: 0.0}),
}


def test_rates() -> None:
    """Flips, jitter, grayscale, blur, solarise: DINO's probabilities (binomial); never where 0, always where 1."""
    count = 20_000
    drawn = draws([view for view, _ in RATES.values()], count)
    found = []
    for number, (view, rates) in enumerate(RATES.values()):
        found.append(float(stats.binomtest(int(drawn.flips[:, number].sum()), count, view.flip).pvalue))
        for column, rate in rates.items():
            hits = int(drawn.choices[:, number, column].sum())
            found.append(float(stats.binomtest(hits, count, rate).pvalue))
            if rate in (0.0, 1.0):
                assert hits == rate * count
    # no sample is blurred by the first recipe and solarised by the second
    coin = drawn.choices[:, list(RATES).index("coin")]
    assert coin[coin[:, FIRST_RECIPE] == 1, BLURRED].all()
    assert not coin[coin[:, FIRST_RECIPE] == 1, SOLARISED].any()
    all_above(found)


def drawn_numbers(seed: int, epoch: int, count: int) -> dict[tuple[str, str], np.ndarray]:
    """Everything drawn for `count` samples of 400 x 400, by (what it has to do with, name), in units of its spread."""
    index, size = np.arange(count), np.full(count, 400)
    drawn = draw_samples(seed, epoch, index, size, size, [mae_view(), dino_global(), dino_local()], patches=16)
    found = {("mask", "first"): drawn.order[:, 0], ("mask", "eighth"): drawn.order[:, 7]}
    for view in range(3):
        found[f"flip {view}", ""] = drawn.flips[:, view]
        top, left, height, width = drawn.boxes[:, view].T
        found[f"crop {view}", "height"], found[f"crop {view}", "width"] = height, width
        # where in its room, in the middle of its step, so that the room's size does not matter
        found[f"top {view}", ""], found[f"left {view}", ""] = (top + 0.5) / (401 - height), (left + 0.5) / (401 - width)
        if view:
            found |= {(f"factor {column} {view}", ""): drawn.factors[:, view, column] for column in range(5)}
            found |= {(f"order {view}", str(column)): drawn.choices[:, view, column] for column in (0, 3)}
            coins = (JITTER, GRAY, BLURRED) if view == 2 else (JITTER, GRAY, FIRST_RECIPE)
            found |= {(f"coin {column} {view}", ""): drawn.choices[:, view, column] for column in coins}
    return {name: (values - values.mean()) / values.std() for name, values in found.items()}


@pytest.mark.slow
def test_what_is_drawn_is_independent() -> None:
    """No correlation between any two numbers of a sample, between its views, its neighbours, its epochs, two seeds."""
    count = 20_000
    here = drawn_numbers(11, 2, count)
    earlier, later = ({name: values[part] for name, values in here.items()} for part in (slice(-1), slice(1, None)))
    compared = [
        (here, here),
        (earlier, later),
        (here, drawn_numbers(11, 3, count)),
        (here, drawn_numbers(12, 2, count)),
    ]
    found = []
    for a, b in compared:
        for one, other in itertools.product(a, b):
            # one crop's sides share an area, places of one permutation exclude each other
            if a is not b or (one < other and one[0] != other[0]):
                strength = abs(float(np.mean(a[one] * b[other]))) * math.sqrt(len(a[one]))
                found.append(float(2 * stats.norm.sf(strength)))
    assert len(found) > 4000
    all_above(found)


def test_each_test_here_counts() -> None:
    """The number of tests that share the false-alarm rate is the number there are."""
    drawing: list[Callable] = [
        test_jitter_factors_and_their_order, test_blur_widths, test_rates, test_what_is_drawn_is_independent,
        test_few_crops_touch_an_edge,
    ]  # fmt: skip
    assert len(SHAPES) * len(SCALES) + len(drawing) == TESTS
