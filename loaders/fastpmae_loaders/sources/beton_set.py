"""A set of .beton files: opened by its index alone, each part when one of its images is first asked for."""

import hashlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from fastpmae_loaders.errors import BetonError, UserError
from fastpmae_loaders.printable import printable
from fastpmae_loaders.sources.beton import PIXEL_LIMIT, Beton
from fastpmae_loaders.sources.duplicates import DUPLICATES, count_duplicates, read_duplicates
from fastpmae_loaders.sources.places import Column, Largest, Places, by_names
from fastpmae_loaders.sources.set_index import INDEX, SetIndex, Shard, read_index
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.values import local_path

MOST_OPEN = 128
"""Parts that are kept open, of all sets of a process together: each takes one file descriptor, in a store two, of the
1,024 that many systems give a process."""
_used: OrderedDict[tuple[weakref.ref["BetonSet"], int], None] = OrderedDict()
"""The parts that are open, those used last at the end."""
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # or a child might find it taken for ever
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)

_MANY = 10_000_000
"""Images, above which a set's index is not believed unseen."""


class BetonSet:
    """The images of a set's parts, numbered through. n is the number of images; everything is read-only.

    Nothing is kept for an image: `height`, `width`, `size`, `mode` and `label` are Columns of n, which open the parts
    that they are asked about; `page_of` is one too, and opens none. `page_starts` int64 [P + 1] are the first images of
    the set's pages and n. `index`, `class_names`, `nbytes` (of all parts) and `identity`, a text that another set does
    not have, come from the index. The `MOST_OPEN` parts that were used last, of all sets, stay open.

    Args:
        index: of the set.
        path: what the set is called: its folder, or its address in a store.
        open_part: opens the file of a part; by default it lies in the folder `path`.
        duplicates: a bit for each image, 1 where an epoch leaves it out (see `read_duplicates`).

    Whoever asks for an image of a part that is missing, damaged or not what the index says gets a BetonError that
    names it.
    """

    def __init__(
        self,
        index: SetIndex,
        path: Path | Address,
        open_part: Callable[[Shard], Beton] | None = None,
        duplicates: np.ndarray | None = None,
    ) -> None:
        self.index, self.path, self.duplicates = index, path, duplicates
        self._open_part = open_part or partial(_beside, path)
        shards = index.shards
        self._first = np.concatenate([[0], np.cumsum([shard.images for shard in shards])])
        self.nbytes = sum(shard.bytes for shard in shards)
        self.class_names = None if index.classes is None else list(index.classes)
        height, width = max(shard.height for shard in shards), max(shard.width for shard in shards)
        # an image lies within one page
        stored = max(min(shard.page_size, shard.bytes) for shard in shards)
        self.largest = Largest(height, width, min(height * width, PIXEL_LIMIT), stored)
        count = len(self)
        self.height, self.width, self.size, self.mode, self.label = (
            Column(count, lambda indices, name=name: getattr(self.describe(indices), name))
            for name in ("height", "width", "size", "mode", "label")
        )
        self.page_of = Column(count, lambda indices: np.searchsorted(self.page_starts, indices, side="right") - 1)
        self._open: dict[int, _Part] = {}

    def __len__(self) -> int:
        return int(self._first[-1])

    def __repr__(self) -> str:
        return f"BetonSet({str(self.path)!r}, {len(self)} images in {len(self.index.shards)} parts)"

    def __reduce__(self):
        return BetonSet, (self.index, self.path, self._open_part, self.duplicates)

    @property
    def shown(self) -> int:
        """How many of the images an epoch shows."""
        return len(self) - (0 if self.duplicates is None else count_duplicates(self.duplicates))

    @cached_property
    def page_starts(self) -> np.ndarray:
        """int64 [P + 1]; of a part whose pages the index does not tell, pages of as many images as its bytes fill."""
        shards = self.index.shards
        starts, end = np.zeros(sum(map(_pages, shards)) + 1, np.int64), 0
        for shard in shards:
            begin, end = end, end + _pages(shard)
            starts[begin + 1 : end + 1] = starts[begin] + _ends_of_pages(shard)
        return starts

    @cached_property
    def identity(self) -> str:
        """Of what the parts hold and an epoch shows, whatever they are called and wherever they lie."""
        total = hashlib.sha256(repr(self.index.classes).encode("utf-8", "backslashreplace"))
        for shard in self.index.shards:
            total.update(f"{shard.images} {shard.digest}\n".encode())
        if self.duplicates is not None:
            total.update(self.duplicates.data)
        return total.hexdigest()

    def place_of(self, index: int) -> tuple[str, int]:
        """The name of the part that an image lies in, and its number there."""
        number = int(self.part_of(np.array([index]))[0])
        return self.index.shards[number].name, index - int(self._first[number])

    def part_of(self, indices: np.ndarray) -> np.ndarray:
        """The numbers of the parts that some images lie in."""
        return np.searchsorted(self._first, indices, side="right") - 1

    def part(self, number: int) -> Beton:
        """A part, opened and found to be what the index says. BetonError names it where it is not."""
        with _lock:
            kept = self._open.setdefault(number, _Part())
            used: tuple[weakref.ref[BetonSet], int] = (weakref.ref(self), number)
            _used[used] = None
            _used.move_to_end(used)
            gone = _unused()
        del gone  # closed without the lock
        # others may be opened meanwhile
        with kept.lock:
            if kept.beton is None:
                kept.beton = self._checked(self.index.shards[number])
            return kept.beton

    def payload(self, index: int) -> np.ndarray:
        """The stored bytes of one image, uint8, read-only. BetonError where they cannot be read."""
        number = int(self.part_of(np.array([index]))[0])
        return self.part(number).payload(index - int(self._first[number]))

    def describe(self, indices: np.ndarray) -> Places:
        """Where some images lie and what they are."""
        return self._places(indices, hold=False)[0]

    def locate(self, indices: np.ndarray) -> tuple[Places, object]:
        """The same, and what keeps their files open, and the images in them, meanwhile."""
        return self._places(indices, hold=True)

    def _places(self, indices: np.ndarray, hold: bool) -> tuple[Places, list[object]]:
        numbers = self.part_of(indices)
        places = Places(*np.empty((len(Places._fields), len(indices)), np.int64))
        held = []
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            beton = self.part(int(number))
            own = indices[here] - self._first[number]
            found, keeper = beton.locate(own) if hold else (beton.describe(own), None)
            held.append((beton, keeper))
            for column, values in zip(places, found, strict=True):
                column[here] = values
            places.label[here] = by_names(found.label, beton.class_names, self.class_names)
        return places, held

    def check_whole(self, unchanged: bool = False) -> None:
        """See `Beton.check_whole`; of the parts that are open."""
        with _lock:
            kept = [part.beton for part in self._open.values()]
        for beton in kept:
            if beton is not None:
                beton.check_whole(unchanged)

    def _checked(self, shard: Shard) -> Beton:
        """A part's file, held against the index."""
        where = f"{printable(str(self.path))}, part {shard.name}"
        try:
            beton = self._open_part(shard)
        except UserError as error:
            raise BetonError(f"{where}: {error}") from None
        told = {"images": len(beton), "bytes": beton.nbytes, "page_size": beton.page_size}
        told |= {"height": int(beton.height.max()), "width": int(beton.width.max())}
        for name, value in told.items():
            if value != getattr(shard, name):
                raise BetonError(f"{where}: its {name}: {value:,}, and the index says {getattr(shard, name):,}")
        names = self.class_names
        if names is not None:
            unknown = sorted(set(beton.class_names or ()) - set(names))
            if unknown:
                raise BetonError(f"{where}: its class {unknown[0]} is not among the index's {len(names):,}")
            if beton.class_names is None and not -1 <= beton.label.min() <= beton.label.max() < len(names):
                raise BetonError(f"{where}: it has labels that are none of the index's {len(names):,} classes")
        return beton


class _Part:
    """A part that is open, or is being opened."""

    def __init__(self) -> None:
        self.beton: Beton | None = None
        self.lock = threading.Lock()


def _unused() -> list[object]:
    """Parts that are to be closed, taken out of their sets. The caller holds the lock."""
    if len(_used) > MOST_OPEN:
        for used in [used for used in _used if used[0]() is None]:
            del _used[used]
    found: list[object] = []
    while len(_used) > MOST_OPEN:
        (owner, number), _ = _used.popitem(last=False)
        if (whole := owner()) is not None:
            # the set too: were this its last reference, it would close its parts here
            found += [whole, whole._open.pop(number, None)]
    return found


def _beside(folder: Path | Address, shard: Shard) -> Beton:
    return Beton(folder / shard.name)


def _pages(shard: Shard) -> int:
    return len(shard.pages) or min(shard.images, -(-shard.bytes // shard.page_size))


def _ends_of_pages(shard: Shard) -> np.ndarray:
    """How many images of a part lie on each of its pages and those before it."""
    if len(shard.pages):
        return np.cumsum(shard.pages, dtype=np.int64)
    count = _pages(shard)
    return np.arange(1, count + 1) * shard.images // count


def is_set(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a set's index."""
    place = Path(folder)
    if (place / INDEX).is_file():
        return True
    if (place / "plan.json").is_file() and next(place.glob("part-*.beton"), None) is not None:
        shown = printable(str(place))
        raise UserError(f"{shown} has parts of a set and no {INDEX}: end it by fastpmae-write {shown} --finish")
    return False


def open_set(folder: str | os.PathLike[str]) -> BetonSet:
    """The set in a folder: its index is read and checked, and its duplicates where they are noted; none of its parts.

    Raises:
        BetonError: where there is no index, or it is not sound, or the duplicates are not this index's.
    """
    path = local_path(folder)
    index = read_index(path / INDEX)
    if index.images > _MANY:
        _check_largest(path, index)
    known = (path / DUPLICATES).exists()
    return BetonSet(index, path, duplicates=read_duplicates(path / DUPLICATES, index) if known else None)


def _check_largest(folder: Path, index: SetIndex) -> None:
    """Hold the largest part against the size of its file: no memory is asked for by an index's word alone."""
    shard = max(index.shards, key=lambda shard: shard.bytes)
    where = f"{printable(str(folder))}, part {shard.name}"
    try:
        size = (folder / shard.name).stat().st_size
    except OSError as error:
        raise BetonError(f"{where} cannot be read: {error.strerror}") from None
    if size != shard.bytes:
        raise BetonError(f"{where}: its bytes: {size:,}, and the index says {shard.bytes:,}")
