"""Memory that one worker thread works in, allocated once for the largest image of a file."""

from typing import NamedTuple

import numpy as np

from .beton import Beton
from .colour import RADIUS
from .plan import CHOICES, FACTORS
from .resize import SLACK, table_width
from .settings import ViewSettings


class Scratch(NamedTuple):
    """Buffers of one thread; their contents mean nothing between two samples."""

    decoded: np.ndarray
    rows: np.ndarray
    stride: int
    edge: np.ndarray
    first_x: np.ndarray
    first_y: np.ndarray
    weights_x: np.ndarray
    weights_y: np.ndarray
    table: np.ndarray
    mixed: np.ndarray
    strip: np.ndarray
    taps: np.ndarray
    upper: np.ndarray
    lower: np.ndarray
    factors: np.ndarray
    choices: np.ndarray
    order: np.ndarray


def make_scratch(height: int, width: int, side: int, patches: int = 1, decoded_bytes: int = 0) -> Scratch:
    """Scratch for images up to `height` by `width` pixels, of `decoded_bytes` at most, and views of `side`.

    The operating system hands out a page only when it is touched, so an image that never comes costs nothing.
    """
    taps_x = table_width(width, side)
    taps_y = table_width(height, side)
    stride = 3 * side + SLACK
    return Scratch(
        decoded=np.empty(decoded_bytes + SLACK, np.uint8),
        # rows after the first pass: narrow and tall, or, vertical first, wide and short
        rows=np.empty(max((height + taps_y + 4) * stride, side * (3 * (width + taps_x) + SLACK)) + SLACK, np.uint8),
        stride=stride,
        edge=np.empty((4, 3 * (width + taps_x) + SLACK), np.uint8),
        first_x=np.zeros(side, np.int32),
        first_y=np.zeros(side, np.int32),
        weights_x=np.zeros((side, taps_x), np.int16),
        weights_y=np.zeros((side, taps_y), np.int16),
        table=np.zeros((side, 4 * taps_x), np.int16),
        mixed=np.empty((side + 4) * stride + SLACK, np.uint8),
        strip=np.empty(side + 2 * SLACK, np.uint8),
        taps=np.zeros((RADIUS + 1, 2), np.int16),
        upper=np.zeros(RADIUS + 1, np.int64),
        lower=np.zeros(RADIUS + 1, np.int64),
        factors=np.zeros(FACTORS, np.float64),
        choices=np.zeros(CHOICES, np.uint8),
        order=np.zeros(patches, np.int64),
    )


def scratch_for(beton: Beton, settings: ViewSettings) -> Scratch:
    """Scratch for the largest image of a file."""
    largest = int((beton.width * beton.height).max())
    height, width = int(beton.height.max()), int(beton.width.max())
    return make_scratch(height, width, settings.image_size, settings.patches, 3 * largest)
