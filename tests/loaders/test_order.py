"""The order that is computed, against the one that was listed: the same places, whichever are asked for."""

from itertools import pairwise

import numpy as np
import pytest

from fastpmae_loaders import UserError, epoch_order
from fastpmae_loaders.order import FileOrder, PageOrder, Pages, _shuffle, deal, pages_of
from fastpmae_loaders.sampling import EPOCH_ORDER, PAGE_ORDER


def shuffled(seed: int, epoch: int, part: int, purpose: int, values: np.ndarray) -> np.ndarray:
    values = values.astype(np.int64)
    _shuffle(seed, epoch, part, purpose, values)
    return values


def listed(seed: int, epoch: int, page_of: np.ndarray, together: int) -> np.ndarray:
    """The order as it was made when it was a list of all samples."""
    pages, place = np.unique(page_of, return_inverse=True)
    order_of_pages = shuffled(seed, epoch, 0, PAGE_ORDER, np.arange(len(pages)))
    rank_of_page = np.empty_like(order_of_pages)
    rank_of_page[order_of_pages] = np.arange(len(pages))
    group = rank_of_page[place] // together
    order = np.argsort(group, kind="stable")
    edges = np.searchsorted(group[order], np.arange(group.max() + 2))
    parts = [
        shuffled(seed, epoch, n, EPOCH_ORDER, order[start:stop]) for n, (start, stop) in enumerate(pairwise(edges))
    ]
    return np.concatenate(parts)


NOISE = np.random.default_rng(0)
PAGES = {
    "in the file's order": np.sort(NOISE.integers(0, 90, 700)),
    "of one page": np.zeros(5, np.int64),
    "a page each": np.arange(100) + 7,
    "in no order": NOISE.integers(0, 90, 700),
    "of uneven size": np.repeat(np.arange(20), NOISE.integers(1, 60, 20)),
}


@pytest.mark.parametrize("case", PAGES)
@pytest.mark.parametrize("together", [4, 32])
def test_it_is_the_listed_order(case: str, together: int) -> None:
    page_of = PAGES[case]
    expected = listed(3, 2, page_of, together)
    assert epoch_order(3, 2, len(page_of), page_of, together).tolist() == expected.tolist()
    order = PageOrder(3, 2, pages_of(page_of), together)
    assert len(order) == len(page_of)
    for _ in range(50):
        start, stop = sorted(NOISE.integers(0, len(page_of) + 1, 2))
        assert order.places(int(start), int(stop)).tolist() == expected[start:stop].tolist()


def test_pages_that_the_samples_fill_one_after_another_need_no_list() -> None:
    pages = pages_of(np.array([4, 4, 4, 9, 10, 10]))
    assert pages.starts.tolist() == [0, 3, 4, 6]
    assert pages.members is None
    assert pages_of(np.array([4, 9, 4])).members is not None


def test_nothing_is_kept_for_a_sample() -> None:
    """10^9 samples on 10^5 pages: an array of them would be 8 GB."""
    order = PageOrder(1, 0, Pages(np.arange(100_001) * 10_000))
    assert len(order) == 10**9
    batch = order.places(5 * 10**8, 5 * 10**8 + 4096)
    assert len(set(batch.tolist())) == 4096
    assert len(set((batch // 10_000).tolist())) <= 32
    held = sum(value.nbytes for value in vars(order).values() if isinstance(value, np.ndarray))
    assert held < 2e6


def test_what_is_left_out_is_never_shown() -> None:
    out = NOISE.random(700) < 0.4
    out[:40] = True
    page_of = PAGES["in the file's order"]
    whole = pages_of(page_of).starts
    pages = Pages(whole, left_out=np.packbits(out, bitorder="little"))
    assert pages.shown_before.tolist() == np.concatenate([[0], np.cumsum(~out)])[whole].tolist()
    order = PageOrder(3, 2, pages, 4)
    assert len(order) == (~out).sum()
    shown = order.places(0, len(order))
    assert sorted(shown.tolist()) == np.flatnonzero(~out).tolist()
    assert order.places(31, 77).tolist() == shown[31:77].tolist()


def test_in_the_files_order() -> None:
    assert FileOrder(10).places(3, 6).tolist() == [3, 4, 5]


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_a_batch_is_dealt_out_whole_and_page_by_page(ranks: int) -> None:
    page = NOISE.integers(0, 40, 101)
    shares = [deal(page, rank, ranks) for rank in range(ranks)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(101))
    assert {len(share) for share in shares} <= {101 // ranks, -(-101 // ranks)}
    # a page more than its share for each border between ranks, at most
    assert sum(len(set(page[share].tolist())) for share in shares) <= len(set(page.tolist())) + ranks - 1


def test_keys_are_checked() -> None:
    with pytest.raises(UserError, match="seed"):
        PageOrder(-1, 0, Pages(np.array([0, 1])))
