"""Any image file by Pillow: found out what it is, decoded, turned upright, made 8-bit RGB.

Colour profiles are not applied: pixel values are taken as they stand, as every ImageNet loader does.
"""

import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from fastpmae_loaders.errors import BetonError, UserError
from fastpmae_loaders.printable import on_one_line
from fastpmae_loaders.sources.beton import JPG, PIXEL_LIMIT
from fastpmae_loaders.sources.gray import bands, check_deep, eight_bits, is_deep
from fastpmae_loaders.sources.jpeg import JPEG_MAX_SIDE, check_scans, jpeg_header
from fastpmae_loaders.sources.limits import BYTES_A_PIXEL, decoding_bytes

ENCODED = 2
"""Storage mode of an image that is neither a plain JPEG (0) nor raw pixels (1)."""

# Everything photographs come in. Pillow reads more, some of it (EPS) by running another program on the file.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF", "JXL")
# Formats that a package of their own reads, which tells Pillow once it is imported: how a file begins, what to install
_BY_PACKAGES = (
    (
        re.compile(rb"....ftyp(?:hei[cxms]|hev[cxms]|heif|mif1|msf1)", re.DOTALL),
        *("HEIC", "pillow_heif", "pillow-heif", "register_heif_opener"),
    ),
    (
        re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", re.DOTALL),
        *("JPEG XL", "pillow_jxl", "pillow-jxl-plugin", None),
    ),
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_ORIENTATION = 0x0112
_HEAD = 1 << 14  # the frame header of nearly every JPEG lies in it
_TAIL = 1 << 16
# of the threads that look at files one decodes at a time: the largest image takes gigabytes
_whole = threading.Lock()


class ImageError(UserError):
    """Why a file is not taken, as the end of a sentence about the file."""


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    for _, _, module, _, register in _BY_PACKAGES:
        with suppress(ImportError):
            package = import_module(module)
            if register is not None:
                getattr(package, register)()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # Pillow may be built without some


@contextmanager
def _reasons() -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise ImageError("more pixels than Pillow allows (a decompression bomb?)") from None
    except MemoryError:
        raise ImageError("decoding it takes more memory than there is") from None
    except Exception as error:  # Pillow's decoders raise nearly every kind there is on damaged data
        raise ImageError(f"does not decode: {one_line(error)}") from None


def open_image(file: IO[bytes]) -> Image.Image:
    """The image of a file, its pixels not yet decoded. ImageError where there is none."""
    with _reasons():
        try:
            return Image.open(file, formats=_formats())
        except UnidentifiedImageError:
            file.seek(0)
            head = file.read(32)
    for begins, name, _, package, _ in _BY_PACKAGES:
        if begins.match(head):
            raise ImageError(f"is {name}, which Pillow reads with the package {package} alone: pip install {package}")
    raise ImageError("not an image that Pillow can read")


def load(image: Image.Image, max_pixels: int = PIXEL_LIMIT) -> int:
    """Decodes the first frame in full; its EXIF orientation, 1 to 8.

    ImageError where it is damaged, and, before anything is decoded, where that would take more than BYTES_A_PIXEL bytes
    of memory for each of `max_pixels`, or is a JPEG of thousands of scans.
    """
    with _reasons():
        needed = decoding_bytes(image, sideways=_may_be_turned(image))
        if needed > BYTES_A_PIXEL * max_pixels:
            raise ImageError(
                f"{image.width}x{image.height} pixels of {image.format}, {image.mode}, would take "
                f"{needed / 2**30:.1f} GiB of memory to decode (a decompression bomb?)"
            )
        _check_scans(image)
        image.load()
    return orientation_of(image)


def _may_be_turned(image: Image.Image) -> bool:
    """Whether something beside the pixels may say so; what stands behind them is not looked for."""
    return any("exif" in str(key).lower() or "xmp" in str(key).lower() for key in image.info)


def _check_scans(image: Image.Image) -> None:
    """ImageError where an image that is not decoded yet is a JPEG of more scans than is sensible."""
    if image.format in ("JPEG", "MPO"):
        file: Any = image.fp  # pyright: ignore[reportAttributeAccessIssue]
        at = file.tell()
        file.seek(0)
        try:
            check_scans(file.read())
        except BetonError as error:
            raise ImageError(str(error)) from None
        file.seek(at)


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. Of a PNG this decodes the pixels, since it may be written behind them."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF says nothing about the pixels
        orientation = 1
    return orientation if orientation in _UPRIGHT else 1


def upright_rgb(image: Image.Image, orientation: int = 1, white: float | None = None) -> Image.Image:
    """A decoded image turned by its EXIF orientation, in RGB, transparency composited on white.

    `white`: the value that is white in gray of more than 8 bits, where the file does not say (see `gray.white_of`).
    ImageError where such gray makes no picture.
    """
    if image.mode != "RGB" or image.has_transparency_data:
        image = _rgb(image, white)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _rgb(image: Image.Image, white: float | None) -> Image.Image:
    try:
        white = check_deep(image, white) if is_deep(image) else None
    except UserError as error:
        raise ImageError(str(error)) from None
    found = Image.new("RGB", image.size)
    for top, band in bands(image):
        part = band if white is None else eight_bits(band, white)
        if part.has_transparency_data:
            part = part.convert("RGBA")
            part = Image.alpha_composite(Image.new("RGBA", part.size, "white"), part)
        found.paste(part.convert("RGB"), (0, top))
    return found


def decode_upright(file: IO[bytes], height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]. ImageError, before anything is decoded, where the file is of another size."""
    image = open_image(file)
    if image.size not in ((width, height), (height, width)):
        raise ImageError(f"is {image.width}x{image.height} pixels and was {width}x{height} when it was listed")
    orientation = load(image)
    with _reasons():
        pixels = np.ascontiguousarray(upright_rgb(image, orientation))
    if pixels.shape != (height, width, 3):
        raise ImageError("is turned otherwise than when it was listed")
    return pixels


def decode_jpeg(payload: bytes, height: int, width: int) -> np.ndarray:
    """A JPEG that lies upright and is gray or in colours, as uint8 [height, width, 3]. ImageError otherwise.

    What libjpeg calls a warning does not matter here, only whether there are pixels to the end. Nor does Pillow warn:
    the size is asked for by name, where `Image.open` would warn of more than 89 million pixels.
    """
    try:
        opened = JpegImageFile(io.BytesIO(payload))
    except SyntaxError:
        raise ImageError("not an image that Pillow can read") from None
    with _reasons(), opened as image:
        _check_scans(image)
        if image.size != (width, height):
            raise ImageError(f"the JPEG is {image.width}x{image.height} pixels, not {width}x{height}")
        if image.mode not in ("RGB", "L"):
            raise ImageError(f"the JPEG's colours are {image.mode}, neither RGB nor gray")
        return np.ascontiguousarray(image.convert("RGB"))


@dataclass(frozen=True)
class Frame:
    """What the headers of an image file say of its pixels.

    Attributes:
        mode: 0 for a JPEG that any decoder reads as the upright picture it is, else 2.
        height, width: of the upright image.
        orientation: that turns it upright, 1 to 8; of a TIFF, which Pillow turns itself, 1.
    """

    mode: int
    height: int
    width: int
    orientation: int = 1

    @property
    def stored(self) -> tuple[int, int]:
        """(height, width) as they lie in the file."""
        return (self.width, self.height) if self.orientation in _SIDEWAYS else (self.height, self.width)


def look(file: IO[bytes]) -> tuple[int, int, int]:
    """(storage mode, height, width) of an image file as it will be decoded: upright. ImageError as `frame_of`."""
    frame = frame_of(file)
    return frame.mode, frame.height, frame.width


def frame_of(file: IO[bytes]) -> Frame:
    """Reads headers alone. ImageError says what is wrong, also of more pixels than a .beton may hold."""
    head = file.read(_HEAD)
    if not head:
        raise ImageError("the file is empty")
    mode = ENCODED
    if head.startswith(b"\xff\xd8\xff"):
        mode, size, turned = _look_at_jpeg(file, head)
        if mode == JPG and not turned:
            return Frame(mode, *_within_limits(*size))
    file.seek(0)
    image = open_image(file)
    if image.format == "PNG":
        with _whole:
            orientation = load(image) if _png_says_more(image, file) else 1
    else:
        orientation = orientation_of(image)
    if image.format == "TIFF" and orientation > 1:
        # Pillow turns a TIFF itself while it decodes, and its size before that depends on Pillow's version
        with _whole:
            orientation = load(image)
    width, height = image.size
    if orientation in _SIDEWAYS:
        width, height = height, width
    return Frame(mode if orientation == 1 else ENCODED, *_within_limits(height, width), orientation)


def _look_at_jpeg(file: IO[bytes], head: bytes) -> tuple[int, tuple[int, int], bool]:
    """(mode, (height, width), may it be turned) by the JPEG's own header; mode 2 leaves the rest to Pillow."""
    try:
        try:
            header = jpeg_header(head)
        except BetonError:
            # a thumbnail or a colour profile may come first
            file.seek(0)
            header = jpeg_header(file.read())
    except BetonError:
        return ENCODED, (0, 0), True
    plain = header.is_ordinary and (len(header.component_ids) == 1 or header.is_ycbcr)
    return JPG if plain else ENCODED, (header.height, header.width), header.has_metadata


def _png_says_more(image: Image.Image, file: IO[bytes]) -> bool:
    """Whether EXIF or XMP stands anywhere in a PNG; behind the pixels it is looked for in the last 64 kB."""
    if image.info.keys() & {"exif", "Raw profile type exif", "Raw profile type APP1", "XML:com.adobe.xmp", "xmp"}:
        return True
    at = file.tell()
    file.seek(0, 2)
    file.seek(max(0, file.tell() - _TAIL))
    tail = file.read()
    file.seek(at)
    return b"eXIf" in tail or b"Raw profile type" in tail or b"com.adobe.xmp" in tail


def _within_limits(height: int, width: int) -> tuple[int, int]:
    if max(height, width) > JPEG_MAX_SIDE or height * width > PIXEL_LIMIT:
        raise ImageError(
            f"{width}x{height} pixels: at most {JPEG_MAX_SIDE:,} a side and {PIXEL_LIMIT:,} in all are taken"
        )
    if min(height, width) < 1:
        raise ImageError(f"has {width}x{height} pixels")
    return height, width


def one_line(error: Exception) -> str:
    """What an exception says, which may be a stranger's words, in one printable line of about 200 characters."""
    text = on_one_line(str(error)) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
