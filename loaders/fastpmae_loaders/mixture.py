"""Several sources of images as one, mixed by weight."""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fastpmae_loaders.engines.base import Located, Samples, check_whole, digest, identity, largest, shown
from fastpmae_loaders.engines.lookahead import Fetched
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.order import Chosen, FileOrder, Order, PageOrder, Pages, pages_of, shuffled_order
from fastpmae_loaders.printable import printable
from fastpmae_loaders.sources.beton_set import BetonSet
from fastpmae_loaders.sources.places import Column, Largest, Places, by_names
from fastpmae_loaders.sources.weighted import split_weight
from fastpmae_loaders.stores.address import is_address

_WHOLE = 1 << 24
"""Weights are rounded to parts of it, so that every count below is exact."""

OrderOf = Callable[[Samples, int], Order]
"""The order of a source's images in an epoch of its own."""


def sources_named(text: str) -> str | tuple[str, ...]:
    """What one word of a command line names: a source of images, or several in quotes, as in `"a.beton:0.7 b/:0.3"`.

    Raises:
        UserError: where some of several are there and another is not.
    """
    words = () if os.path.lexists(text) else tuple(text.split())
    if len(words) < 2 or os.path.lexists(split_weight(text)[0]):
        return text
    missing = [name for name, _ in map(split_weight, words) if not is_address(name) and not os.path.lexists(name)]
    if missing and len(missing) < len(words):  # a path with blanks in it names nothing by its parts
        raise UserError(f"of the sources in {printable(text)!r} {printable(missing[0])} does not exist")
    return text if missing else words


def read_by(images: "Samples | str | os.PathLike[str] | Sequence[str]") -> list[str | os.PathLike[str]]:
    """The files, folders and addresses that `open_samples` reads of these, without weights."""
    if isinstance(images, str | os.PathLike):
        return [split_weight(images)[0]] if isinstance(images, str) else [images]
    if isinstance(images, Mixture):
        return [path for source in images.sources for path in read_by(source)]
    if hasattr(images, "payload"):
        return [images.path]  # pyright: ignore[reportAttributeAccessIssue] - of images that are open
    return [split_weight(name)[0] for name in images]  # pyright: ignore[reportGeneralTypeIssues]


class Mixture:
    """The images of several sources, numbered through in their order. n is the number of all.

    An epoch shows as many as all sources have, without the duplicates of sets; each source's share in any stretch of it
    is its weight, to within an image for each source. A source goes through its own images in orders of its own, one
    after another, and on where the epoch before ended: a small one is repeated, and of a large one every image comes
    before any comes again. An image that an epoch shows again has other views there. Classes are joined by their names;
    the images of a source without names then have no label.

    Args:
        sources: of images that are open.
        weights: above 0; without them every image is shown as often as any other.

    Raises:
        UserError: where the weights are no positive numbers, one a source.
    """

    def __init__(self, sources: Sequence[Samples], weights: Sequence[float] | None = None) -> None:
        counts = [len(source) for source in sources]
        weights = list(map(shown, sources)) if weights is None else weights
        if len(weights) != len(sources) or not all(0 < weight < math.inf for weight in weights):
            raise UserError(f"a mixture of {len(sources)} takes as many weights, each above 0 and finite: {weights}")
        self.sources = tuple(sources)
        self.weights = tuple(max(1, round(weight / sum(weights) * _WHOLE)) for weight in weights)
        self.path = Path(" + ".join(str(source.path) for source in sources))
        self._first = np.concatenate([[0], np.cumsum(counts)])
        named = [source.class_names for source in sources if source.class_names is not None]
        self.class_names = list(dict.fromkeys(name for names in named for name in names)) if named else None
        self.nbytes = sum(source.nbytes for source in sources)
        self.largest = Largest(*(max(sizes) for sizes in zip(*map(largest, sources), strict=True)))
        self.height, self.width, self.size, self.mode, self.label, self.page_of = (
            Column(len(self), lambda indices, name=name: self._gather(name, indices))
            for name in ("height", "width", "size", "mode", "label", "page_of")
        )
        if all(isinstance(source, Located) for source in sources):
            self.locate = self._locate
        windows = [source.window for source in sources if isinstance(source, Fetched)]
        if windows:
            self.window, self.ahead = min(windows), self._ahead

    def __len__(self) -> int:
        return int(self._first[-1])

    def __repr__(self) -> str:
        return f"Mixture({str(self.path)!r}, {len(self)} images)"

    @property
    def shown(self) -> int:
        """How many images an epoch shows."""
        return sum(map(shown, self.sources))

    @property
    def identity(self) -> str:
        """A text that another mixture does not have."""
        told = [
            f"{identity(source)} {0 if hasattr(source, 'identity') else digest(np.asarray(source.page_of))} {weight}"
            for source, weight in zip(self.sources, self.weights, strict=True)
        ]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    def source_of(self, index: int) -> tuple[Samples, int]:
        """The source of an image, and its number there."""
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self.sources[number], index - int(self._first[number])

    def part_of(self, indices: np.ndarray) -> np.ndarray:
        """Numbers that are the same for images of one file."""
        numbers = np.zeros(len(indices), np.int64)
        for source, here, own in self.by_source(indices):
            if hasattr(source, "part_of"):
                numbers[here] = source.part_of(own)
        return numbers + (np.searchsorted(self._first, indices, side="right") << 40)

    def payload(self, index: int) -> np.ndarray:
        """The stored bytes of one image, uint8."""
        source, own = self.source_of(index)
        return source.payload(own)

    def _ahead(self, indices: np.ndarray) -> int:
        """See `Fetched`; of the sources that lie in a store."""
        found = ((source, own) for source, _, own in self.by_source(indices))
        return sum(source.ahead(own) for source, own in found if isinstance(source, Fetched))

    def check_whole(self, unchanged: bool = False) -> None:
        """See `Beton.check_whole`; of every source."""
        for source in self.sources:
            check_whole(source, unchanged)

    def order(self, epoch: int, order_of: OrderOf) -> "MixedOrder":
        """What an epoch shows, from the orders of the sources."""
        return MixedOrder(self, epoch, order_of)

    def by_source(self, indices: np.ndarray):
        """Each source that some images are of, with their places among them and their numbers there."""
        numbers = np.searchsorted(self._first, indices, side="right") - 1
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            yield self.sources[number], here, indices[here] - self._first[number]

    def _gather(self, name: str, indices: np.ndarray) -> np.ndarray:
        found = np.empty(len(indices), np.int64)
        for source, here, own in self.by_source(indices):
            values = getattr(source, name)[own]
            found[here] = self._joined(source, values) if name == "label" else values
        if name == "page_of":
            found += np.searchsorted(self._first, indices, side="right") << 40
        return found

    def _locate(self, indices: np.ndarray) -> tuple[Places, object]:
        places = Places(*np.empty((len(Places._fields), len(indices)), np.int64))
        held = []
        for source, here, own in self.by_source(indices):
            found, files = source.locate(own)
            held.append(files)
            for column, values in zip(places, found, strict=True):
                column[here] = values
            places.label[here] = self._joined(source, found.label)
        return places, held

    def _joined(self, source: Samples, label: np.ndarray) -> np.ndarray:
        if self.class_names is not None and source.class_names is None:
            return np.full(len(label), -1)
        return by_names(label, source.class_names, self.class_names)


class MixedOrder:
    """An epoch of a mixture: the source of each place is computed, and so is its number among those of its source.

    Its places are keys: an image's number, and so many times the number of all images as this epoch has gone through
    the image's source before.
    """

    def __init__(self, mixture: Mixture, epoch: int, order_of: OrderOf) -> None:
        self._mixture, self._order_of = mixture, order_of
        # of each source, how many of its images were shown before this epoch
        self._begun = [epoch * count for count in self._before(len(self))]
        self._orders: dict[int, tuple[int, Order]] = {}

    def __len__(self) -> int:
        return self._mixture.shown

    def places(self, start: int, stop: int) -> np.ndarray:
        """See PageOrder; of places start ... stop-1 the keys."""
        left, here = np.arange(start, stop), np.arange(stop - start)
        keys = np.empty(len(here), np.int64)
        for source, (part, whole) in enumerate(_shares(self._mixture.weights)):
            before = left * part // whole
            its = (left + 1) * part // whole > before
            if its.any():
                first = int(before[its][0])
                keys[here[its]] = self._keys(source, first, first + int(its.sum()))
            left, here = (left - before)[~its], here[~its]
        return keys

    def _before(self, place: int) -> list[int]:
        """How many of each source's images stand before a place."""
        counts = []
        for part, whole in _shares(self._mixture.weights):
            counts.append(place * part // whole)
            place -= counts[-1]
        return counts

    def _keys(self, source: int, start: int, stop: int) -> np.ndarray:
        """The keys of a source's images by their numbers among those that the epoch shows."""
        samples, begun = self._mixture.sources[source], self._begun[source]
        count, keys = shown(samples), []
        start, stop = begun + start, begun + stop
        while start < stop:
            own_epoch, place = divmod(start, count)
            end = min(count, place + stop - start)
            again = (own_epoch - begun // count) * len(self._mixture) + int(self._mixture._first[source])
            keys.append(self._order(source, own_epoch).places(place, end) + again)
            start += end - place
        return np.concatenate(keys)

    def _order(self, source: int, own_epoch: int) -> Order:
        kept = self._orders.get(source)
        if kept is None or kept[0] != own_epoch:
            kept = own_epoch, self._order_of(self._mixture.sources[source], own_epoch % 2**32)
            self._orders[source] = kept
        return kept[1]


def order_of(
    samples: Samples, indices: np.ndarray | None, seed: int, epoch: int, shuffle: bool, page_order: bool
) -> Order:
    """The order in which an epoch shows images: as they are numbered, shuffled as a whole, or page by page.

    Args:
        indices: these images alone, int64 [m]; of a mixture each once, whatever the weights.
    """
    left_out = getattr(samples, "duplicates", None) if indices is None else None
    if left_out is not None and not (shuffle and page_order):
        indices = np.flatnonzero(np.unpackbits(left_out, count=len(samples), bitorder="little") == 0)
    count = len(samples) if indices is None else len(indices)
    if isinstance(samples, Mixture) and indices is None:
        return samples.order(epoch, lambda source, own: order_of(source, None, seed, own, shuffle, page_order))
    if not shuffle:
        order: Order = FileOrder(count)
    elif not page_order:
        order = shuffled_order(seed, epoch, count)
    elif isinstance(samples, BetonSet) and indices is None:
        order = PageOrder(seed, epoch, Pages(samples.page_starts, left_out=left_out))
    else:
        page_of = samples.page_of
        order = PageOrder(seed, epoch, pages_of(np.asarray(page_of) if indices is None else page_of[indices]))
    return order if indices is None else Chosen(indices, order)


def _shares(weights: Sequence[int]) -> list[tuple[int, int]]:
    """Of each source its share in what those before it leave over, as a fraction."""
    return [(weight, sum(weights[number:])) for number, weight in enumerate(weights)]
