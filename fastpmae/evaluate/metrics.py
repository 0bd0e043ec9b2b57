"""How well predictions fit labels, and the files that say so: figures, a row for each class, the confusion matrix."""

import contextlib
import csv
import datetime
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastpmae.evaluate.result_files import ResultFiles
from fastpmae_loaders.files import atomic_write
from fastpmae_loaders.printable import printable

MOST_NAMED = 40
"""Classes whose names fit beside the picture of a confusion matrix."""
MOST_DRAWN = 1000
"""Rows and columns of that picture."""


@dataclass(frozen=True)
class Scores:
    """Predictions for labelled images.

    Attributes:
        labels: the class of each image.
        ranked: the predicted classes, the likeliest first; at least one column, at most five. Behind the first, -1
            stands for none.
    """

    labels: Int[Tensor, " images"]
    ranked: Int[Tensor, "images best"]

    @property
    def top1(self) -> float:
        """Share of the images whose likeliest class is right, in percent."""
        return self.top(1)

    @property
    def top5(self) -> float:
        """Share of the images whose class is among the five likeliest (or all, where there are fewer), in percent."""
        return self.top(5)

    def top(self, count: int) -> float:
        """Share of the images whose class is among the `count` likeliest, in percent."""
        return 100 * (self.ranked[:, :count] == self.labels[:, None]).any(dim=1).double().mean().item()

    def figures(self) -> dict[str, float]:
        """Both shares, and how far chance alone would move the first: a standard error, in percentage points."""
        share = self.top1 / 100
        error = 100 * math.sqrt(share * (1 - share) / len(self.labels))
        return {"top1": round(self.top1, 4), "top5": round(self.top5, 4), "standard_error": round(error, 4)}

    def confusion(self, classes: int) -> Int[Tensor, "classes classes"]:
        """Images of each class (rows) by the class that they were taken for (columns)."""
        pairs = self.labels * classes + self.ranked[:, 0]
        return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def rank(scores: Float[Tensor, "images classes"]) -> Int[Tensor, "images best"]:
    """The up to five classes of the highest scores; of equal scores the smaller class comes first."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :5].cpu()


def write_scores(files: ResultFiles, scores: Scores, names: list[str], record: dict[str, Any]) -> None:
    """Write a result's figures, a row for each class and the picture of the confusion matrix.

    Args:
        record: what the JSON says besides the figures.

    Raises:
        UserError: when they cannot be written.
    """
    columns = ["class", "name", "images", "top1", "top5", "predicted", "precision", "most_taken_for"]
    rows, count = _class_rows(scores, names), len(scores.labels)
    record = record | scores.figures() | {"images": count, "classes": len(names)}
    title = f"{files.stem}: {scores.top1:.1f} % of {count:,} images"
    draw = partial(_draw, scores, names, title)
    write_result(files, [columns, *rows], {files.confusion: draw}, record)


def write_result(
    files: ResultFiles, rows: list[list[Any]], pictures: Mapping[Path, Callable[[Path], None]], record: dict[str, Any]
) -> None:
    """Write a result's table, its pictures and last its figures.

    Args:
        rows: of the table; the first names the columns.
        pictures: some of `files`, and what draws each into a file.
        record: the figures, and what they are of; the date is added.

    Raises:
        UserError: when a file cannot be written.
    """
    files.folder.mkdir(parents=True, exist_ok=True)
    record = record | {"date": datetime.datetime.now().isoformat(timespec="seconds")}
    # They take their names together when all are drawn, the figures last: a process that is ended while it draws leaves
    # no part of a result, whose name the same command would then take for another's.
    with contextlib.ExitStack() as stack:
        stack.enter_context(atomic_write(files.figures)).write_text(json.dumps(record, indent=1) + "\n")
        for path, draw in reversed(list(pictures.items())):
            draw(stack.enter_context(atomic_write(path)))
        beside = stack.enter_context(atomic_write(files.classes))
        with beside.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


def _class_rows(scores: Scores, names: list[str]) -> list[list[Any]]:
    """A row for each class, in memory for the images and the classes but not for the pairs of classes."""
    count = len(names)
    labels, first = scores.labels.numpy(), scores.ranked[:, 0].numpy()
    right = (scores.ranked == scores.labels[:, None]).numpy()
    images, predicted = np.bincount(labels, minlength=count), np.bincount(first, minlength=count)
    top1 = np.bincount(labels[right[:, 0]], minlength=count)
    top5 = np.bincount(labels[right[:, :5].any(axis=1)], minlength=count)
    pairs, times = np.unique(np.stack([labels, first], axis=1)[labels != first], axis=0, return_counts=True)
    taken: dict[int, tuple[int, int]] = {}
    for (own, other), often in zip(pairs.tolist(), times.tolist(), strict=True):
        if often > taken.get(own, (0, 0))[0]:  # the smallest of those that are equally often
            taken[own] = often, other
    rows = []
    for number, name in enumerate(names):
        of_class = int(images[number])
        shares = [f"{100 * hits[number] / of_class:.2f}" if of_class else "" for hits in (top1, top5)]
        precision = f"{100 * top1[number] / predicted[number]:.2f}" if predicted[number] else ""
        most = names[taken[number][1]] if number in taken else ""
        rows.append([number, name, of_class, *shares, int(predicted[number]), precision, most])
    return rows


def _draw(scores: Scores, names: list[str], title: str, path: Path) -> None:
    # Of many classes some share a pixel: a picture has no more of them anyway, and pairs of classes may be many.
    side = min(len(names), MOST_DRAWN)
    places = [classes * side // len(names) for classes in (scores.labels, scores.ranked[:, :1])]
    draw_confusion(Scores(*places).confusion(side).numpy(), names, title, "images", path)


def draw_confusion(
    confusion: Int[np.ndarray, "classes classes"], names: Sequence[str], title: str, of: str, path: Path
) -> None:
    """The picture of a confusion matrix, classes down and what they were taken for across.

    Args:
        names: of the classes; more of them than rows are not written beside the picture.
        of: what was counted, in the plural.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fastpmae.plotting import drawable, save_picture

    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="taken for", ylabel="class", title=title)
    if len(names) <= MOST_NAMED:
        plain = [drawable(printable(name)) for name in names]
        short = [name if len(name) <= 18 else name[:17] + "…" for name in plain]
        axes.set_xticks(range(len(names)), short, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), short, fontsize=7)
    figure.colorbar(shown, label=f"share of the class's {of}", shrink=0.8)
    # The name, like a class's, is text and no formula.
    for text in (axes.title, *axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)
    save_picture(figure, path, dpi=120)
