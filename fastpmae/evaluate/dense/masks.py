"""A mask's file as the number of each pixel, and an image with its mask: upright both, and of one size."""

import contextlib
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
from jaxtyping import Int, Shaped
from PIL import Image

from fastpmae.evaluate.dense.classes import MaskClasses
from fastpmae.evaluate.dense.labelled import Mask, Pixels
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable
from fastpmae_loaders.sources.pictures import ImageError, frame_of, load, open_image, upright_rgb

LOSSLESS = ("PNG", "BMP", "DIB", "TIFF", "GIF", "PPM")
_LOSSY_TIFF = ("jpeg", "old-jpeg", "webp")
_RAW = re.compile(r"[1L](?:;([24]?)(I?)R?)?")
"""Pillow's word for how gray is stored: so many bits, and inverted where white is 0."""


def turned(
    rows: Shaped[np.ndarray, "height width ..."], orientation: int
) -> Shaped[np.ndarray, "_height _width ..."]:  # fmt: skip
    """An array of pixels as an EXIF orientation turns the image that it belongs to."""
    if orientation in (5, 6, 7, 8):
        rows = rows.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        rows = rows[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rows = rows[::-1]
    return rows


def decode_mask(data: bytes, coloured: bool = False) -> tuple[Int[np.ndarray, "height width"], int]:
    """The number of each pixel, as it is stored in the file, and the orientation that its EXIF says, 1 to 8.

    Args:
        coloured: the numbers are colours, red · 65536 + green · 256 + blue; a palette is looked up.

    Raises:
        UserError: with the end of a sentence about the file.
    """
    image = open_image(io.BytesIO(data))
    if image.format not in LOSSLESS or image.info.get("compression") in _LOSSY_TIFF:
        raise UserError(
            f"is {image.format}, which changes numbers as it is stored: masks come as PNG, and no other file can be "
            "made right again"
        )
    drawn = _drawn(image)
    orientation = load(image)
    if coloured:
        if image.mode not in ("RGB", "RGBA", "P"):
            raise UserError(f"holds no colours ({image.mode}), and --classes names colours")
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.int32), 2, 0)
        return red << 16 | green << 8 | blue, orientation
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        known = image.mode in ("RGB", "RGBA")
        way = "name the class of each with --classes FILE" if known else "masks hold whole numbers, or colours in RGB"
        raise UserError(f"holds {'colours' if known else 'values of another kind'} ({image.mode}): {way}")
    # of a palette's image these are the places in the palette, where convert("L") would give how bright each colour is
    ids = np.asarray(image).astype(np.int64)
    if ids.min() < 0:
        raise UserError("holds a number below 0")
    most, largest, inverted = drawn
    if most != largest:
        ids = (ids * most + largest // 2) // largest
    return (most - ids if inverted else ids).astype(np.int32), orientation


def _drawn(image: Image.Image) -> tuple[int, int, bool]:
    """How Pillow will draw the numbers of a mask that it has not decoded yet: the largest that the file may store, the
    value that this one becomes, and whether 0 becomes that value instead."""
    largest = {"1": 1, "L": 255}.get(image.mode, 65535)
    tile = getattr(image, "tile", None) or [(None, None, None, "")]
    arguments = tile[0][3]
    raw, *more = arguments if isinstance(arguments, tuple) else (arguments,)
    if image.format == "PPM" and image.mode in ("L", "I") and more and isinstance(more[0], int):
        return more[0], largest, False
    stored = _RAW.fullmatch(raw) if isinstance(raw, str) and image.mode in ("1", "L") else None
    if stored is None:
        return largest, largest, False
    return 2 ** int(stored[1]) - 1 if stored[1] else largest, largest, stored[2] == "I"


def _turned_as_image(
    ids: Int[np.ndarray, "height width"], own: int, orientation: int, stored: tuple[int, int]
) -> Int[np.ndarray, "_height _width"]:  # fmt: skip
    """A mask turned upright: by the orientation of its own where it has one (`own` is not 1), or else as its image is,
    unless its size shows that it was drawn on the upright image.

    Args:
        orientation, stored: of the image, and its (height, width) in the file.
    """
    return turned(ids, orientation if own == 1 and ids.shape == stored else own)


@dataclass(frozen=True)
class Pair:
    """An image's file and its mask's.

    Attributes:
        image_name, mask_name: as a user would name them.
        open_image: the image's file, to read from.
        read_mask: the bytes of the mask's.
    """

    image_name: str
    mask_name: str
    open_image: Callable[[], IO[bytes]]
    read_mask: Callable[[], bytes]

    def mask_bytes(self) -> bytes:
        """Raises UserError where they cannot be read."""
        try:
            return self.read_mask()
        except (OSError, UserError) as error:
            raise _unreadable(self.mask_name, error) from None


def sentence_about(name: str, error: UserError) -> UserError:
    """What is wrong with a file, with its name before it."""
    return UserError(f"{printable(name)}{':' if isinstance(error, ImageError) else ''} {error}")


def _unreadable(name: str, error: OSError | UserError) -> UserError:
    return UserError(f"{printable(name)} cannot be read: {getattr(error, 'strerror', None) or error}")


@contextlib.contextmanager
def opened(open_: Callable[[], IO[bytes]], name: str) -> Iterator[IO[bytes]]:
    """A picture's file to read from; what goes wrong with it is a sentence with its name, a UserError."""
    try:
        file = open_()
    except (OSError, UserError) as error:
        raise _unreadable(name, error) from None
    with file:
        try:
            yield file
        except UserError as error:
            raise sentence_about(name, error) from None
        except OSError as error:
            raise _unreadable(name, error) from None


@dataclass(frozen=True)
class Contents:
    """What a mask holds, as it is found when a set is opened.

    Attributes:
        ids: the numbers in it, or colours as numbers.
        digest: of its bytes.
    """

    ids: tuple[int, ...]
    digest: str


def contents(pair: Pair, coloured: bool = False) -> Contents:
    """What a pair's mask holds.

    Raises:
        UserError: where one of the files is not sound or they are of two sizes.
    """
    data = pair.mask_bytes()
    ids, own = _mask(pair, data, coloured)
    with opened(pair.open_image, pair.image_name) as image:
        frame = frame_of(image)
    size = _turned_as_image(ids, own, frame.orientation, frame.stored).shape
    if (frame.height, frame.width) != size:
        raise _two_sizes(pair, (frame.height, frame.width), size)
    return Contents(tuple(np.unique(ids).tolist()), hashlib.sha256(data).hexdigest()[:16])


def read_pair(pair: Pair, classes: MaskClasses) -> tuple[Pixels, Mask]:
    """The image in RGB and the class of each of its pixels, both upright.

    The mask is turned as `_turned_as_image` says.

    Raises:
        UserError: where one of the files is not sound, they are of two sizes, or the mask holds what is no class.
    """
    with opened(pair.open_image, pair.image_name) as file:
        image = open_image(io.BytesIO(file.read()))
        stored = image.height, image.width
        orientation = load(image)
        pixels = np.array(upright_rgb(image, orientation))
    ids, own = _mask(pair, pair.mask_bytes(), classes.coloured)
    ids = _turned_as_image(ids, own, orientation, stored)
    if ids.shape != pixels.shape[:2]:
        raise _two_sizes(pair, pixels.shape[:2], ids.shape)
    try:
        return pixels, np.ascontiguousarray(classes.apply(ids))
    except UserError as error:
        raise sentence_about(pair.mask_name, error) from None


def _mask(pair: Pair, data: bytes, coloured: bool) -> tuple[Int[np.ndarray, "height width"], int]:
    try:
        return decode_mask(data, coloured)
    except UserError as error:
        raise sentence_about(pair.mask_name, error) from None


def _two_sizes(pair: Pair, image: tuple[int, ...], mask: tuple[int, ...]) -> UserError:
    return UserError(
        f"{printable(pair.mask_name)} is {mask[1]}x{mask[0]} pixels and its image {image[1]}x{image[0]}"
        f" ({printable(pair.image_name)})"
    )
