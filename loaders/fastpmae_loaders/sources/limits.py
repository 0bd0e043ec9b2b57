"""What decoding an image will cost in memory, as far as its header tells."""

from math import ceil
from typing import Any

from PIL import Image

BYTES_A_PIXEL = 16
"""Of memory that an image may take while it is decoded and made RGB, for each pixel that an image may have at most.

A progressive JPEG in colours takes 14, one of four inks 20.
"""
_BITS_PER_SAMPLE, _SAMPLES, _COMPRESSION, _UNCOMPRESSED = 258, 277, 259, 1
# beside the decoded image: WebP's canvas, the frame before and the bytes of both; planes, pixels and bytes of AVIF and
# HEIF; bytes of what Pillow decodes in Python
_BESIDE = {"WEBP": 12, "AVIF": 12, "HEIF": 12, "PPM": 4, "BMP": 4, "DIB": 4}


def decoding_bytes(image: Image.Image, sideways: bool = False) -> int:
    """Bytes that an image not yet decoded will take at its peak until it is RGB, and turned where it is `sideways`."""
    channels = len(image.getbands())
    decoded = 2 if image.mode.startswith("I;16") else 1 if image.mode in ("1", "L", "P") else 4
    as_rgb = 0 if image.mode == "RGB" and not image.has_transparency_data else 4
    if image.format in ("JPEG", "MPO"):
        beside = 2 * channels  # coefficients, of progressive ones and of those in several scans
    elif image.format == "JPEG2000":
        beside = 6 * channels  # 32 bits a sample, and the tile's own bytes
    elif image.format == "TIFF":
        beside = _tiff_strip(image)
    else:
        beside = _BESIDE.get(image.format or "", 0)
    return image.width * image.height * (decoded + beside + as_rgb + 4 * sideways)


def _tiff_strip(image: Image.Image) -> int:
    """Bytes a pixel of a strip, which may be the whole of a TIFF, as libtiff and Pillow hold it."""
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(_COMPRESSION, _UNCOMPRESSED) == _UNCOMPRESSED:
        return 0
    bits = tags.get(_BITS_PER_SAMPLE, (8,))
    bits = bits if isinstance(bits, tuple) and bits else (8,)
    samples = tags.get(_SAMPLES, 1)
    samples = samples if isinstance(samples, int) else 1
    return 2 * ceil(max(samples, len(bits)) * max(bits) / 8)
