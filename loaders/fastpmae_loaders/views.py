"""From decoded pixels to a sample's rows of a batch: the one function that every engine feeds."""

from typing import NamedTuple

import numpy as np
from numba import njit

from . import colour
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


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True)
def fill_pair(row, index, pixels, height, width, seed, epoch, recipe, scratch, out):
    """Both views, mask and plan of sample `index`, whose uint8 [height, width, 3] lie at address `pixels`."""
    boxes, flips = out.boxes[row], out.flips[row]
    draw_plan(seed, epoch, index, height, width, recipe, boxes, flips, scratch.factors, scratch.choices, scratch.order)
    visible, folds = out.visible[row], out.folds[row]
    for i in range(visible.shape[0]):
        visible[i] = scratch.order[i]
    for i in range(folds.shape[0]):
        folds[i] = scratch.order[visible.shape[0] + i]
    side = recipe.side
    resize(pixels, height, width, boxes[0], side, side, 0, 0, flips[0], out.simple[row], scratch)
    resize(pixels, height, width, boxes[1], side, side, 0, 0, flips[1], out.complex[row], scratch)
    change_colours(out.complex[row], scratch.factors, scratch.choices, recipe, scratch)


@njit(cache=True, nogil=True)
def fill_plain(row, pixels, height, width, shorter, scratch, out):
    """The evaluation view: the shorter side resized to `shorter`, then the centre."""
    side = out.simple.shape[2]
    if height <= width:
        full_height, full_width = shorter, shorter * width // height
    else:
        full_height, full_width = shorter * height // width, shorter
    # half a pixel goes to the even side, as Python rounds
    down = (full_height - side) // 2
    down += (full_height - side) % 2 * (down % 2)
    across = (full_width - side) // 2
    across += (full_width - side) % 2 * (across % 2)
    box = out.boxes[row, 0]
    box[0] = 0
    box[1] = 0
    box[2] = height
    box[3] = width
    resize(pixels, height, width, box, full_height, full_width, down, across, False, out.simple[row], scratch)


@njit(cache=True, nogil=True)
def fill_row(row, index, pixels, height, width, seed, epoch, recipe, shorter, scratch, out):
    """One row of a batch: the pair of views, or with `shorter` above 0 the evaluation view of that size."""
    out.index[row] = index
    out.size[row, 0] = height
    out.size[row, 1] = width
    if shorter > 0:
        fill_plain(row, pixels, height, width, shorter, scratch, out)
    else:
        fill_pair(row, index, pixels, height, width, seed, epoch, recipe, scratch, out)
