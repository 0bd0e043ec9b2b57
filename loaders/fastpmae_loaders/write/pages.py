"""Appends samples to a .beton file: the layout that FFCV's reader expects, written in one pass.

A file with coefficients in it says by its version that it is none of FFCV's.
"""

import json
import zlib
from typing import BinaryIO

import numpy as np

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.sources.beton import CLASS_NAMES, CLASS_NAMES_MAGIC, DESCRIPTOR, HEADER
from fastpmae_loaders.sources.tables import (
    ALLOCATION,
    CODED_VERSION,
    COEFFICIENTS,
    IMAGE_FIELD,
    INT_FIELD,
    VERSION,
    metadata_type,
)

LARGEST_PAGE = 1 << 31  # the header keeps the page size in 32 bits
_FIELDS = ((b"image", IMAGE_FIELD), (b"label", INT_FIELD))


class PageWriter:
    """Writes samples in order into an open binary file, tables and header at the end.

    `capacity` is the largest number of samples there may be (the metadata stand before the data, so their
    place is reserved). A sample lies within one page. One that is larger than a page doubles the page size
    until it fits: what crossed no page before crosses none of the doubled ones either, so nothing moves.
    """

    def __init__(self, file: BinaryIO, capacity: int, page_size: int):
        self._file = file
        self.page_size = page_size
        self._metadata = np.zeros(capacity, metadata_type([type_id for _, type_id in _FIELDS]))
        self._table = np.zeros(capacity, ALLOCATION)
        self.samples = 0
        start = HEADER.itemsize + len(_FIELDS) * DESCRIPTOR.itemsize + self._metadata.nbytes
        self._end = -(-start // page_size) * page_size

    def add(self, mode: int, width: int, height: int, label: int, data: bytes) -> None:
        """Appends one image. UserError when it is larger than the largest page there can be."""
        size = len(data)
        while size > self.page_size:
            if self.page_size >= LARGEST_PAGE:
                raise UserError(f"an image of {size:,} bytes does not fit into a .beton file: use --max-size")
            self.page_size *= 2
        if self._end % self.page_size + size > self.page_size:
            self._end = -(-self._end // self.page_size) * self.page_size
        self._file.seek(self._end)
        self._file.write(data)
        self._metadata[self.samples] = ((mode, width, height, self._end), label)
        self._table[self.samples] = (self.samples, self._end, size)
        self.samples += 1
        self._end += size

    def finish(self, class_names: list[str] | None) -> int:
        """Writes class names, allocation table, metadata and, last, the header. Returns the file's size."""
        descriptors = np.zeros(len(_FIELDS), DESCRIPTOR)
        for descriptor, (name, type_id) in zip(descriptors, _FIELDS, strict=True):
            descriptor["type_id"] = type_id
            descriptor["name"][: len(name)] = list(name)
        if class_names is not None:
            blob = json.dumps(class_names).encode()
            where = np.array((CLASS_NAMES_MAGIC, zlib.crc32(blob), self._end, len(blob)), CLASS_NAMES)
            descriptors[1]["arguments"][: CLASS_NAMES.itemsize] = list(where.tobytes())
            self._file.seek(self._end)
            self._file.write(blob)
            self._end += len(blob)
        table = self._table[: self.samples].tobytes()
        self._file.seek(self._end)
        self._file.write(table)
        coded = (self._metadata["f0"]["mode"][: self.samples] == COEFFICIENTS).any()
        version = CODED_VERSION if coded else VERSION
        header = np.array((version, len(_FIELDS), self.page_size, self.samples, self._end), HEADER)
        self._file.seek(HEADER.itemsize)
        self._file.write(descriptors.tobytes() + self._metadata[: self.samples].tobytes())
        self._file.seek(0)
        self._file.write(header.tobytes())
        return self._end + len(table)
