"""Masks of single objects as COCO writes them: polygons, counts of pixels in runs, and those counts packed as text."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from fastpmae.evaluate.dense.extra import imported
from fastpmae_loaders.errors import UserError

MOST_POINTS = 1_000_000
_FAR = 1e6  # pixels


@dataclass(frozen=True)
class Outline:
    """An object's mask.

    Attributes:
        polygons: x and y in turn, of each; their union is meant.
        runs: or how many pixels are outside, inside, outside, ... column by column.
        size: (height, width) that belongs to the runs.
    """

    polygons: tuple[tuple[float, ...], ...] = ()
    runs: tuple[int, ...] = ()
    size: tuple[int, int] = (0, 0)


def coco_outline(said: Any) -> Outline | None:
    """What stands under `segmentation` in COCO's JSON; None where there is no mask.

    Raises:
        UserError: with the end of a sentence, for what is no polygon and no runs that fill an image.
    """
    if said is None or said == []:
        return None
    if isinstance(said, list):
        return Outline(polygons=tuple(_polygon(points) for points in said))
    if not isinstance(said, dict) or not isinstance(said.get("size"), list) or len(said["size"]) != 2:
        raise UserError("has a segmentation that is neither polygons nor runs with a size")
    height, width = said["size"]
    counts = said.get("counts")
    if isinstance(counts, str):
        counts = unpacked(counts)
    runs = counts if isinstance(counts, list) and all(isinstance(run, int) and run >= 0 for run in counts) else []
    if not isinstance(height, int) or not isinstance(width, int) or sum(runs) != height * width or not runs:
        raise UserError(f"has runs that do not fill the {said['size']} of its segmentation")
    return Outline(runs=tuple(runs), size=(height, width))


def _polygon(points: Any) -> tuple[float, ...]:
    fits = isinstance(points, list) and 6 <= len(points) <= MOST_POINTS and len(points) % 2 == 0
    if not fits or not all(isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < _FAR for x in points):
        raise UserError("has a polygon that is no list of three points or more, x and y in turn")
    return tuple(map(float, points))


def unpacked(text: str) -> list[int]:
    """COCO's packed runs: 5 bits a character with a sign, and from the third run on the difference to that two before.

    Raises:
        UserError: with the end of a sentence, for what is no such text.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise UserError("has packed runs that are damaged")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise UserError("has packed runs that are cut off")
    return runs


def outline_of(outline: Outline, height: int, width: int, shares: bool = False) -> Bool[np.ndarray, "height width"]:
    """The pixels of an object.

    Polygons are drawn as COCO draws them, by faster-coco-eval.

    Args:
        shares: a polygon's numbers are shares of the sides.

    Raises:
        UserError: where runs belong to an image of another size, or faster-coco-eval is not installed.
    """
    if outline.runs:
        if outline.size != (height, width):
            raise UserError(
                f"runs of {outline.size[1]}x{outline.size[0]} pixels belong to no image of {width}x{height}"
            )
        inside = np.arange(len(outline.runs)) % 2 == 1
        return np.repeat(inside, outline.runs).reshape(width, height).T
    scale = np.array([width, height]) if shares else np.ones(2)
    polygons = [np.array(points).reshape(-1, 2) * scale for points in outline.polygons]
    mask = imported("faster_coco_eval.core.mask", "faster-coco-eval")
    # what lies far outside would be walked along step by step
    near = [points.clip((-width, -height), (2 * width, 2 * height)).ravel().tolist() for points in polygons]
    packed: Any = mask.frPyObjects(near, height, width)
    return np.asarray(mask.decode(mask.merge(packed))).astype(bool)
