"""A mask's file as the number of each pixel, and an image with its mask: upright both, and of one size."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Shaped

from fastpmae.evaluate.dense.classes import MaskClasses
from fastpmae.evaluate.dense.labelled import Mask, Pixels
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable
from fastpmae_loaders.sources.pictures import load, look, open_image, upright_rgb

LOSSLESS = ("PNG", "BMP", "DIB", "TIFF", "GIF", "PPM")
_LOSSY_TIFF = ("jpeg", "old-jpeg", "webp")
Read = Callable[[], bytes]


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
    orientation = load(image)
    if coloured:
        if image.mode not in ("RGB", "RGBA", "P"):
            raise UserError(f"holds numbers ({image.mode}), and --classes names colours")
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.int32), 2, 0)
        return red << 16 | green << 8 | blue, orientation
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        raise UserError(f"holds colours ({image.mode}): name the class of each with --classes FILE")
    # of a palette's image these are the places in the palette, where convert("L") would give how bright each colour is
    ids = np.asarray(image).astype(np.int32)
    if ids.min() < 0:
        raise UserError("holds a number below 0")
    return ids, orientation


@dataclass(frozen=True)
class Pair:
    """An image's file and its mask's.

    Attributes:
        image_name, mask_name: as a user would name them.
        read_image, read_mask: their bytes.
    """

    image_name: str
    mask_name: str
    read_image: Read
    read_mask: Read

    def image_bytes(self) -> bytes:
        """Raises UserError where they cannot be read."""
        return _bytes(self.read_image, self.image_name)

    def mask_bytes(self) -> bytes:
        """Raises UserError where they cannot be read."""
        return _bytes(self.read_mask, self.mask_name)


def _bytes(read: Read, name: str) -> bytes:
    try:
        return read()
    except (OSError, UserError) as error:
        raise UserError(f"{printable(name)} cannot be read: {getattr(error, 'strerror', None) or error}") from None


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
    try:
        _, height, width = look(io.BytesIO(pair.image_bytes()))
    except UserError as error:
        raise UserError(f"{printable(pair.image_name)} {error}") from None
    sizes = (turned(ids, own).shape, ids.shape[::-1]) if own == 1 else (turned(ids, own).shape,)
    if (height, width) not in sizes:
        raise _two_sizes(pair, (height, width), sizes[0])
    return Contents(tuple(np.unique(ids).tolist()), hashlib.sha256(data).hexdigest()[:16])


def read_pair(pair: Pair, classes: MaskClasses) -> tuple[Pixels, Mask]:
    """The image in RGB and the class of each of its pixels, both upright.

    A mask with an orientation of its own is turned by that. One without is turned as its image is, unless its size
    shows that it was drawn on the upright image.

    Raises:
        UserError: where one of the files is not sound, they are of two sizes, or the mask holds what is no class.
    """
    try:
        image = open_image(io.BytesIO(pair.image_bytes()))
        stored = image.size[::-1]
        orientation = load(image)
        pixels = np.array(upright_rgb(image, orientation))
    except UserError as error:
        raise UserError(f"{printable(pair.image_name)} {error}") from None
    ids, own = _mask(pair, pair.mask_bytes(), classes.coloured)
    ids = turned(ids, orientation if own == 1 and ids.shape == stored else own)
    if ids.shape != pixels.shape[:2]:
        raise _two_sizes(pair, pixels.shape[:2], ids.shape)
    try:
        return pixels, np.ascontiguousarray(classes.apply(ids))
    except UserError as error:
        raise UserError(f"{printable(pair.mask_name)} {error}") from None


def _mask(pair: Pair, data: bytes, coloured: bool) -> tuple[Int[np.ndarray, "height width"], int]:
    try:
        return decode_mask(data, coloured)
    except UserError as error:
        raise UserError(f"{printable(pair.mask_name)} {error}") from None


def _two_sizes(pair: Pair, image: tuple[int, ...], mask: tuple[int, ...]) -> UserError:
    return UserError(
        f"{printable(pair.mask_name)} is {mask[1]}x{mask[0]} pixels and its image {image[1]}x{image[0]}"
        f" ({printable(pair.image_name)})"
    )
