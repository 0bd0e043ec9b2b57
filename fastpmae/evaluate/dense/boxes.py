"""Boxes out of label files, placed on the upright image: turned, cut at its edges, and left out where nothing is left.

A box of zero size ends torchvision's training in its middle, and one that is not a number ends the process: neither
gets further than this module.
"""

import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO

import numpy as np
from jaxtyping import Float

from fastpmae.evaluate.dense.labelled import Boxed, Objects, Outlines, Pixels
from fastpmae.evaluate.dense.masks import opened, turned
from fastpmae.evaluate.dense.outlines import Outline, outline_of
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable, short
from fastpmae_loaders.sources.pictures import Frame, frame_of, load, open_image, upright_rgb

MOST_BOXES = 100_000
"""In an image."""


@dataclass(frozen=True)
class Annotation:
    """An object as a label file has it.

    Attributes:
        box: left, top, right, bottom in pixels, or in shares of the upright image.
        name: of its class.
        outline: its mask in the same pixels.
        area: as the file says it, where it does.
    """

    box: tuple[float, float, float, float]
    name: str
    crowd: bool = False
    outline: Outline | None = None
    area: float | None = None


@dataclass(frozen=True)
class LabelledFile:
    """An image's file with what its label file says.

    Attributes:
        name: as a user would name it.
        open: its file, to read from.
        said_size: (width, height) that the label file gives, or None.
        shares: whether boxes are shares of the image's sides instead of pixels.
    """

    name: str
    open: Callable[[], IO[bytes]]
    annotations: tuple[Annotation, ...]
    said_size: tuple[int, int] | None = None
    shares: bool = False


def turned_boxes(
    boxes: Float[np.ndarray, "boxes 4"], orientation: int, height: int, width: int
) -> Float[np.ndarray, "boxes 4"]:
    """Boxes as an EXIF orientation turns an image that is stored with this height and width."""
    left, top, right, bottom = boxes.T
    if orientation in (2, 3, 7, 8):
        left, right = width - right, width - left
    if orientation in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    sides = (left, top, right, bottom) if orientation < 5 else (top, left, bottom, right)
    return np.stack(sides, axis=1)


def place(file: LabelledFile, labels: Mapping[str, int], outlines: bool) -> tuple[Boxed, Counter[str]]:
    """An image with its boxes on it, and how many were left out for which reason.

    Args:
        labels: by the classes' names 1 ... classes, or 0 for objects that are ignored.
        outlines: whether each box has a mask that is wanted.

    Label files that give the image's size as it is stored mean stored pixels, and so do those that give none; the
    boxes are turned with the image. Shares, as YOLO has them, are of the upright image.

    Raises:
        UserError: where the image is not sound, is of another size than the label file says, or has an object of a
            class that is not known.
    """
    if len(file.annotations) > MOST_BOXES:
        raise UserError(f"{printable(file.name)} has {len(file.annotations):,} boxes, more than {MOST_BOXES:,}")
    frame = _frame(file)
    height, width, orientation = frame.height, frame.width, frame.orientation
    stored = frame.stored[::-1]
    said = file.said_size
    if said is not None and said not in ((width, height), stored):
        raise UserError(
            f"{printable(file.name)} is {width}x{height} pixels, and its label file says {said[0]}x{said[1]}"
        )
    if file.shares or (said == (width, height) != stored):
        orientation = 1
    scale = np.array([width, height, width, height]) if file.shares else np.ones(4)
    left_out: Counter[str] = Counter()
    kept, boxes = [], []
    for annotation in file.annotations:
        box = np.array(annotation.box, np.float64) * scale
        if annotation.name not in labels:
            raise UserError(
                f"{printable(file.name)} has an object {short(annotation.name)!r}, which is none of the "
                f"{max(labels.values())} classes"
            )
        if labels[annotation.name] == 0:
            continue
        if not np.isfinite(box).all() or np.abs(box).max() > 1e7:
            left_out["whose numbers are not finite"] += 1
        elif box[2] <= box[0] or box[3] <= box[1]:
            left_out["of zero size"] += 1
        else:
            box = turned_boxes(box[None], orientation, *stored[::-1])[0]
            box = box.clip(0, [width, height, width, height]).astype(np.float32)
            if box[2] <= box[0] or box[3] <= box[1]:
                left_out["outside their image"] += 1
            else:
                kept.append(annotation)
                boxes.append(box)
    placed = np.array(boxes, np.float32).reshape(-1, 4)
    areas = (placed[:, 2] - placed[:, 0]).astype(np.float64) * (placed[:, 3] - placed[:, 1])
    said_areas = [annotation.area for annotation in kept]
    both = zip(said_areas, areas.tolist(), strict=True)
    areas = [own if own is not None and math.isfinite(own) and own >= 0 else area for own, area in both]
    read_outlines = None
    if outlines:
        drawn_on = (height, width) if orientation == 1 else (stored[1], stored[0])
        drawn = tuple(annotation.outline for annotation in kept)
        for outline in drawn:
            if outline is None or (outline.runs and outline.size != drawn_on):
                raise UserError(f"{printable(file.name)} has a box without a mask, or with one of another size")
        read_outlines = partial(_outlines, drawn, drawn_on, orientation, file.shares)
    objects = Objects(
        placed,
        np.array([labels[annotation.name] for annotation in kept], np.int64),
        np.array([annotation.crowd for annotation in kept], bool),
        np.array(areas, np.float64),
        read_outlines,
    )
    return Boxed(file.name, height, width, objects, partial(_pixels, file, height, width)), left_out


def _outlines(
    drawn: tuple[Outline | None, ...],
    frame: tuple[int, int],
    orientation: int,
    shares: bool,
) -> Outlines:
    """The masks of an image's boxes, upright."""
    found = [turned(outline_of(outline, *frame, shares), orientation) for outline in drawn if outline is not None]
    if not found:
        height, width = frame if orientation < 5 else frame[::-1]
        return np.zeros((0, height, width), bool)
    return np.stack(found)


def _frame(file: LabelledFile) -> Frame:
    with opened(file.open, file.name) as image:
        return frame_of(image)


def _pixels(file: LabelledFile, height: int, width: int) -> Pixels:
    with opened(file.open, file.name) as stored:
        image = open_image(io.BytesIO(stored.read()))
        pixels = np.array(upright_rgb(image, load(image)))
    if pixels.shape != (height, width, 3):
        raise UserError(f"{printable(file.name)} is another image than when it was opened")
    return pixels


def notes_of(left_out: Sequence[Counter[str]]) -> list[str]:
    """What a user should know of boxes that were left out."""
    total = sum(left_out, Counter())
    return [f"warning: {count:,} boxes {reason} are left out" for reason, count in sorted(total.items())]
