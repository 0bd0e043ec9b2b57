"""What broken files hold: numbers at the edges of their types, and bytes cut, doubled and moved."""

import io
from collections.abc import Sequence
from functools import cache
from typing import TypeVar

import numpy as np

from tests.made import made_image

WORDS = (
    0, 1, 2, 3, 4, 7, 8, 16, 63, 64, 127, 128, 255, 256, 1000, 65535, 65536, 1 << 20, 1 << 24, (1 << 30) - 1, 1 << 30,
    (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 32) - 8, 1 << 32, 1 << 40, 1 << 48, (1 << 62), (1 << 63) - 1, 1 << 63,
    (1 << 64) - 1, (1 << 64) - 8, (1 << 64) - 4096,
)  # fmt: skip

Value = TypeVar("Value")


@cache
def some_images(cut: int) -> list[bytes]:
    """A small JPEG and a PNG, each whole and its first `cut` bytes, and what is no image."""
    found = []
    for form in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        made_image(1, 20, 16).save(buffer, form)
        found += [buffer.getvalue(), buffer.getvalue()[:cut]]
    return [*found, b"", b"hello"]


def choice(rng: np.random.Generator, values: Sequence[Value]) -> Value:
    """One of them, as it is: numpy's own choice makes an array of them first."""
    return values[int(rng.integers(len(values)))]


def set_word(rng: np.random.Generator, data: bytearray, start: int, stop: int, align: int = 1) -> str:
    """A word of 1, 2, 4 or 8 bytes within [start, stop) takes a value of an edge or one near what it was."""
    width = int(rng.choice([1, 2, 4, 4, 4, 8, 8]))
    at = start + int(rng.integers(max(1, stop - start))) // align * align
    old = int.from_bytes(data[at : at + width], "little")
    near = (old + 1, old - 1, old * 2, old + 8, -old, old ^ (1 << int(rng.integers(8 * width))))
    value = int(choice(rng, WORDS) if rng.random() < 0.6 else choice(rng, near)) % (1 << (8 * width))
    data[at : at + width] = value.to_bytes(width, "little")[: max(0, len(data) - at)]
    return f"{width} bytes at {at}: {old} -> {value}"


def broken(rng: np.random.Generator, content: bytes) -> tuple[bytes, str]:
    """Bytes cut off, dropped, doubled, moved, zeroed or changed anywhere, and how."""
    data, length = bytearray(content), len(content)
    at, size = int(rng.integers(max(1, length))), int(rng.choice([1, 4, 8, 64, 512]))
    how = choice(rng, ("cut", "drop", "double", "zero", "fill", "word", "word", "word", "flip", "flip"))
    if how == "cut":
        del data[at:]
    elif how == "drop":
        del data[at : at + size]
    elif how == "double":
        data[at:at] = data[at : at + size]
    elif how in ("zero", "fill"):
        data[at : at + size] = bytes([0 if how == "zero" else 255]) * len(data[at : at + size])
    elif how == "word":
        how = set_word(rng, data, 0, length)
    else:
        for _ in range(rng.integers(1, 9)):
            place = int(rng.integers(max(1, length)))
            data[place : place + 1] = bytes(byte ^ (1 << int(rng.integers(8))) for byte in data[place : place + 1])
    return bytes(data), f"{how} at {at} of {length}"
