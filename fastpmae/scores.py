"""How well predictions fit labels, and the files that say so: figures, a row for each class, the confusion matrix."""

import csv
import datetime
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastpmae.files import appearing
from fastpmae_loaders.listing import printable

MOST_NAMED = 40
"""Classes whose names fit beside the picture of a confusion matrix."""


@dataclass(frozen=True)
class Scores:
    """Predictions for labelled images.

    Attributes:
        labels: the class of each image.
        ranked: the predicted classes, the likeliest first; at least one column, at most five.
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


def files_of(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """The files of a result: its classes, its picture, and last its figures."""
    return folder / f"{name}-classes.csv", folder / f"{name}-confusion.png", folder / f"{name}.json"


def write_scores(folder: Path, name: str, scores: Scores, names: list[str], record: dict[str, Any]) -> Path:
    """Write NAME.json, NAME-classes.csv and NAME-confusion.png into a folder, and return the first.

    Args:
        record: what the JSON says besides the figures.

    Raises:
        UserError: when they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table, picture, figures = files_of(folder, name)
    confusion = scores.confusion(len(names)).numpy()
    with appearing(table) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "name", "images", "top1", "top5", "predicted", "precision", "most_taken_for"])
        rows.writerows(_class_rows(scores, confusion, names))
    with appearing(picture) as beside:
        _draw(confusion, names, f"{name}: {scores.top1:.1f} % of {len(scores.labels):,} images", beside)
    record = record | scores.figures() | {"images": len(scores.labels), "classes": len(names)}
    record["date"] = datetime.datetime.now().isoformat(timespec="seconds")
    with appearing(figures) as beside:
        beside.write_text(json.dumps(record, indent=1) + "\n")
    return figures


def _class_rows(scores: Scores, confusion: np.ndarray, names: list[str]) -> list[list[Any]]:
    rows = []
    for number, name in enumerate(names):
        own = scores.labels == number
        images, predicted = int(own.sum()), int(confusion[:, number].sum())
        right = int(confusion[number, number])
        others = confusion[number].copy()
        others[number] = 0
        part = Scores(scores.labels[own], scores.ranked[own])
        shares = [f"{part.top1:.2f}", f"{part.top5:.2f}"] if images else ["", ""]
        precision = f"{100 * right / predicted:.2f}" if predicted else ""
        rows.append(
            [number, name, images, *shares, predicted, precision, names[others.argmax()] if others.any() else ""]
        )
    return rows


def _draw(confusion: np.ndarray, names: list[str], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fastpmae.lettering import drawable, save_picture

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
    figure.colorbar(shown, label="share of the class's images", shrink=0.8)
    # The name, like a class's, is text and no formula.
    for text in (axes.title, *axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)
    save_picture(figure, path, dpi=120)
