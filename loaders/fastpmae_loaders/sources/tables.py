"""The tables of a .beton file: where each image lies and what it is, held against each other before any of it is used.

The format (FFCV 1.0.2, little-endian): header, one descriptor a field, one metadata record a sample, pages of data, and
last, up to the end of the file, the allocation table (sample, pointer, size). The metadata give an image's pointer, the
allocation table its size. No allocation crosses a page.

Tables are read and checked stretch by stretch, so that opening a file takes the memory of what is kept of each sample.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from fastpmae_loaders.errors import BetonError

JPG, RAW = 0, 1
COEFFICIENTS = 3
"""Storage mode of an image in the code of `native/coefficients.py`, which FFCV's own reader does not know."""
_IS_MODE = np.isin(np.arange(256), (JPG, RAW, COEFFICIENTS))
VERSION = 2
CODED_VERSION = 256 + VERSION
"""Of a file in which there are coefficients."""
# Decode buffers are sized from the metadata, so a few bytes of it must not be able to ask for the whole
# memory. The figure is the one above which Pillow refuses to open an image.
PIXEL_LIMIT = 178_956_970

ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_REGION = np.dtype([("ptr", "<u8"), ("size", "<u8")])
# float, int, image, bytes, array, json, tensor: FFCV's type numbers
INT_FIELD, IMAGE_FIELD = 1, 2
FIELD_METADATA = {0: "<f8", 1: "<i8", 2: IMAGE, 3: _REGION, 4: "<u8", 5: _REGION, 6: "<u8"}

_STRETCH = 1 << 18
"""Records that are looked at together."""


def metadata_type(type_ids: list[int]) -> np.dtype:
    """A sample's record: the fields' own records one after another, aligned as C would."""
    return np.dtype([("", FIELD_METADATA[type_id]) for type_id in type_ids], align=True)


class File(NamedTuple):
    """What tables are read from: `read(start, size)` gives uint8 [size] of its `nbytes`; `error(what)` is to be raised.

    `at_once`: bytes that are asked for together, since a store gives much at once sooner than little by little.
    """

    read: Callable[[int, int], np.ndarray]
    nbytes: int
    error: Callable[[str], BetonError]
    at_once: int

    def records(self, dtype: np.dtype, start: int, count: int, what: str) -> np.ndarray:
        """Records of the file. BetonError where they would end outside it."""
        self.reach(dtype, start, count, what)
        return self.read(start, dtype.itemsize * count).view(dtype)

    def reach(self, dtype: np.dtype, start: int, count: int, what: str) -> None:
        """BetonError where records would end outside the file."""
        # Python integers: 64-bit ones from the file could wrap round
        stop = start + dtype.itemsize * count
        if stop > self.nbytes:
            raise self.error(
                f"{what} would end at byte {stop}, the file at byte {self.nbytes}; it is truncated or not a .beton file"
            )

    def stretches(self, dtype: np.dtype, start: int, count: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Records that `reach` has passed, some at a time, with which of all they are."""
        together = max(_STRETCH, self.at_once // dtype.itemsize)
        for first in range(0, count, together):
            last = min(first + together, count)
            records = self.read(start + first * dtype.itemsize, (last - first) * dtype.itemsize).view(dtype)
            for part in _parts(last - first):
                yield slice(first + part.start, first + part.stop), records[part]


class Images(NamedTuple):
    """What the tables say of n images, all of it sound; types and units are as of Beton."""

    mode: np.ndarray
    width: np.ndarray
    height: np.ndarray
    label: np.ndarray
    pointer: np.ndarray
    size: np.ndarray


def read_images(
    file: File, type_ids: list[int], start: int, count: int, version: int, page_size: int, table: int
) -> Images:
    """The images of a file whose `count` metadata records begin at byte `start` and its allocation table at `table`.

    Raises:
        BetonError: where anything in the tables is not as FFCV writes it.
    """
    reading = _Reading(file, page_size, table, start + count * metadata_type(type_ids).itemsize, count)
    file.reach(metadata_type(type_ids), start, count, f"the metadata of {count} samples")
    reading.metadata(type_ids, start)
    reading.check_images(version)
    reading.check_table()
    size = reading.sizes_of_one_each()
    size = reading.sizes_of_any() if size is None else size
    reading.check_raw_sizes(size)
    images = Images(reading.mode, reading.width, reading.height, reading.label, reading.pointer, size)
    for column in images:
        column.setflags(write=False)
    return images


class _Reading:
    """Tables that are being read; see `read_images`."""

    def __init__(self, file: File, page_size: int, table: int, data_start: int, count: int) -> None:
        self.file, self.page_size, self.table, self.data_start, self.count = file, page_size, table, data_start, count

    def metadata(self, type_ids: list[int], start: int) -> None:
        """Read what is kept of each sample's record: 25 bytes of it, and 4 for the size of its image."""
        count = self.count
        self.mode, self.pointer = np.empty(count, np.uint8), np.empty(count, np.uint64)
        # of an image within the limit three times its pixels, too, fit 32 bits
        self.width, self.height = np.empty(count, np.int32), np.empty(count, np.int32)
        self.label = np.full(count, -1, np.int64)
        image = f"f{type_ids.index(IMAGE_FIELD)}"
        label = f"f{type_ids.index(INT_FIELD)}" if INT_FIELD in type_ids else None
        for part, records in self.file.stretches(metadata_type(type_ids), start, count):
            for column, name in (("mode",) * 2, ("width",) * 2, ("height",) * 2, ("pointer", "data_ptr")):
                getattr(self, column)[part] = records[image][name]
            if label is not None:
                self.label[part] = records[label]

    def check_images(self, version: int) -> None:
        def pixels(part: slice) -> np.ndarray:
            return self.width[part].astype(np.int64) * self.height[part]

        def shape(i: int) -> str:
            return f"has {self.width[i]}x{self.height[i]} pixels"

        self.check(
            lambda part: _IS_MODE[self.mode[part]],
            lambda i: f"has storage mode {self.mode[i]}; 0 is JPEG, 1 raw pixels, 3 coefficients",
        )
        if version != CODED_VERSION:
            self.check(
                lambda part: self.mode[part] != COEFFICIENTS,
                lambda i: f"is stored as coefficients, in a file whose header says version {VERSION}, which has none",
            )
        self.check(lambda part: pixels(part) > 0, shape)
        self.check(
            lambda part: pixels(part) <= PIXEL_LIMIT, lambda i: f"{shape(i)}, above the limit of {PIXEL_LIMIT:,}"
        )

    def check_table(self) -> None:
        """See that the allocation table is one, by its place."""
        if not self.data_start <= self.table <= self.file.nbytes:
            raise self.file.error(
                f"the allocation table should begin at byte {self.table}, outside the data, which "
                f"begin at byte {self.data_start} of {self.file.nbytes}; the file is truncated or damaged"
            )
        self.allocations, rest = divmod(self.file.nbytes - self.table, ALLOCATION.itemsize)
        if rest or not self.allocations:
            raise self.file.error(
                f"the allocation table takes {self.file.nbytes - self.table} bytes, which is no "
                f"positive multiple of {ALLOCATION.itemsize}; the file is truncated or damaged"
            )

    def sizes_of_one_each(self) -> np.ndarray | None:
        """The images' sizes where each sample has one allocation, that of its image, and all are sound; else None.

        That is what a file of images and numbers has. The table is never kept as a whole for it.
        """
        if self.allocations != self.count:
            return None
        sizes = np.zeros(self.count, np.uint32)
        first, limit, page = np.uint64(self.data_start), np.uint64(self.table), np.uint64(self.page_size)
        for _, table in self.file.stretches(ALLOCATION, self.table, self.count):
            sample, pointer, size = table["sample_id"], table["ptr"], table["size"]
            if (sample >= self.count).any():
                return None
            sample = sample.astype(np.int64)
            # without a wrap-around: a difference is taken of what is known to be no smaller
            sound = (pointer >= first) & (pointer <= limit) & (size > 0) & (size <= page)
            sound &= (size <= limit - np.minimum(pointer, limit)) & (pointer % page + np.minimum(size, page) <= page)
            if not (sound & (pointer == self.pointer[sample])).all():
                return None
            sizes[sample] = size
        # as many allocations as samples: one that has two leaves another without
        if not sizes.all():
            return None
        order = None
        if (self.pointer[1:] < self.pointer[:-1]).any():
            order = np.argsort(self.pointer, kind="stable")
        for part in _parts(self.count - 1):
            here = part if order is None else order[part]
            following = slice(part.start + 1, part.stop + 1) if order is None else order[part.start + 1 : part.stop + 1]
            if (self.pointer[here] + sizes[here] > self.pointer[following]).any():
                return None
        return sizes

    def sizes_of_any(self) -> np.ndarray:
        """The images' sizes where samples have allocations besides, or something is wrong, which is then named."""
        table = self._sorted_table()
        if not len(table):
            raise self.file.error("the allocation table holds no data")
        place = np.minimum(np.searchsorted(table["ptr"], self.pointer), len(table) - 1)
        # an entry of the right sample at the right place: two samples can then never share their bytes
        known, owner = table["ptr"][place] == self.pointer, table["sample_id"][place]
        self.check(
            lambda part: known[part],
            lambda i: f"has its image at byte {self.pointer[i]}, where nothing is allocated",
        )
        own = owner == np.arange(self.count, dtype=np.uint64)
        self.check(
            lambda part: own[part],
            lambda i: f"has its image at byte {self.pointer[i]}, which is allocated to sample {owner[i]}",
        )
        return table["size"][place].astype(np.uint32)

    def _sorted_table(self) -> np.ndarray:
        """The allocation table by ascending pointer, every entry in bounds and clear of the others."""
        table = self.file.records(ALLOCATION, self.table, self.allocations, "the allocation table")
        table = table[table["size"] > 0]  # FFCV's bytes fields may allocate nothing
        pointer, size = table["ptr"], table["size"]
        limit, page = np.uint64(self.table), np.uint64(self.page_size)

        def describe(i: int) -> str:
            return f"(sample {table['sample_id'][i]}, byte {pointer[i]}, {size[i]} bytes)"

        def check(sound: np.ndarray, what: Callable[[int], str]) -> None:
            self.check(lambda part: sound[part], lambda i: f"{describe(i)} {what(i)}", "allocation", len(sound))

        inside = (pointer >= np.uint64(self.data_start)) & (pointer <= limit)
        check(inside & (size <= limit - np.minimum(pointer, limit)), lambda i: "lies outside the data")
        # both terms are below the file's size by now: no wrap-around
        check(pointer % page + size <= page, lambda i: f"crosses a page of {page} bytes")
        check(table["sample_id"] < np.uint64(self.count), lambda i: f"belongs to no sample; there are {self.count}")
        if np.any(pointer[1:] < pointer[:-1]):
            table = table[np.argsort(pointer, kind="stable")]
            pointer, size = table["ptr"], table["size"]
        check(pointer[:-1] + size[:-1] <= pointer[1:], lambda i: f"overlaps the next one {describe(i + 1)}")
        return table

    def check_raw_sizes(self, size: np.ndarray) -> None:
        def expected(part: slice | int) -> np.ndarray:
            return 3 * self.width[part] * self.height[part]

        self.check(
            lambda part: (self.mode[part] != RAW) | (size[part] == expected(part)),
            lambda i: (
                f"is raw, {self.width[i]}x{self.height[i]} pixels, and has {size[i]} bytes instead of {expected(i)}"
            ),
        )

    def check(
        self,
        sound: Callable[[slice], np.ndarray],
        describe: Callable[[int], str],
        what: str = "sample",
        count: int | None = None,
    ) -> None:
        check_each(self.count if count is None else count, sound, describe, what, self.file.error)


def check_each(
    count: int,
    sound: Callable[[slice], np.ndarray],
    describe: Callable[[int], str],
    what: str,
    error: Callable[[str], BetonError],
) -> None:
    """Raise a sentence about the first of `count` things that is not sound; `sound` says it of a stretch of them."""
    first, bad = 0, 0
    for part in _parts(count):
        found = np.flatnonzero(~sound(part))
        first = part.start + int(found[0]) if len(found) and not bad else first
        bad += len(found)
    if bad:
        more = f" ({bad - 1:,} more like it)" if bad > 1 else ""
        raise error(f"{what} {first} {describe(first)}{more}")


def _parts(count: int) -> Iterator[slice]:
    for start in range(0, count, _STRETCH):
        yield slice(start, min(start + _STRETCH, count))
