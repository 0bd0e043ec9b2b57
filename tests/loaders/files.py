"""Small .beton files for the loaders' tests, written with numpy alone from the format's description."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
RECORD = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)


def write_beton(
    path: Path,
    images: Sequence[bytes | np.ndarray],
    sizes: Sequence[tuple[int, int]] | None = None,
    page_size: int = 1 << 21,
) -> Path:
    """A .beton of JPEG bytes (with `sizes`, width and height, of each) and raw uint8 [H, W, 3]; label i is 10 i."""
    fields = np.zeros(2, np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)]))
    fields["type"] = (2, 1)
    for field, name in zip(fields, (b"image", b"label"), strict=True):
        field["name"][: len(name)] = np.frombuffer(name, np.uint8)
    records = np.zeros(len(images), RECORD)
    table = np.zeros(len(images), np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")]))
    start = 24 + fields.nbytes + records.nbytes
    at = -(-start // page_size) * page_size
    payloads = []
    for i, image in enumerate(images):
        raw = isinstance(image, np.ndarray)
        payload = image.tobytes() if raw else image
        width, height = (image.shape[1], image.shape[0]) if raw else sizes[i]
        if at % page_size + len(payload) > page_size:
            at = -(-at // page_size) * page_size
        records[i] = ((raw, width, height, at), 10 * i)
        table[i] = (i, at, len(payload))
        payloads.append((at, payload))
        at += len(payload)
    header = np.array(
        [(2, 2, page_size, len(images), at)],
        [("v", "<u2"), ("f", "<u2"), ("page", "<u4"), ("n", "<u8"), ("table", "<u8")],
    )
    with path.open("wb") as file:
        file.write(header.tobytes() + fields.tobytes() + records.tobytes())
        for place, payload in payloads:
            file.seek(place)
            file.write(payload)
        file.seek(at)
        file.write(table.tobytes())
    return path
