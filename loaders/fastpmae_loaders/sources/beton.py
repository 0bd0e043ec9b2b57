"""Reads FFCV's .beton files with numpy alone. The file is taken for hostile until its tables prove sound.

The format (FFCV 1.0.2, little-endian): header, one descriptor a field, one metadata record a sample,
pages of data, and last, up to the end of the file, the allocation table (sample, pointer, size). The
metadata give an image's pointer, the allocation table its size. No allocation crosses a page.

A file of which any image is stored as coefficients has another version in its header, and nothing else that is new:
FFCV's own reader would take the coefficients for pixels, and refuses a file of a version that it does not know.
"""

import io
import json
import os
import warnings
import weakref
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np

from fastpmae_loaders.errors import BetonError
from fastpmae_loaders.printable import printable
from fastpmae_loaders.sources.jpeg import check_scans, jpeg_size
from fastpmae_loaders.sources.places import Places
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.values import local_path

__all__ = ["COEFFICIENTS", "JPG", "PIXEL_LIMIT", "RAW", "Beton", "jpeg_size"]

VERSION = 2
CODED_VERSION = 256 + VERSION
"""Of a file in which there are coefficients."""
JPG, RAW = 0, 1
COEFFICIENTS = 3
"""Storage mode of an image in the code of `native/coefficients.py`, which FFCV's own reader does not know."""
_MODES = (JPG, RAW, COEFFICIENTS)
# Decode buffers are sized from the metadata, so a few bytes of it must not be able to ask for the whole
# memory. The figure is the one above which Pillow refuses to open an image.
PIXEL_LIMIT = 178_956_970

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_REGION = np.dtype([("ptr", "<u8"), ("size", "<u8")])
# float, int, image, bytes, array, json, tensor: FFCV's type numbers
INT_FIELD, IMAGE_FIELD = 1, 2
_FIELD_METADATA = {0: "<f8", 1: "<i8", 2: IMAGE, 3: _REGION, 4: "<u8", 5: _REGION, 6: "<u8"}

# Class names lie in the file as JSON. FFCV leaves the label field's arguments unused: there is the pointer.
CLASS_NAMES = np.dtype([("magic", "S12"), ("crc32", "<u4"), ("ptr", "<u8"), ("size", "<u8")])
CLASS_NAMES_MAGIC = b"fastpmaecls1"
_CLASS_NAMES_LIMIT = 1 << 28


def metadata_type(type_ids: list[int]) -> np.dtype:
    """A sample's record: the fields' own records one after another, aligned as C would."""
    return np.dtype([("", _FIELD_METADATA[type_id]) for type_id in type_ids], align=True)


class Beton:
    """A .beton file opened, mapped and checked. Everything is read-only; n is the number of samples.

    Attributes: `width`, `height` int64 [n] in pixels; `mode` uint8 [n] (0 JPEG, 1 raw, 3 coefficients); `label` int64
    [n] (−1 without an int field); `pointer`, `size` uint64 [n], the byte range of each image, inside the file and
    outside its tables; `page_of` int64 [n]; `page_size`; `class_names` (list of str, or None); `nbytes`, the size of
    the file; `data` uint8 memory map of it; `descriptor`, the open file; `path`.

    Nothing here reads by way of the map: a file that is cut short while it is read, or a disk that fails, would end the
    process (SIGBUS). What is read from the descriptor is there or is an error.

    The first image field and the first int field are used, whatever their names. Raises BetonError, one
    sentence, when anything in the header or tables is not as FFCV writes it. JPEG payloads are not opened
    here: before decoding one into a buffer sized from the metadata compare `jpeg_size` with them.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._open(path)
        header = self._records(HEADER, 0, 1, "the header")[0]
        self._check_header(header)
        fields = self._records(DESCRIPTOR, HEADER.itemsize, int(header["num_fields"]), "the field descriptors")
        type_ids = self._field_types(fields)
        record = metadata_type(type_ids)
        count, start = int(header["num_samples"]), HEADER.itemsize + fields.nbytes
        metadata = self._records(record, start, count, f"the metadata of {count} samples")
        self._data_start = start + count * record.itemsize
        self._table = int(header["alloc_table_ptr"])

        image = metadata[f"f{type_ids.index(IMAGE_FIELD)}"]
        self.mode = _frozen(image["mode"], np.uint8)
        self.width, self.height = (_frozen(image[side], np.int64) for side in ("width", "height"))
        self.pointer = _frozen(image["data_ptr"], np.uint64)
        labelled = INT_FIELD in type_ids
        label = metadata[f"f{type_ids.index(INT_FIELD)}"] if labelled else np.full(count, -1)
        self.label = _frozen(label, np.int64)
        self._check_images()
        self.size = _frozen(self._image_sizes(self._allocations()), np.uint64)
        self._check_raw_sizes()
        self.page_of = _frozen(self.pointer // np.uint64(self.page_size), np.int64)
        self.class_names = self._class_names(fields[type_ids.index(INT_FIELD)]) if labelled else None

    def __len__(self) -> int:
        return len(self.mode)

    def __repr__(self) -> str:
        return f"Beton({str(self.path)!r}, {len(self)} samples)"

    def __reduce__(self):
        return Beton, (self.path,)  # reopened, not copied, in another process

    @cached_property
    def data(self) -> np.ndarray:
        """The file mapped, when it is first asked for: a map takes one more descriptor."""
        with os.fdopen(os.dup(self.descriptor), "rb") as file:
            return np.memmap(file, np.uint8, mode="r")

    def describe(self, indices: np.ndarray) -> Places:
        """Where some images lie and what they are."""
        columns = (getattr(self, name)[indices] for name in Places._fields[1:])
        return Places(np.full(len(indices), self.descriptor), *(column.astype(np.int64) for column in columns))

    def locate(self, indices: np.ndarray) -> tuple[Places, object]:
        """The same, and what keeps the file open, and the images in it, meanwhile."""
        return self.describe(indices), self

    def payload(self, index: int) -> np.ndarray:
        """The stored bytes of one image, uint8, read-only. BetonError where they can no longer be read."""
        payload = self._read(int(self.pointer[index]), int(self.size[index]))
        payload.setflags(write=False)
        return payload

    def check_whole(self, unchanged: bool = False) -> None:
        """Raise BetonError when the file has become shorter since it was opened; with `unchanged`, or was written to.

        That is for samples that do not decode: who writes over a file in place is told so, and not that it is damaged.
        """
        now = os.fstat(self.descriptor)
        if now.st_size < self.nbytes:
            raise BetonError(
                f"{self.path} has become shorter since it was opened, {now.st_size:,} bytes instead of "
                f"{self.nbytes:,}: something writes over it. Go on when it is whole again"
            )
        if unchanged and now.st_mtime_ns != self._written:
            raise BetonError(
                f"{self.path} has been written to since it was opened, and images in it no longer decode. "
                "Go on when it is whole again"
            )

    def decode(self, index: int) -> np.ndarray:
        """One image as uint8 [height, width, 3]. BetonError names the index when it does not decode."""
        width, height, payload = int(self.width[index]), int(self.height[index]), self.payload(index)
        if self.mode[index] == RAW:
            return payload.reshape(height, width, 3).copy()
        try:
            if self.mode[index] == COEFFICIENTS:
                return _unpacked(payload, height, width)
            size = jpeg_size(payload)
            if size != (width, height):
                raise BetonError(f"the JPEG is {size[0]}x{size[1]} pixels, its metadata say {width}x{height}")
            check_scans(payload)
            return _pillow_rgb(payload.tobytes())
        except BetonError as error:
            raise BetonError(f"{self.path}: sample {int(index)}: {error}") from None

    def _open(self, path: str | os.PathLike[str]) -> None:
        here = local_path(path)
        self.path: Path | Address = here
        try:
            if not here.is_file():
                raise BetonError(f"{self.path} {'is not a file' if here.exists() else 'does not exist'}")
            with here.open("rb") as file:
                status = os.fstat(file.fileno())
                if not status.st_size:
                    raise BetonError(f"{self.path} is empty")
                self.nbytes, self._written = status.st_size, status.st_mtime_ns
                self.descriptor = os.dup(file.fileno())
            # Threads may still read from it when the interpreter ends.
            weakref.finalize(self, os.close, self.descriptor).atexit = False
        except (OSError, ValueError) as error:
            raise BetonError(f"{self.path} cannot be read: {_reason(error)}") from None

    def _fail(self, what: str) -> BetonError:
        return BetonError(f"{self.path}: {what}")

    def _records(self, dtype: np.dtype, start: int, count: int, what: str) -> np.ndarray:
        # Python integers throughout: 64-bit ones from the file could wrap round
        stop = start + dtype.itemsize * count
        if stop > self.nbytes:
            raise self._fail(
                f"{what} would end at byte {stop}, the file at byte {self.nbytes}; it is truncated or not a .beton file"
            )
        return self._read(start, stop - start).view(dtype)

    def _read(self, start: int, size: int) -> np.ndarray:
        """Bytes of the file, uint8 [size]."""
        if not hasattr(os, "preadv"):  # Windows, where a file that is mapped cannot be cut short
            return np.array(self.data[start : start + size])
        data, place = np.empty(size, np.uint8), 0
        try:
            while place < size and (count := os.preadv(self.descriptor, [data.data[place:]], start + place)):
                place += count
        except OSError as error:
            raise BetonError(f"{self.path} cannot be read: {_reason(error)}") from None
        if place < size:
            self.check_whole()
            raise BetonError(f"{self.path} ends at byte {start + place}, and byte {start + size} was to be read")
        return data

    def _check_header(self, header: np.void) -> None:
        if header["version"] not in (VERSION, CODED_VERSION):
            raise self._fail(
                f"not a .beton file of FFCV's format {VERSION}: its header says version {header['version']}"
            )
        page_size = int(header["page_size"])
        if page_size == 0 or page_size & (page_size - 1):
            raise self._fail(f"the header says a page size of {page_size}, which is no power of two")
        if header["num_samples"] == 0:
            raise self._fail("the header says that it holds no samples")
        if header["num_fields"] == 0:
            raise self._fail("the header says that its samples have no fields")
        self.page_size = page_size
        self.version = int(header["version"])

    def _field_types(self, fields: np.ndarray) -> list[int]:
        type_ids = [int(type_id) for type_id in fields["type_id"]]
        names = [bytes(name).split(b"\0")[0] for name in fields["name"]]
        for position, (type_id, name) in enumerate(zip(type_ids, names, strict=True)):
            if type_id not in _FIELD_METADATA:
                raise self._fail(f"field {position} is of unknown type {type_id}; only FFCV's own are read")
            if not name.isascii():
                raise self._fail(f"the name of field {position} is not ASCII")
        if len(set(names)) != len(names):
            raise self._fail("two of its fields have the same name")
        if IMAGE_FIELD not in type_ids:
            raise self._fail("none of its fields holds RGB images")
        return type_ids

    def _check_images(self) -> None:
        self._check(
            np.isin(self.mode, _MODES),
            lambda i: f"has storage mode {self.mode[i]}; 0 is JPEG, 1 raw pixels, 3 coefficients",
        )
        self._check(
            (self.mode != COEFFICIENTS) | (self.version == CODED_VERSION),
            lambda i: f"is stored as coefficients, in a file whose header says version {VERSION}, which has none",
        )
        pixels = self.width * self.height

        def shape(i: int) -> str:
            return f"has {self.width[i]}x{self.height[i]} pixels"

        self._check(pixels > 0, shape)
        self._check(pixels <= PIXEL_LIMIT, lambda i: f"{shape(i)}, above the limit of {PIXEL_LIMIT:,}")

    def _allocations(self) -> np.ndarray:
        """The allocation table by ascending pointer, every entry in bounds and clear of the others."""
        if not self._data_start <= self._table <= self.nbytes:
            raise self._fail(
                f"the allocation table should begin at byte {self._table}, outside the data, which "
                f"begin at byte {self._data_start} of {self.nbytes}; the file is truncated or damaged"
            )
        count, rest = divmod(self.nbytes - self._table, ALLOCATION.itemsize)
        if rest or not count:
            raise self._fail(
                f"the allocation table takes {self.nbytes - self._table} bytes, which is no "
                f"positive multiple of {ALLOCATION.itemsize}; the file is truncated or damaged"
            )
        table = self._records(ALLOCATION, self._table, count, "the allocation table")
        table = table[table["size"] > 0]  # FFCV's bytes fields may allocate nothing
        pointer, size = table["ptr"], table["size"]
        limit, page = np.uint64(self._table), np.uint64(self.page_size)

        def describe(i: int) -> str:
            return f"(sample {table['sample_id'][i]}, byte {pointer[i]}, {size[i]} bytes)"

        inside = (pointer >= np.uint64(self._data_start)) & (pointer <= limit)
        inside &= size <= limit - np.minimum(pointer, limit)
        self._check(inside, lambda i: f"{describe(i)} lies outside the data", "allocation")
        # both terms are below the file's size by now: no wrap-around
        self._check(
            pointer % page + size <= page,
            lambda i: f"{describe(i)} crosses a page of {page} bytes",
            "allocation",
        )
        self._check(
            table["sample_id"] < np.uint64(len(self)),
            lambda i: f"{describe(i)} belongs to no sample; there are {len(self)}",
            "allocation",
        )
        if np.any(pointer[1:] < pointer[:-1]):
            table = table[np.argsort(pointer, kind="stable")]
            pointer, size = table["ptr"], table["size"]
        self._check(
            pointer[:-1] + size[:-1] <= pointer[1:],
            lambda i: f"{describe(i)} overlaps the next one {describe(i + 1)}",
            "allocation",
        )
        return table

    def _image_sizes(self, table: np.ndarray) -> np.ndarray:
        if not len(table):
            raise self._fail("the allocation table holds no data")
        place = np.searchsorted(table["ptr"], self.pointer)
        place = np.minimum(place, len(table) - 1)
        # an entry of the right sample at the right place: two samples can then never share their bytes
        known = table["ptr"][place] == self.pointer
        self._check(known, lambda i: f"has its image at byte {self.pointer[i]}, where nothing is allocated")
        owner = table["sample_id"][place]
        self._check(
            owner == np.arange(len(self), dtype=np.uint64),
            lambda i: f"has its image at byte {self.pointer[i]}, which is allocated to sample {owner[i]}",
        )
        return table["size"][place]

    def _check_raw_sizes(self) -> None:
        expected = (3 * self.width * self.height).astype(np.uint64)
        self._check(
            (self.mode != RAW) | (self.size == expected),
            lambda i: (
                f"is raw, {self.width[i]}x{self.height[i]} pixels, and has {self.size[i]} bytes "
                f"instead of {expected[i]}"
            ),
        )

    def _check(self, sound: np.ndarray, describe, what: str = "sample") -> None:
        if not sound.all():
            bad = np.flatnonzero(~sound)
            more = f" ({bad.size - 1:,} more like it)" if bad.size > 1 else ""
            raise self._fail(f"{what} {bad[0]} {describe(int(bad[0]))}{more}")

    def _class_names(self, field: np.void) -> list[str] | None:
        where = np.ascontiguousarray(field["arguments"][: CLASS_NAMES.itemsize]).view(CLASS_NAMES)[0]
        if where["magic"] != CLASS_NAMES_MAGIC:
            return None  # a file of stock FFCV
        start, size = int(where["ptr"]), int(where["size"])
        if start < self._data_start or start + size > self._table or size > _CLASS_NAMES_LIMIT:
            raise self._fail(f"the class names lie outside the data (byte {start}, {size} bytes)")
        blob = self._read(start, size).tobytes()
        if zlib.crc32(blob) != where["crc32"]:
            raise self._fail(f"the class names at byte {start} are damaged (wrong checksum)")
        try:
            names = json.loads(blob)
        except (ValueError, RecursionError):
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._fail(f"the class names at byte {start} are no list of names")
        self._check(
            (self.label >= -1) & (self.label < len(names)),
            lambda i: f"has label {self.label[i]}, and there are {len(names)} classes",
        )
        return [printable(name) for name in names]


def _frozen(values: np.ndarray, dtype: type) -> np.ndarray:
    array = np.ascontiguousarray(values).astype(dtype)
    array.setflags(write=False)
    return array


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _unpacked(payload: np.ndarray, height: int, width: int) -> np.ndarray:
    # numba, which nothing else here needs
    from fastpmae_loaders.native.coefficients import unpack_pixels
    from fastpmae_loaders.native.damage import damage_of

    pixels = unpack_pixels(payload, height, width)
    if pixels is None:
        raise BetonError(damage_of(payload.tobytes(), height, width) or "its coefficients are damaged")
    return pixels


def _pillow_rgb(payload: bytes) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(payload), formats=("JPEG",)) as image:
                if image.mode not in ("RGB", "L"):
                    raise BetonError(f"the JPEG's colours are {image.mode}, neither RGB nor gray")
                return np.array(image.convert("RGB"))
    except BetonError:
        raise
    except UnidentifiedImageError:
        raise BetonError("the JPEG does not decode: Pillow finds no image in it") from None
    except Exception as error:  # Pillow raises nearly every kind there is on damaged data
        raise BetonError(f"the JPEG does not decode: {_reason(error)}") from None
