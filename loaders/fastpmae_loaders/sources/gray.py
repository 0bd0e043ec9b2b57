"""Gray of more than 8 bits: which of its values is white, and the bytes that come of it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from fastpmae_loaders.errors import UserError

_BITS_PER_SAMPLE = 258
_DARK = 4
"""An image is told of as nearly black where nothing in it reaches this part of white."""
_TOGETHER = 1 << 20  # pixels


def bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in stretches of rows, each with its first row: what is converted so needs no second whole image."""
    rows = max(1, _TOGETHER // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def is_deep(image: Image.Image) -> bool:
    """Whether it is gray of more than 8 bits, by its header."""
    return image.mode.startswith("I;16") or image.mode in ("I", "F")


def extremes(image: Image.Image) -> tuple[float, float]:
    """The least and the largest value of a decoded image; not finite where one of them is not."""
    pairs = [(float(values.min()), float(values.max())) for values in (np.asarray(band) for _, band in bands(image))]
    low, high = np.array(pairs).T
    return float(low.min()), float(high.max())


def white_of(image: Image.Image, high: float, white: float | None = None) -> float:
    """The value that is white in a deep image whose largest is `high`.

    What the file says (TIFF's bits a sample), then `white`, then the whole range of 16 bits. 1 for floats up to 1, and
    255 for wider types where nothing is above. UserError where nothing tells.
    """
    if image.mode.startswith("I;16") and (bits := _bits(image)) < 16:
        return float(2**bits - 1)
    if image.mode == "F" and high <= 1:
        return 1.0
    if white is not None:
        return white
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        return 65535.0
    if high <= 255:
        return 255.0
    if high <= 65535:
        return 65535.0
    raise UserError(f"its gray values reach {high:g}, and nothing says which of them is white")


def nearly_black(image: Image.Image, white: float | None = None) -> int | None:
    """The white that would suit a decoded deep image better than the one it gets, 2^n - 1; None where it is no darker
    than pictures are, or somebody has said what is white."""
    if not is_deep(image) or white is not None:
        return None
    low, high = extremes(image)
    if not low >= 0 or high < 1 or white_of(image, high) != 65535 or high * _DARK > 65535:
        return None
    return max(255, 2 ** int(high).bit_length() - 1)


def check_deep(image: Image.Image, white: float | None = None) -> float:
    """What is white in a decoded deep image. UserError where its values make no picture."""
    low, high = extremes(image)
    if not np.isfinite((low, high)).all() or low < 0:
        raise UserError(f"its gray values run from {low:g} to {high:g}, which is no picture")
    return white_of(image, high, white)


def eight_bits(image: Image.Image, white: float) -> Image.Image:
    """Gray scaled to 8 bits (Pillow's own convert clips some of it at 255), with alpha where one value is clear."""
    values = np.asarray(image).astype(np.float64)
    gray = Image.fromarray(np.rint(np.minimum(values * (255 / white), 255)).astype(np.uint8))
    key = image.info.get("transparency")
    if isinstance(key, int):
        gray.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return gray


def _bits(image: Image.Image) -> int:
    tags: Any = getattr(image, "tag_v2", {})  # of a TIFF
    bits = tags.get(_BITS_PER_SAMPLE, (16,))
    first = bits[0] if isinstance(bits, tuple) and bits else bits
    return first if isinstance(first, int) and 8 < first <= 16 else 16
