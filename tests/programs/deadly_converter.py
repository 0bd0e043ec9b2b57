"""A converter of images that ends its process at one of them, by the signal of a decoder that crashes."""

import os
import signal
from collections.abc import Callable

from fastpmae_loaders.write.images import ImageSettings, StoredImage
from fastpmae_loaders.write.parts import hashing_converter
from fastpmae_loaders.write.sources import Item


def deadly(settings: ImageSettings) -> Callable[[int, Item], StoredImage]:
    converted = hashing_converter(settings)

    def ended(place: int, item: Item) -> StoredImage:
        if item.path.endswith("0007.jpg"):
            os.kill(os.getpid(), signal.SIGSEGV)
        return converted(place, item)

    return ended
