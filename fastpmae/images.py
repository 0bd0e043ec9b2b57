"""From a file's bytes to the image that a .beton stores: upright, RGB, 8 bits, JPEG or raw.

A plain JPEG keeps its bytes. Everything else is decoded by Pillow and encoded anew, without chroma
subsampling. Colour profiles are not applied: pixel values are taken as they stand, as every ImageNet loader
does, and an image that is encoded anew loses its profile.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastpmae.errors import BetonError, UserError
from fastpmae_loaders.beton import JPG, PIXEL_LIMIT, RAW
from fastpmae_loaders.jpeg import JPEG_MAX_SIDE, jpeg_header, turbo_available, turbo_decode

RAW_MAX_SIDE = 65535  # the metadata keep sides in 16 bits
# Everything photographs come in. Pillow reads more, some of it (EPS) by running another program on the file.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
_BASELINE_TO_PROGRESSIVE = (0xC0, 0xC1, 0xC2)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # Pillow may be built without some


class ImageError(UserError):
    """Why a file is not stored, as the end of a sentence about the file."""


@dataclass(frozen=True)
class ImageSettings:
    """How images are stored.

    max_size: the longer side is brought down to so many pixels (None: images keep their size). quality: of
    JPEGs that are encoded here. mode: "jpg", "raw", or "proportion": a share `proportion` of the samples as
    JPEG, drawn by (seed, place in the source). max_pixels: a source image of more pixels is refused.
    """

    max_size: int | None = None
    quality: int = 95
    mode: Literal["jpg", "raw", "proportion"] = "jpg"
    proportion: float = 0.5
    seed: int = 0
    max_pixels: int = PIXEL_LIMIT

    def __post_init__(self):
        if self.max_size is not None and not 1 <= self.max_size <= JPEG_MAX_SIDE:
            raise UserError(f"--max-size is {self.max_size}; it must lie between 1 and {JPEG_MAX_SIDE} pixels")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}; it must lie between 1 and 100")
        if self.mode not in ("jpg", "raw", "proportion"):
            raise UserError(f"--mode is {self.mode!r}; it must be jpg, raw or proportion")
        if not 0 <= self.proportion <= 1:
            raise UserError(f"--proportion is {self.proportion}; it must lie between 0 and 1")
        if self.max_pixels < 1:
            raise UserError(f"--max-pixels is {self.max_pixels}; it must be positive")

    def as_jpeg(self, place: int) -> bool:
        """Whether the image at this place in the source is stored as JPEG."""
        if self.mode != "proportion":
            return self.mode == "jpg"
        digest = hashlib.blake2b(f"{self.seed}/{place}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.proportion * 2**64


@dataclass(frozen=True)
class StoredImage:
    """What goes into the file. `kept`: the bytes are the source's own."""

    mode: int
    width: int
    height: int
    data: bytes
    kept: bool


def store(data: bytes, settings: ImageSettings, place: int = 0) -> StoredImage:
    """The stored form of an image file's bytes; `place` is its place in the source.

    Raises ImageError with the reason when the bytes are no sound picture within the limits.
    """
    if not data:
        raise ImageError("the file is empty")
    as_jpeg = settings.as_jpeg(place)
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        image, orientation = _load(data, settings.max_pixels)
    if as_jpeg and orientation == 1 and not complaints and _can_keep(data, image, settings):
        return StoredImage(JPG, image.width, image.height, data, kept=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = upright_rgb(image, orientation)
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(f"its colours ({image.mode}) cannot be converted: {_short(error)}") from None
        image = _within(image, settings.max_size)
    _check_storable(image, JPEG_MAX_SIDE if as_jpeg else RAW_MAX_SIDE)
    if not as_jpeg:
        return StoredImage(RAW, image.width, image.height, image.tobytes(), kept=False)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=settings.quality, subsampling=0)
    return StoredImage(JPG, image.width, image.height, buffer.getvalue(), kept=False)


def _load(data: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    """The first frame, fully decoded, and its EXIF orientation (1 to 8)."""
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
        if image.width * image.height > max_pixels:
            raise ImageError(
                f"{image.width}x{image.height} pixels are more than --max-pixels {max_pixels:,} "
                "(a decompression bomb, or a very large picture)"
            )
        image.load()
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise ImageError("more pixels than Pillow allows (a decompression bomb?)") from None
    except MemoryError:
        raise ImageError("decoding it takes more memory than there is") from None
    except Exception as error:  # Pillow's decoders raise nearly every kind there is on damaged data
        raise ImageError(f"does not decode: {_short(error)}") from None
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF says nothing about the pixels
        orientation = 1
    return image, orientation if orientation in _UPRIGHT else 1


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
    plain = header.frame in _BASELINE_TO_PROGRESSIVE and header.precision == 8 and header.is_ycbcr
    if not plain or (header.width, header.height) != image.size:
        return False
    # libjpeg-turbo tells of damage that Pillow passes over in silence
    return not turbo_available() or turbo_decode(data, *image.size) is not None


def upright_rgb(image: Image.Image, orientation: int = 1) -> Image.Image:
    """A decoded image turned by its EXIF orientation, in RGB, transparency composited on white."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 or more bits scaled to 8 (Pillow's own convert clips some of these at 255)."""
    values = np.asarray(image).astype(np.float64)
    key = image.info.get("transparency")
    clear = values == key if isinstance(key, int) else None
    low, high = float(values.min()), float(values.max())
    if not np.isfinite((low, high)).all() or low < 0:
        raise ImageError(f"its gray values run from {low:g} to {high:g}, which is no picture")
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        top = 65535.0
    elif image.mode == "F" and high <= 1:
        top = 1.0
    elif high <= 255:
        top = 255.0
    elif high <= 65535:
        top = 65535.0
    else:
        raise ImageError(f"its gray values reach {high:g}, and nothing says which of them is white")
    gray = Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
    if clear is not None:
        gray.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return gray


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


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
