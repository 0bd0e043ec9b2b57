"""The FFCV engine: libjpeg-turbo, as FFCV was linked with it, decodes the JPEGs of .beton files.

It is called by us, not by FFCV's `imdecode`, which asks for the fast DCT: pixels that are 0.8/255 darker on average,
for a few per cent of the time. Asked for the accurate one, it makes what Pillow makes, to the bit. FFCV's own Loader
has no part in it: opening a file there builds dictionaries of every sample, and its iterator leaves the consumer
waiting for ever after an exception.

What libjpeg-turbo does not decode without a warning, or with the tables of the image before it, is given to Pillow,
which passes over most warnings and refuses what is cut short.
"""

import importlib.util

from fastpmae_loaders.engines.base import Source
from fastpmae_loaders.engines.decoders import RowDecoder
from fastpmae_loaders.engines.ffcv_package import MISSING
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.sources.jpeg import TurboDecoders, turbo_available


class FFCVEngine(RowDecoder):
    """Decodes with FFCV's libjpeg-turbo. UserError without the package."""

    threads = None

    def __init__(self, source: Source) -> None:
        if importlib.util.find_spec("ffcv") is None:
            raise UserError(MISSING)
        if not turbo_available():
            raise UserError("the package ffcv is installed but was built without libjpeg-turbo's libturbojpeg")
        super().__init__(source, "FFCV", TurboDecoders())
