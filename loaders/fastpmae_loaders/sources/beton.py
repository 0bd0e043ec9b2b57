"""Reads FFCV's .beton files with numpy alone. The file is taken for hostile until its tables prove sound (`tables`).

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
from fastpmae_loaders.sources.places import Largest, Places
from fastpmae_loaders.sources.tables import (
    CODED_VERSION,
    COEFFICIENTS,
    FIELD_METADATA,
    IMAGE_FIELD,
    INT_FIELD,
    JPG,
    PIXEL_LIMIT,
    RAW,
    VERSION,
    File,
    check_each,
    metadata_type,
    read_images,
)
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.values import local_path

__all__ = ["COEFFICIENTS", "JPG", "PIXEL_LIMIT", "RAW", "Beton", "jpeg_size"]

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
# Class names lie in the file as JSON. FFCV leaves the label field's arguments unused: there is the pointer.
CLASS_NAMES = np.dtype([("magic", "S12"), ("crc32", "<u4"), ("ptr", "<u8"), ("size", "<u8")])
CLASS_NAMES_MAGIC = b"fastpmaecls1"
_CLASS_NAMES_LIMIT = 1 << 28


class Beton:
    """A .beton file opened, mapped and checked. Everything is read-only; n is the number of samples.

    Attributes: `width`, `height` int32 [n] in pixels, of which three times the product fits 32 bits too; `mode` uint8
    [n] (0 JPEG, 1 raw, 3 coefficients); `label` int64 [n] (−1 without an int field); `pointer` uint64 [n] and `size`
    uint32 [n], the byte range of each image, inside the file and outside its tables; `page_of` int32 or int64 [n];
    `page_size`; `class_names` (list of str, or None); `nbytes`, the size of the file; `data` uint8 memory map of it;
    `descriptor`, the open file; `path`.

    Opening takes 29 bytes of memory for each image, and `page_of` 4 more when it is first asked for.

    Nothing here reads by way of the map: a file that is cut short while it is read, or a disk that fails, would end the
    process (SIGBUS). What is read from the descriptor is there or is an error.

    The first image field and the first int field are used, whatever their names. Raises BetonError, one
    sentence, when anything in the header or tables is not as FFCV writes it. JPEG payloads are not opened
    here: before decoding one into a buffer sized from the metadata compare `jpeg_size` with them.
    """

    _at_once = 0
    """Bytes of the tables that are read together, at least."""

    def __init__(self, path: str | os.PathLike[str]):
        self._open(path)
        file = File(self._read, self.nbytes, self._fail, self._at_once)
        header = file.records(HEADER, 0, 1, "the header")[0]
        self._check_header(header)
        fields = file.records(DESCRIPTOR, HEADER.itemsize, int(header["num_fields"]), "the field descriptors")
        type_ids = self._field_types(fields)
        count, start = int(header["num_samples"]), HEADER.itemsize + fields.nbytes
        self._data = start + count * metadata_type(type_ids).itemsize, int(header["alloc_table_ptr"])
        images = read_images(file, type_ids, start, count, self.version, self.page_size, self._data[1])
        self.mode, self.width, self.height, self.label, self.pointer, self.size = images
        labelled = INT_FIELD in type_ids
        self.class_names = self._class_names(fields[type_ids.index(INT_FIELD)]) if labelled else None

    def __len__(self) -> int:
        return len(self.mode)

    def __repr__(self) -> str:
        return f"Beton({str(self.path)!r}, {len(self)} samples)"

    def __reduce__(self):
        return Beton, (self.path,)  # reopened, not copied, in another process

    @property
    def page_of(self) -> np.ndarray:
        """Which page each image lies on."""
        return self._page_of

    @cached_property
    def _page_of(self) -> np.ndarray:
        page_of = np.empty(len(self), np.int32 if self.nbytes // self.page_size < 2**31 else np.int64)
        np.floor_divide(self.pointer, np.uint64(self.page_size), out=page_of, casting="unsafe")
        page_of.setflags(write=False)
        return page_of

    @cached_property
    def largest(self) -> Largest:
        """What memory must be there for any image."""
        pixels = int((self.width * self.height).max())
        return Largest(int(self.height.max()), int(self.width.max()), pixels, int(self.size.max()))

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
            if type_id not in FIELD_METADATA:
                raise self._fail(f"field {position} is of unknown type {type_id}; only FFCV's own are read")
            if not name.isascii():
                raise self._fail(f"the name of field {position} is not ASCII")
        if len(set(names)) != len(names):
            raise self._fail("two of its fields have the same name")
        if IMAGE_FIELD not in type_ids:
            raise self._fail("none of its fields holds RGB images")
        return type_ids

    def _class_names(self, field: np.void) -> list[str] | None:
        where = np.ascontiguousarray(field["arguments"][: CLASS_NAMES.itemsize]).view(CLASS_NAMES)[0]
        if where["magic"] != CLASS_NAMES_MAGIC:
            return None  # a file of stock FFCV
        start, size = int(where["ptr"]), int(where["size"])
        if start < self._data[0] or start + size > self._data[1] or size > _CLASS_NAMES_LIMIT:
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
        check_each(
            len(self),
            lambda part: (self.label[part] >= -1) & (self.label[part] < len(names)),
            lambda i: f"has label {self.label[i]}, and there are {len(names)} classes",
            "sample",
            self._fail,
        )
        return [printable(name) for name in names]


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
