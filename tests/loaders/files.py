"""Small .beton files for the loaders' tests, written with numpy alone from the format's description."""

import contextlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastpmae_loaders.native.coefficients import MAGIC
from fastpmae_loaders.sources.tables import CODED_VERSION, COEFFICIENTS, VERSION
from tests.made import SHARED_DATA

IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
RECORD = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)


def write_beton(
    path: Path,
    images: Sequence[bytes | np.ndarray],
    sizes: Sequence[tuple[int, int]] | None = None,
    page_size: int = 1 << 21,
) -> Path:
    """A .beton of JPEG bytes or their coefficients (with `sizes`, width and height, of each) and raw uint8 [H, W, 3].

    Label i is 10 i.
    """
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
        mode = COEFFICIENTS if not raw and image.startswith(MAGIC) else int(raw)
        payload = image.tobytes() if isinstance(image, np.ndarray) else image
        if isinstance(image, np.ndarray):
            height, width, _ = image.shape
        else:
            assert sizes is not None, "bytes do not tell how large their picture is"
            width, height = sizes[i]
        if at % page_size + len(payload) > page_size:
            at = -(-at // page_size) * page_size
        records[i] = ((mode, width, height, at), 10 * i)
        table[i] = (i, at, len(payload))
        payloads.append((at, payload))
        at += len(payload)
    version = CODED_VERSION if COEFFICIENTS in records["image"]["mode"] else VERSION
    header = np.array(
        [(version, 2, page_size, len(images), at)],
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


def open_files(place: Path) -> int:
    """How many descriptors of this process lead to a file, or to files in a folder; 0 where no /proc tells.

    All open files would be the wrong thing to count: sockets and pipes of earlier tests close in the background.
    """
    descriptors, found = Path("/proc/self/fd"), 0
    for link in descriptors.iterdir() if descriptors.exists() else ():
        with contextlib.suppress(OSError):  # one that has been closed meanwhile
            found += link.readlink().is_relative_to(place.resolve())
    return found


def photographs(name: str, count: int) -> list[np.ndarray]:
    """Some RGB photographs of a tar in shared/data, uint8 [H, W, 3]; skips the test where it is missing."""
    return [np.array(Image.open(io.BytesIO(data)).convert("RGB")) for data in photograph_bytes(name, count)]


def photograph_bytes(name: str, count: int) -> list[bytes]:
    """The same as the JPEGs they are, spread evenly over the tar."""
    path = SHARED_DATA / f"{name}.tar"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    with tarfile.open(path) as archive:
        members = [m for m in archive.getmembers() if m.isfile() and m.name.endswith((".JPEG", ".jpg"))]
        files = [archive.extractfile(m) for m in members[:: max(1, len(members) // count)][:count]]
        return [file.read() for file in files if file is not None]


def made_pixels(number: int, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3] out of whole numbers alone: the same on every machine and with every library."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    smooth = np.stack([x * 5 + y * 2, (x * y) // 7 + 40 * number, (x + 3 * y) ** 2 // 31], -1)
    edges = ((x // 7 + y // 5 + number) % 3 == 0)[..., None] * 131
    return ((smooth + edges) % 256).astype(np.uint8)
