"""Pictures of the objects of test images, and of what a detector finds there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from fastpmae.evaluate.dense.average_precision import Found
from fastpmae.evaluate.dense.labelled import Objects, Pixels
from fastpmae_loaders.files import atomic_write
from fastpmae_loaders.printable import printable

MISSED, EXTRA, RIGHT = (0.9, 0.1, 0.1), (1.0, 0.6, 0.0), (0.1, 0.75, 0.2)
"""Colours of boxes: of an object that was not found, of what is none, and of what is right."""
SHOWN_SCORE = 0.3
"""Boxes of a lower score are not drawn."""


def draw_boxes(
    path: Path, rows: Sequence[tuple[str, Pixels, Objects, Found]], names: Sequence[str], title: str
) -> None:
    """A row for each image: its objects (red where they were missed), and what was found (orange where it is none).

    Raises:
        UserError: when the file cannot be written.
    """
    pictures: list[Any] = []
    for words, pixels, objects, found in rows:
        kept = [place for place, score in enumerate(found.scores) if score >= SHOWN_SCORE]
        hit, right = matched(objects, found, kept)
        true = [(box, names[label - 1], RIGHT if ok else MISSED) for box, label, ok in
                zip(objects.boxes, objects.labels, hit, strict=True)]  # fmt: skip
        ours = [
            (found.boxes[place], f"{names[found.labels[place] - 1]} {found.scores[place]:.2f}", RIGHT if ok else EXTRA)
            for place, ok in zip(kept, right, strict=True)
        ]
        pictures.append((words, [(pixels / 255, true), (pixels / 255, ours)]))
    legend = [("right", RIGHT), ("missed", MISSED), ("no such object", EXTRA)]
    _draw(path, pictures, ["objects", f"found (score {SHOWN_SCORE} or more)"], legend, title)


def matched(
    objects: Objects, found: Found, kept: Sequence[int]
) -> tuple[Bool[np.ndarray, " objects"], Bool[np.ndarray, " kept"]]:
    """Which objects were found, and which of the kept detections are right: of the class, at an IoU of 0.5 or more,
    the surest first, each object once."""
    hit, right = np.zeros(len(objects), bool), np.zeros(len(kept), bool)
    for place, number in enumerate(kept):
        free = [
            other for other in range(len(objects)) if not hit[other] and objects.labels[other] == found.labels[number]
        ]
        overlaps = [_iou(objects.boxes[other], found.boxes[number]) for other in free]
        if overlaps and max(overlaps) >= 0.5:
            hit[free[int(np.argmax(overlaps))]] = right[place] = True
    return hit, right


def _iou(one: Float[np.ndarray, " 4"], other: Float[np.ndarray, " 4"]) -> float:
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    common = float(sides.clip(0).prod())
    return common / (float((one[2:] - one[:2]).prod()) + float((other[2:] - other[:2]).prod()) - common)


def _draw(
    path: Path,
    rows: Sequence[tuple[str, list[tuple[Any, list[Any]]]]],
    headings: Sequence[str],
    legend: Sequence[Any],
    title: str,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    from fastpmae.plotting import drawable, save_picture

    figure = Figure(figsize=(3.4 * len(headings), 2.8 * max(1, len(rows)) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(max(1, len(rows)), len(headings), squeeze=False)
    texts = [figure.suptitle(drawable(printable(title)), fontsize=10)]
    for axes in grid.flat:
        axes.set_axis_off()
    for line, (words, pictures) in zip(grid, rows, strict=False):
        for axes, heading, (pixels, boxes) in zip(line, headings, pictures, strict=True):
            axes.imshow(pixels, interpolation="nearest")
            for (left, top, right, bottom), label, colour in boxes:
                axes.add_patch(
                    Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.2)
                )
                texts.append(axes.text(left, top - 2, drawable(printable(label))[:24], fontsize=5, color=colour))
            texts.append(axes.set_title(heading if line is grid[0] else "", fontsize=8))
        texts.append(
            line[0].text(0, 1.02, drawable(printable(words)), transform=line[0].transAxes, fontsize=6, va="bottom")
        )
    handles = [Patch(color=tuple(colour), label=drawable(printable(name))[:24]) for name, colour in legend]
    if handles:
        shown = figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize=7)
        texts += shown.get_texts()
    for text in texts:
        text.set_parse_math(False)
    with atomic_write(path) as beside:
        save_picture(figure, beside, dpi=130)
