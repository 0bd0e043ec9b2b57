"""From decoded pixels to a sample's rows of a batch: the one function that every engine feeds."""

from typing import NamedTuple

import numpy as np

from . import colour
from .compiled import helper, kernel
from .plan import BLURRED, GRAY, JITTER, ORDER, SIGMA, SOLARISED, draw_plan
from .resize import resize


class Rows(NamedTuple):
    """A batch as compiled code writes it; B rows, side S.

    simple, complex: uint8 [B, 3, S, S]. visible: int64 [B, V]. folds: int64 [B, M]. boxes: int32 [B, 2, 4].
    flips: bool [B, 2]. size: int32 [B, 2], the source's height and width. index: int64 [B], the sample that
    the row shows, or -1 where none could be decoded.
    """

    simple: np.ndarray
    complex: np.ndarray
    visible: np.ndarray
    folds: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray
    size: np.ndarray
    index: np.ndarray


@helper
def change_colours(image, factors, choices, recipe, scratch):
    """DINO's order: jitter, grayscale, blur, solarise, each where its coin fell so."""
    if choices[JITTER]:
        for turn in range(4):
            which = choices[ORDER + turn]
            if which == 0:
                colour.brightness(image, factors[0])
            elif which == 1:
                colour.contrast(image, factors[1])
            elif which == 2:
                colour.saturation(image, factors[2])
            else:
                colour.hue(image, factors[3])
    if choices[GRAY]:
        colour.grayscale(image)
    if choices[BLURRED]:
        colour.blur(image, factors[SIGMA], scratch)
    if choices[SOLARISED]:
        colour.solarise(image, recipe.solarise_threshold)


@helper
def _centre(size, side):
    """First place of the middle `side` of `size`; half a pixel goes to the even side, as Python rounds."""
    place = (size - side) // 2
    return place + (size - side) % 2 * (place % 2)


@kernel
def fill_row(row, index, pixels, height, width, seed, epoch, recipe, shorter, scratch, out):
    """Sample `index`, whose uint8 [height, width, 3] lie at address `pixels`, as one row of a batch.

    With `shorter` above 0 that is the evaluation view: the shorter side resized to it, then the centre.
    Otherwise it is both views, mask and plan.
    """
    out.index[row] = index
    out.size[row, 0] = height
    out.size[row, 1] = width
    boxes, flips = out.boxes[row], out.flips[row]
    side = out.simple.shape[2]
    full_height, full_width = side, side
    views = 2
    if shorter > 0:
        views = 1
        full_height = max(shorter, shorter * height // width)
        full_width = max(shorter, shorter * width // height)
        boxes[0, 0] = 0
        boxes[0, 1] = 0
        boxes[0, 2] = height
        boxes[0, 3] = width
        flips[0] = False
    else:
        factors, choices, order = scratch.factors, scratch.choices, scratch.order
        draw_plan(seed, epoch, index, height, width, recipe, boxes, flips, factors, choices, order)
        visible, folds = out.visible[row], out.folds[row]
        for i in range(visible.shape[0]):
            visible[i] = order[i]
        for i in range(folds.shape[0]):
            folds[i] = order[visible.shape[0] + i]
    down, across = _centre(full_height, side), _centre(full_width, side)
    # one call for both views, so that it is compiled once
    for view in range(views):
        target = out.simple[row] if view == 0 else out.complex[row]
        resize(pixels, height, width, boxes[view], full_height, full_width, down, across, flips[view], target, scratch)
    if shorter == 0:
        change_colours(out.complex[row], scratch.factors, scratch.choices, recipe, scratch)
