"""The engine without a C library: JPEGs decoded by compiled code of our own, as far as a sample's views show them.

What is not an ordinary JPEG, or not sound, is given to Pillow. The pictures are the torch engine's, to the bit.
"""

from fastpmae_loaders.engines.base import Source
from fastpmae_loaders.engines.decoders import RowDecoder


class NativeEngine(RowDecoder):
    """Decodes with our own decoder alone."""

    threads = None

    def __init__(self, source: Source) -> None:
        super().__init__(source, "native")
