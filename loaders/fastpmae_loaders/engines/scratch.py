"""Memory that one worker thread works in, allocated once for the largest image of a file."""

from typing import NamedTuple

import numpy as np

from fastpmae_loaders.pixels.bilinear import most_taps
from fastpmae_loaders.pixels.colour import RADIUS
from fastpmae_loaders.pixels.resize import table_width
from fastpmae_loaders.pixels.separable import GROUP, ROOM, SLACK


class Scratch(NamedTuple):
    """Buffers of one thread; their contents mean nothing between two samples."""

    stored: np.ndarray
    decoded: np.ndarray
    rows: np.ndarray
    edge: np.ndarray
    turned: np.ndarray
    mixed: np.ndarray
    spare: np.ndarray
    first_x: np.ndarray
    first_y: np.ndarray
    weights_x: np.ndarray
    weights_y: np.ndarray
    center: np.ndarray
    begin: np.ndarray
    low: np.ndarray
    high: np.ndarray
    left: np.ndarray
    best: np.ndarray
    largest: np.ndarray
    total: np.ndarray
    terms: np.ndarray
    whole: np.ndarray
    taps: np.ndarray
    taps_x: np.ndarray
    taps_y: np.ndarray
    weights_across: np.ndarray
    weights_down: np.ndarray
    sums: np.ndarray
    between: np.ndarray
    order: np.ndarray


def make_scratch(
    height: int,
    width: int,
    side: int,
    patches: int = 1,
    decoded_bytes: int = 0,
    least_side: int = 0,
    stored_bytes: int = 0,
) -> Scratch:
    """Scratch for images up to `height` by `width` pixels, of `decoded_bytes` at most and `stored_bytes` in their file.

    `side` and `least_side` are those of the largest and the smallest view, the same where the latter is 0. The
    operating system hands out a page only when it is touched, so an image that never comes costs nothing.
    """
    taps_x = table_width(width, least_side or side)
    taps_y = table_width(height, least_side or side)
    taps = max(taps_x, taps_y)
    window = 2 * RADIUS + 2  # the blur's
    across = (side + GROUP - 1) // GROUP * GROUP
    return Scratch(
        stored=np.empty(stored_bytes, np.uint8),
        decoded=np.empty(decoded_bytes + SLACK, np.uint8),
        # rows of bytes after a first pass downwards
        rows=np.empty(side * (3 * width + SLACK) + 3 * taps_x + SLACK, np.uint8),
        edge=np.empty((8, max(3 * (width + taps_x), side) + SLACK), np.uint8),
        turned=np.empty(48 * (max(width, side) + max(taps_x, window)) + 768, np.uint8),
        mixed=np.empty((max(taps_y, window) + ROOM) * 3 * 4 * across, np.uint8),
        spare=np.empty(3 * GROUP, np.uint8),
        first_x=np.zeros(side + 4, np.int32),
        first_y=np.zeros(side + 4, np.int32),
        weights_x=np.zeros((side + 4) * max(taps_x, window), np.int16),
        weights_y=np.zeros((side + 4) * taps_y, np.int16),
        center=np.zeros(side, np.float64),
        begin=np.zeros(side, np.float64),
        low=np.zeros(side, np.float64),
        high=np.zeros(side, np.float64),
        left=np.zeros(side, np.int32),
        best=np.zeros(side, np.int32),
        largest=np.zeros(side, np.int32),
        total=np.zeros(side, np.float64),
        terms=np.zeros((taps, side), np.float64),
        whole=np.zeros((taps, side), np.int32),
        taps=np.zeros((RADIUS + 1, 2), np.int16),
        # the bilinear filter's; of zeros would be touched, and most loaders have none
        taps_x=np.empty(side, np.int32),
        taps_y=np.empty(side, np.int32),
        weights_across=np.empty(side * most_taps(width, least_side or side), np.int32),
        weights_down=np.empty(side * most_taps(height, least_side or side), np.int32),
        sums=np.empty(max(3 * width, side), np.int32),
        between=np.empty(3 * side * max(height, width), np.uint8),
        order=np.zeros(patches, np.int64),
    )
