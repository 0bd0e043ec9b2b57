"""The order of an epoch, computed for the places that are asked for: what is kept is a few bytes a page, none a sample.

Page by page, the pages are shuffled, and the samples only within each group of `PAGES_TOGETHER` pages that follow each
other in that order. So a group is made from the numbers of its pages whenever a batch reaches into it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.jit.compiled import kernel
from fastpmae_loaders.jit.philox import uniform_pair
from fastpmae_loaders.sampling import EPOCH_ORDER, PAGE_ORDER, check_key
from fastpmae_loaders.sources.duplicates import are_duplicates, duplicates_before

PAGES_TOGETHER = 32
_STRETCH = 1 << 15
"""Groups of pages whose samples are counted at a time."""


@kernel
def _shuffle(seed, epoch, part, purpose, values):
    for i in range(values.shape[0] - 1, 0, -1):
        u, _ = uniform_pair(seed, epoch, part, purpose, i)
        j = np.int64(u * (i + 1))
        values[i], values[j] = values[j], values[i]


@dataclass(frozen=True)
class Pages:
    """Which samples lie together, of n samples on P pages.

    `starts` int64 [P + 1]: page p holds the samples starts[p] ... starts[p + 1] - 1, or, where `members` int64 [n] is
    given, those that stand there in it, by ascending number. Without `members`, `left_out` uint8 [ceil(n / 8)] may have
    a bit for each sample, the first in the lowest bit of the first: no order shows those whose bit is 1.
    """

    starts: np.ndarray
    members: np.ndarray | None = None
    left_out: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def shown_before(self) -> np.ndarray:
        """How many samples of the pages before each page, and of all, are shown: int64 [P + 1]."""
        return self.starts if self.left_out is None else self.starts - duplicates_before(self.left_out, self.starts)

    def together(self, pages: np.ndarray) -> np.ndarray:
        """The samples of some pages that are shown, by ascending number: int64 [m]."""
        pages, starts = np.sort(pages), self.starts
        count = starts[pages + 1] - starts[pages]
        ends = np.cumsum(count)
        places = np.arange(ends[-1]) + np.repeat(starts[pages] - (ends - count), count)
        if self.left_out is not None:
            places = places[~are_duplicates(self.left_out, places)]
        return places if self.members is None else np.sort(self.members[places])


def pages_of(page_of: np.ndarray) -> Pages:
    """The pages of samples 0 ... n-1, of which `page_of` [n] says where each lies; pages without a sample count not."""
    page_of = np.asarray(page_of)
    if np.all(page_of[1:] >= page_of[:-1]):
        edges = np.flatnonzero(page_of[1:] != page_of[:-1]) + 1
        ends = [len(page_of)] if len(page_of) else []
        return Pages(np.concatenate([[0], edges, ends]).astype(np.int64))
    pages, page = np.unique(page_of, return_inverse=True)
    members = np.argsort(page, kind="stable").astype(np.int64)
    return Pages(np.searchsorted(page[members], np.arange(len(pages) + 1)).astype(np.int64), members)


class PageOrder:
    """An epoch's order page by page: a permutation of the pages' samples, keyed by (seed, epoch)."""

    def __init__(self, seed: int, epoch: int, pages: Pages, together: int = PAGES_TOGETHER) -> None:
        check_key(seed, epoch)
        self._key, self._pages, self._together = (seed, epoch), pages, together
        self._shuffled = _shuffled(seed, epoch, PAGE_ORDER, len(pages))
        groups = [np.zeros(1, np.int64)]
        for start in range(0, len(pages), _STRETCH * together):
            some = self._shuffled[start : start + _STRETCH * together]
            count = pages.shown_before[some + 1] - pages.shown_before[some]
            groups.append(np.add.reduceat(count, np.arange(0, len(some), together)))
        self._edges = np.cumsum(np.concatenate(groups))
        self._last: tuple[int, np.ndarray] = (-1, self._edges)

    def __len__(self) -> int:
        return int(self._edges[-1])

    def places(self, start: int, stop: int) -> np.ndarray:
        """The samples at places start ... stop-1 of the order: int64 [stop - start]."""
        if stop <= start:
            return np.empty(0, np.int64)
        first, last = np.searchsorted(self._edges, (start, stop - 1), side="right") - 1
        parts = [self._group(int(group)) for group in range(first, last + 1)]
        begin = start - int(self._edges[first])
        return np.concatenate(parts)[begin : begin + stop - start]

    def _group(self, group: int) -> np.ndarray:
        # batches come one after another, and a group is longer than most
        number, samples = self._last
        if number != group:
            pages = self._shuffled[group * self._together : (group + 1) * self._together].astype(np.int64)
            samples = self._pages.together(pages)
            _shuffle(*self._key, group, EPOCH_ORDER, samples)
            self._last = group, samples
        return samples


class ListedOrder:
    """An order that is kept as the list that it is: int32 or int64 [n]."""

    def __init__(self, listed: np.ndarray) -> None:
        self._listed = listed

    def __len__(self) -> int:
        return len(self._listed)

    def places(self, start: int, stop: int) -> np.ndarray:
        """See PageOrder."""
        return self._listed[start:stop].astype(np.int64)


class FileOrder:
    """Samples 0 ... n-1 as they are numbered."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def places(self, start: int, stop: int) -> np.ndarray:
        """See PageOrder."""
        return np.arange(start, stop, dtype=np.int64)


def shuffled_order(seed: int, epoch: int, count: int) -> ListedOrder:
    """Samples 0 ... count-1 shuffled as a whole, wherever they lie: a permutation keyed by (seed, epoch).

    It is kept as a list, of 4 bytes a sample up to 2^31 samples, else 8. It is a Fisher-Yates shuffle: what stands at a
    place depends on every exchange before, so it cannot be computed for one place alone. A keyed permutation that can,
    such as a Feistel network, is another order, and runs that began with this one would not resume with their bits.
    Data for which a list is too large go page by page, where nothing is kept for a sample.
    """
    check_key(seed, epoch)
    return ListedOrder(_shuffled(seed, epoch, EPOCH_ORDER, count))


def _shuffled(seed: int, epoch: int, purpose: int, count: int) -> np.ndarray:
    """The numbers 0 ... count-1 shuffled: int32 where they fit, else int64 [count]."""
    values = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
    _shuffle(seed, epoch, 0, purpose, values)
    return values


@runtime_checkable
class Order(Protocol):
    """What an epoch shows, place by place."""

    def __len__(self) -> int: ...

    def places(self, start: int, stop: int) -> np.ndarray:
        """The samples at places start ... stop-1: int64 [stop - start]."""
        ...


class Chosen:
    """The order of some samples, `indices` int64 [n], by the order of their places in that list."""

    def __init__(self, indices: np.ndarray, order: Order) -> None:
        self._indices, self._order = indices, order

    def __len__(self) -> int:
        return len(self._order)

    def places(self, start: int, stop: int) -> np.ndarray:
        """See PageOrder."""
        return self._indices[self._order.places(start, stop)]


def epoch_order(
    seed: int, epoch: int, n: int, page_of: np.ndarray | None = None, pages_together: int = PAGES_TOGETHER
) -> np.ndarray:
    """The order in which an epoch shows samples 0 ... n-1: int64 [n], a permutation keyed by (seed, epoch).

    With `page_of` [n], the page of the file each sample lies in, the pages are shuffled, and the samples only
    within each group of `pages_together` consecutive pages of that order: a disk then reads long runs, and
    a file larger than memory is read once an epoch rather than a page for every sample.
    """
    if page_of is None:
        return shuffled_order(seed, epoch, n).places(0, n)
    if len(page_of) != n:
        raise UserError(f"page_of names the pages of {len(page_of)} samples, not of {n}")
    return PageOrder(seed, epoch, pages_of(page_of), pages_together).places(0, n)


def deal(page: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Which places of a global batch, whose samples lie on the pages `page` [G], a rank shows: int64 [about G / ranks].

    The batch is sorted by page before it is shared out, so that few ranks read the same page; every rank's share is
    as large as it would be by places.
    """
    first, last = (len(page) * part // world_size for part in (rank, rank + 1))
    return np.argsort(page, kind="stable")[first:last]
