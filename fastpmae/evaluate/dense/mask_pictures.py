"""Pictures of predicted masks: image, truth, prediction, and what is wrong in red; best, median and worst."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from fastpmae.evaluate.dense.labelled import IGNORE, Mask, Pixels
from fastpmae_loaders.printable import printable

MOST_NAMED = 30
"""Classes in the key below the pictures."""
TALLEST = 2.0
"""A picture's height by its width at most: a taller image is drawn smaller."""
WRONG = np.array([214, 39, 40])
VOID = np.array([40, 40, 40])


@dataclass(frozen=True)
class Overlay:
    """One image with its predicted mask, and its true one where that is known."""

    title: str
    image: Pixels
    predicted: Mask
    truth: Mask | None = None


def best_median_worst(by_image: Float[np.ndarray, " images"]) -> dict[str, int]:
    """The places of these images among those that have a figure, fewer where there are fewer than three; where none has
    one, the first."""
    order = [place for place in np.argsort(by_image, kind="stable").tolist() if np.isfinite(by_image[place])]
    if not order:
        return {"first": 0}
    found: dict[str, int] = {}
    for word, place in (("best", order[-1]), ("worst", order[0]), ("median", order[len(order) // 2])):
        if place not in found.values():
            found[word] = place
    return {word: found[word] for word in ("best", "median", "worst") if word in found}


def class_colours(count: int) -> UInt8[np.ndarray, "classes 3"]:
    """Colours that Pascal VOC has for its classes, made from the bits of their numbers; the first is not black here."""
    colours = np.zeros((count, 3), np.uint8)
    for number in range(count):
        code = number + 1
        for bit in range(7, 0, -1):
            for channel in range(3):
                colours[number, channel] |= (code >> channel & 1) << bit
            code >>= 3
    return colours


def painted(image: Pixels, mask: Mask, colours: UInt8[np.ndarray, "classes 3"]) -> Pixels:
    """A mask's colours laid over the image; void is dark."""
    flat = np.where((mask == IGNORE)[..., None], VOID, colours[np.maximum(mask, 0)])
    return (0.35 * image + 0.65 * flat).astype(np.uint8)


def errors_in_red(image: Pixels, truth: Mask, predicted: Mask) -> Pixels:
    """The image in gray, red where the prediction is wrong, dark where nothing counts."""
    gray = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    wrong = (truth != predicted) & (truth != IGNORE)
    shown = np.where(wrong[..., None], 0.3 * gray + 0.7 * WRONG, gray)
    return np.where((truth == IGNORE)[..., None], 0.3 * gray + 0.7 * VOID, shown).astype(np.uint8)


def write_overlays(path: Path, overlays: Sequence[Overlay], names: Sequence[str], title: str) -> None:
    """Draw a row for each image, and a key of the classes below. Of images without a true mask what is predicted alone.

    Raises:
        UserError: when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from fastpmae.plotting import drawable, save_picture

    colours = class_colours(len(names))
    views: list[tuple[str, Callable[[Overlay], Pixels]]] = [
        ("", lambda each: each.image),
        ("prediction", lambda each: painted(each.image, each.predicted, colours)),
    ]
    truths = [each.truth for each in overlays if each.truth is not None]
    if truths:
        views.insert(1, ("truth", lambda each: painted(each.image, _known(each), colours)))
        views.append(("errors", lambda each: errors_in_red(each.image, _known(each), each.predicted)))
    ratio = min(TALLEST, max(overlay.image.shape[0] / overlay.image.shape[1] for overlay in overlays))
    key = -(-min(len(names), MOST_NAMED) // 6) * 0.22
    height = len(overlays) * (12 / len(views) * ratio + 0.3) + 0.5 + key
    figure = Figure(figsize=(12.4, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(drawable(printable(title)), size=11, parse_math=False)
    cells = figure.subplots(len(overlays), len(views), squeeze=False)
    for row, overlay in zip(cells, overlays, strict=True):
        for axes, (word, view) in zip(row, views, strict=True):
            axes.imshow(view(overlay))
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_title(word, size=8)
        row[0].set_title(drawable(printable(overlay.title))[:60], size=8, parse_math=False, loc="left")
    masks = [*truths, *(each.predicted for each in overlays)]
    there = np.unique(np.concatenate([mask.ravel() for mask in masks]))
    shown: list[int] = [number for number in there.tolist() if number >= 0][:MOST_NAMED]
    handles = [Patch(color=colours[number] / 255, label=drawable(printable(names[number]))[:24]) for number in shown]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    save_picture(figure, path, dpi=110)


def _known(overlay: Overlay) -> Mask:
    """The true mask; void where it is not known."""
    return np.full_like(overlay.predicted, IGNORE) if overlay.truth is None else overlay.truth
