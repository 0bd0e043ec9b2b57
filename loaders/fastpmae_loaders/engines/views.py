"""From decoded pixels to a sample's rows of a batch: the one function that every engine feeds."""

from typing import NamedTuple

import numpy as np

from fastpmae_loaders.jit.compiled import helper, kernel
from fastpmae_loaders.jit.memory import view_at
from fastpmae_loaders.pixels.bilinear import resize_bilinear
from fastpmae_loaders.pixels.colour import change_colours
from fastpmae_loaders.pixels.resize import resize
from fastpmae_loaders.sampling import draw_sample


class Rows(NamedTuple):
    """A batch as compiled code writes it: B rows of n views.

    views: int64 [n], the address of each view's uint8 [B, 3, S, S]. visible: int64 [B, V]. folds: int64 [B, M].
    boxes: int32 [B, n, 4]. flips: bool [B, n]. factors: float64 [B, n, 5]. choices: uint8 [B, n, 9] (see SampleDraws).
    size: int32 [B, 2], the source's height and width. index: int64 [B], the sample that the row shows, or -1
    where none could be decoded.
    """

    views: np.ndarray
    visible: np.ndarray
    folds: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray
    factors: np.ndarray
    choices: np.ndarray
    size: np.ndarray
    index: np.ndarray


@helper
def _centre(size, side):
    """First place of the middle `side` of `size`; half a pixel goes to the even side, as Python rounds."""
    place = (size - side) // 2
    return place + (size - side) % 2 * (place % 2)


@kernel
def draw_row(row, index, height, width, seed, epoch, recipes, scratch, out):
    """All of a sample's row but the pictures: its draws and masks, of an image of height x width pixels."""
    out.index[row] = index
    out.size[row, 0] = height
    out.size[row, 1] = width
    boxes, flips, factors, choices = out.boxes[row], out.flips[row], out.factors[row], out.choices[row]
    order, visible, folds = scratch.order, out.visible[row], out.folds[row]
    draw_sample(seed, epoch, index, height, width, recipes, boxes, flips, factors, choices, order)
    for i in range(visible.shape[0]):
        visible[i] = order[i]
    for i in range(folds.shape[0]):
        folds[i] = order[visible.shape[0] + i]


@kernel
def show_row(row, pixels, height, width, recipes, colours, scratch, out):
    """The views of a row that `draw_row` has drawn; of the pixels only what its boxes cover is looked at."""
    boxes, flips, factors, choices = out.boxes[row], out.flips[row], out.factors[row], out.choices[row]
    for view in range(recipes.shape[0]):
        recipe = recipes[view]
        side = recipe.side
        full_height, full_width = side, side
        if recipe.shorter > 0:
            full_height = max(recipe.shorter, recipe.shorter * height // width)
            full_width = max(recipe.shorter, recipe.shorter * width // height)
        down, across = _centre(full_height, side), _centre(full_width, side)
        target = view_at(out.views[view] + row * 3 * side * side, side)
        box, flip = boxes[view], flips[view]
        if recipe.bilinear > 0:
            resize_bilinear(pixels, height, width, box, full_height, full_width, down, across, flip, target, scratch)
        else:
            resize(pixels, height, width, box, full_height, full_width, down, across, flip, target, scratch)
        if colours:
            change_colours(target, factors[view], choices[view], recipe.solarise_threshold, scratch)
