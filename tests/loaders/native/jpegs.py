"""JPEGs that tests make: every sampling, any quality, tables that are no picture's."""

import io

import numpy as np
from PIL import Image


def noise(seed: int, width: int, height: int) -> Image.Image:
    """Pixels that are black or white in each channel, by chance: as large coefficients as there are."""
    rng = np.random.default_rng(seed)
    return Image.fromarray((rng.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8))


def encoded(image: Image.Image, subsampling: int | str | None, quality: int, **options) -> bytes:
    """A JPEG by Pillow; `subsampling` 0 is 4:4:4, 1 4:2:2, 2 4:2:0, or "gray"."""
    file = io.BytesIO()
    if subsampling == "gray":
        image = image.convert("L")
    elif subsampling is not None:
        options["subsampling"] = subsampling
    image.save(file, "JPEG", quality=quality, **options)
    return file.getvalue()


def segments(data: bytes, marker: int) -> list[int]:
    """Where the segments of one kind stand before the first scan."""
    at, found = 2, []
    while data[at + 1] != 0xDA:
        if data[at + 1] == marker:
            found.append(at)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return found


def tall_chroma(data: bytes) -> bytes:
    """A square 4:2:2 JPEG said to be 4:4:0: as many MCUs of as many blocks, another picture."""
    (frame,) = segments(data, 0xC0)
    changed = bytearray(data)
    assert changed[frame + 11] == 0x21
    changed[frame + 11] = 0x12
    return bytes(changed)


def with_quantisation(data: bytes, step: int) -> bytes:
    """The same coefficients times `step`."""
    changed = bytearray(data)
    for at in segments(data, 0xDB):
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        for table in range(at + 4, at + 2 + length, 65):
            changed[table + 1 : table + 65] = bytes([step]) * 64
    return bytes(changed)
