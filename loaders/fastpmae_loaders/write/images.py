"""From a file's bytes to the image that a .beton stores: upright, RGB, 8 bits, JPEG or raw.

A plain JPEG keeps its bytes. Everything else is decoded by Pillow and encoded anew, without chroma
subsampling. Colour profiles are not applied: pixel values are taken as they stand, as every ImageNet loader
does, and an image that is encoded anew loses its profile.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image

from fastpmae_loaders.errors import BetonError, UserError
from fastpmae_loaders.sources.beton import COEFFICIENTS, JPG, PIXEL_LIMIT, RAW
from fastpmae_loaders.sources.gray import nearly_black
from fastpmae_loaders.sources.jpeg import JPEG_MAX_SIDE, jpeg_header
from fastpmae_loaders.sources.pictures import ImageError, load, one_line, open_image, upright_rgb
from fastpmae_loaders.values import Typed

RAW_MAX_SIDE = 65535  # the metadata keep sides in 16 bits


@dataclass(frozen=True)
class ImageSettings(Typed):
    """How images are stored. The docstring under a field is the help of `fastpmae-write` for its flag."""

    max_size: int | None = None
    """Scale images down whose longer side is above so many pixels (500 suits training at 224); by default they keep
    their size."""
    quality: int = 95
    """Quality of the JPEGs that are encoded here, 1 to 100."""
    mode: Literal["jpg", "raw", "proportion", "coefficients"] = "jpg"
    """Store JPEGs, raw pixels (large and fast to read), JPEGs for a share of the images and raw for the rest, or the
    coefficients of JPEGs in a code of our own: the same pixels, made in half of the time, in some 1.65 times the bytes,
    for these loaders alone."""
    proportion: float = 0.5
    """Share of the images that `--mode proportion` stores as JPEGs."""
    seed: int = 0
    """Decides which images `--mode proportion` stores as JPEGs: drawn by the seed and an image's name in the source, so
    that one file and the parts of a set store an image alike."""
    max_pixels: int = PIXEL_LIMIT
    """Refuse source images of more pixels, or that decode to more than 16 bytes for each of these, as decompression
    bombs."""
    white: float | None = None
    """The value that is white in gray of more than 8 bits where the file does not say, such as 4095 for 12 bits; by
    default 65535."""

    def __post_init__(self):
        super().__post_init__()
        if self.max_size is not None and not 1 <= self.max_size <= JPEG_MAX_SIDE:
            raise UserError(f"--max-size is {self.max_size}; it must lie between 1 and {JPEG_MAX_SIDE} pixels")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}; it must lie between 1 and 100")
        if not 0 <= self.proportion <= 1:
            raise UserError(f"--proportion is {self.proportion}; it must lie between 0 and 1")
        if self.max_pixels < 1:
            raise UserError(f"--max-pixels is {self.max_pixels}; it must be positive")
        if self.white is not None and not 1 <= self.white < 2**32:
            raise UserError(f"--white is {self.white:g}; it must lie between 1 and 2^32, as 4095 of 12 bits")

    def as_jpeg(self, name: bytes) -> bool:
        """Whether the image of this name in the source is stored as JPEG."""
        if self.mode != "proportion":
            return self.mode != "raw"
        digest = hashlib.blake2b(b"%d/%b" % (self.seed, name), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.proportion * 2**64


@dataclass(frozen=True)
class StoredImage:
    """What goes into the file.

    `kept`: the bytes are the source's own, or their coefficients. `better_white`: of gray of more than 8 bits that
    comes out nearly black. `digest`: of `data`, for who asks for it.
    """

    mode: int
    width: int
    height: int
    data: bytes
    kept: bool
    better_white: int | None = None
    digest: bytes = b""


def store(data: bytes, settings: ImageSettings, name: bytes = b"") -> StoredImage:
    """The stored form of an image file's bytes; `name` is what it is called in the source (see `name_in`).

    Raises ImageError with the reason when the bytes are no sound picture within the limits.
    """
    if not data:
        raise ImageError("the file is empty")
    as_jpeg = settings.as_jpeg(name)
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        image, orientation = _load(data, settings.max_pixels)
    if as_jpeg and orientation == 1 and not complaints and _can_keep(data, image, settings):
        return _coded(StoredImage(JPG, image.width, image.height, data, kept=True), settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            decoded, image = image, upright_rgb(image, orientation, settings.white)
            better_white = nearly_black(decoded, settings.white)
            del decoded
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(f"its colours ({image.mode}) cannot be converted: {one_line(error)}") from None
        image = _within(image, settings.max_size)
    _check_storable(image, JPEG_MAX_SIDE if as_jpeg else RAW_MAX_SIDE)
    if not as_jpeg:
        return StoredImage(RAW, image.width, image.height, image.tobytes(), kept=False, better_white=better_white)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=settings.quality, subsampling=0)
    stored = StoredImage(JPG, image.width, image.height, buffer.getvalue(), kept=False, better_white=better_white)
    return _coded(stored, settings)


def _coded(image: StoredImage, settings: ImageSettings) -> StoredImage:
    """A JPEG's coefficients where they are asked for; the JPEG itself where it is none that has a code."""
    if settings.mode != "coefficients":
        return image
    from fastpmae_loaders.native.coefficients import pack_jpeg  # and numba, which no other mode needs

    code = pack_jpeg(image.data, image.height, image.width)
    return image if code is None else replace(image, mode=COEFFICIENTS, data=code)


def _load(data: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    """The first frame, fully decoded, and its EXIF orientation (1 to 8)."""
    image = open_image(io.BytesIO(data))
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{image.width}x{image.height} pixels are more than --max-pixels {max_pixels:,} "
            "(a decompression bomb, or a very large picture)"
        )
    return image, load(image, max(max_pixels, PIXEL_LIMIT))


def _can_keep(data: bytes, image: Image.Image, settings: ImageSettings) -> bool:
    """Whether these are the bytes of a JPEG that any decoder reads as the RGB picture it is."""
    if image.format not in ("JPEG", "MPO") or image.mode != "RGB":
        return False
    longest, limit = max(image.size), min(settings.max_size or JPEG_MAX_SIDE, JPEG_MAX_SIDE)
    if longest > limit or image.width * image.height > PIXEL_LIMIT:
        return False
    try:
        header = jpeg_header(data)
    except BetonError:
        return False
    if not (header.is_ordinary and header.is_ycbcr) or (header.width, header.height) != image.size:
        return False
    from fastpmae_loaders.native.decoder import is_sound  # and numba, which images of other kinds do not need

    sound = is_sound(data, image.height, image.width)
    # of a progressive one Pillow is the only judge here
    return not header.is_baseline if sound is None else sound


def prepare_judge(settings: ImageSettings) -> None:
    """Loads the compiled code that tells whether a JPEG is sound, or compiles it: some seconds, once on a machine.

    For before the first image, whose time is limited: in each process, and first in the one that starts the others, so
    that they find it compiled.
    """
    if settings.mode == "raw":
        return
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    store(buffer.getvalue(), ImageSettings(mode="coefficients" if settings.mode == "coefficients" else "jpg"))


def _within(image: Image.Image, max_size: int | None) -> Image.Image:
    longest = max(image.size)
    if max_size is None or longest <= max_size:
        return image
    size = [max(1, round(side * max_size / longest)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def _check_storable(image: Image.Image, max_side: int) -> None:
    if max(image.size) > max_side or image.width * image.height > PIXEL_LIMIT:
        raise ImageError(
            f"{image.width}x{image.height} pixels do not fit: an image in a .beton has at most {max_side} "
            f"pixels a side and {PIXEL_LIMIT:,} in all; --max-size N scales it down"
        )
