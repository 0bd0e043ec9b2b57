"""Pictures of the objects of images, and of what a detector finds there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpmae.evaluate.dense.average_precision import Found
from fastpmae.evaluate.dense.labelled import Objects, Pixels
from fastpmae.evaluate.dense.matches import SHOWN_SCORE, matches_of
from fastpmae_loaders.printable import printable

MISSED, EXTRA, RIGHT, CROWD = (0.9, 0.1, 0.1), (1.0, 0.6, 0.0), (0.1, 0.75, 0.2), (0.6, 0.6, 0.6)
"""Colours of boxes: of an object that was not found, of what is none, of what is right, and of crowds."""
Colour = tuple[float, float, float]
Drawn = tuple[Any, str, Colour]
"""A box, the words at it, and its colour."""


@dataclass(frozen=True)
class Sight:
    """An image with what a detector finds in it.

    Attributes:
        objects: what is there; None where nobody knows.
    """

    title: str
    image: Pixels
    found: Found
    objects: Objects | None = None


def draw_boxes(path: Path, sights: Sequence[Sight], names: Sequence[str], title: str) -> None:
    """A row for each image: its objects where they are known (red where they were missed), and what was found (orange
    where it is none).

    Raises:
        UserError: when the file cannot be written.
    """
    legend = [("right", RIGHT), ("missed", MISSED), ("no such object", EXTRA), ("crowd", CROWD)]
    headings = ["objects", f"found (score {SHOWN_SCORE} or more)"]
    if all(sight.objects is None for sight in sights):
        headings, legend = headings[1:], []
    rows = [(sight.title, sight.image, _boxes(sight, names)[-len(headings) :]) for sight in sights]
    _draw(path, rows, headings, legend, title)


def _boxes(sight: Sight, names: Sequence[str]) -> list[list[Drawn]]:
    """The boxes of the objects, and those of what was found."""
    found, objects = sight.found, sight.objects
    if objects is None:
        shown = [place for place, score in enumerate(found.scores) if score >= SHOWN_SCORE]
        return [[], [(found.boxes[place], _words(found, place, names), RIGHT) for place in shown]]
    matches = matches_of(objects, found)
    true: list[Drawn] = [
        (box, names[int(label) - 1], CROWD if crowd else RIGHT if hit else MISSED)
        for box, label, crowd, hit in zip(objects.boxes, objects.labels, matches.crowd, matches.found, strict=True)
    ]
    ours: list[Drawn] = [
        (found.boxes[place], _words(found, place, names), RIGHT if right else CROWD if crowd else EXTRA)
        for place, right, crowd in zip(matches.shown.tolist(), matches.right, matches.in_crowd, strict=True)
    ]
    return [true, ours]


def _words(found: Found, place: int, names: Sequence[str]) -> str:
    return f"{names[found.labels[place] - 1][:20]} {found.scores[place]:.2f}"


def _draw(
    path: Path,
    rows: Sequence[tuple[str, Pixels, list[list[Drawn]]]],
    headings: Sequence[str],
    legend: Sequence[tuple[str, Colour]],
    title: str,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    from fastpmae.plotting import drawable, save_picture

    wide = 3.4 if len(headings) > 1 else 6.8
    figure = Figure(figsize=(wide * len(headings), 0.82 * wide * len(rows) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(headings), squeeze=False)
    texts = [figure.suptitle(drawable(printable(title)), fontsize=10)]
    for line, (words, image, pictures) in zip(grid, rows, strict=True):
        for axes, heading, boxes in zip(line, headings, pictures, strict=True):
            axes.set_axis_off()
            axes.imshow(image, interpolation="nearest")
            for (left, top, right, bottom), label, colour in boxes:
                axes.add_patch(
                    Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.2)
                )
                texts.append(axes.text(left, top - 2, drawable(printable(label))[:27], fontsize=5, color=colour))
            texts.append(axes.set_title(heading if line is grid[0] else "", fontsize=8))
        texts.append(
            line[0].text(0, 1.02, drawable(printable(words)), transform=line[0].transAxes, fontsize=6, va="bottom")
        )
    if legend:
        handles = [Patch(color=colour, label=name) for name, colour in legend]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=7)
    for text in texts:
        text.set_parse_math(False)
    save_picture(figure, path, dpi=130)
