"""What compiled code does with an image that it does not decode itself: it asks Python, by way of an address."""

import ctypes

from fastpmae_loaders.sources.jpeg import TURBO_DECOMPRESS
from fastpmae_loaders.sources.pictures import decode_jpeg


def _ask_python(
    _: int | None, source: int, size: int, target: int, width: int, pitch: int, height: int, *__: int
) -> int:
    """`tjDecompress2` by Pillow: called from compiled code, by address, with the same arguments."""
    try:
        payload = ctypes.string_at(source, size)
        pixels = decode_jpeg(payload, height, width)
        ctypes.memmove(target, pixels.ctypes.data, pixels.nbytes)
    except Exception:  # nothing may escape into compiled code
        return 1
    return 0


second_opinion = TURBO_DECOMPRESS(_ask_python)
