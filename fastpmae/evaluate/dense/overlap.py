"""How well predicted masks overlap with true ones: mIoU by the confusion matrix of a whole set, and its files."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastpmae.evaluate.metrics import draw_confusion, write_result
from fastpmae.evaluate.result_files import ResultFiles

AT_ONCE = 1 << 28
"""Scores of pixels that are held at a time, 1 GiB in fp32."""


def best_classes(
    scores: Callable[[slice], Float[Tensor, "some height width"]], classes: int, pixels: int
) -> Int[Tensor, "height width"]:
    """The class of the highest score at each pixel, of equal ones the first.

    Args:
        scores: of some of the classes. Of a large image they are asked for in parts: those of 150 classes at 12
            megapixels would take 7 GB.
    """
    some = max(1, AT_ONCE // pixels)
    if some >= classes:
        return scores(slice(None)).argmax(dim=0)
    best, found = scores(slice(0, some)).max(dim=0)
    for first in range(some, classes, some):
        values, places = scores(slice(first, first + some)).max(dim=0)
        better = (values > best) | (values.isnan() & ~best.isnan())
        best, found = torch.where(better, values, best), torch.where(better, places + first, found)
    return found


def confusion_of(
    truth: Int[Tensor, "height width"], predicted: Int[Tensor, "height width"], classes: int
) -> Int[Tensor, "classes classes"]:
    """Pixels of each true class (rows) by the class that they were taken for (columns); on the CPU.

    Args:
        truth: 0 ... classes - 1, and anything else where a pixel does not count.
        predicted: 0 ... classes - 1.
    """
    counts = (truth >= 0) & (truth < classes)
    pairs = truth[counts].long() * classes + predicted[counts].long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes).cpu()


@dataclass(frozen=True)
class MaskScores:
    """Predicted masks against true ones.

    Attributes:
        confusion: pixels of each true class (rows) by the class that they were taken for (columns), of all images.
        images: how many there are.
        by_image: the mIoU of each of them on its own, where that is known; NaN where no pixel counts.
    """

    confusion: Int[Tensor, "classes classes"]
    images: int
    by_image: Float[Tensor, " images"] | None = None

    @property
    def iou(self) -> Float[Tensor, " classes"]:
        """Intersection over union of each class in percent; NaN for a class that no pixel has."""
        right = self.confusion.diagonal().double()
        true, predicted = self.confusion.sum(dim=1).double(), self.confusion.sum(dim=0).double()
        return torch.where(true > 0, 100 * right / (true + predicted - right), torch.nan)

    @property
    def recall(self) -> Float[Tensor, " classes"]:
        """Share of each class's pixels that were found, in percent; NaN for a class that no pixel has."""
        return 100 * self.confusion.diagonal().double() / self.confusion.sum(dim=1)

    def figures(self) -> dict[str, float]:
        """Means over the classes that are there, and the share of all pixels that is right, in percent."""
        pixels = 100 * self.confusion.diagonal().sum().item() / max(1, int(self.confusion.sum()))
        return {
            "miou": round(self.iou.nanmean().item(), 4),
            "pixel_accuracy": round(pixels, 4),
            "class_accuracy": round(self.recall.nanmean().item(), 4),
        }


def write_mask_scores(
    files: ResultFiles,
    scores: MaskScores,
    names: tuple[str, ...],
    record: dict[str, Any],
    draw_overlays: Callable[[Path], None],
) -> None:
    """Write a result's figures, a row for each class, the picture of the confusion matrix, and overlays.

    Args:
        record: what the JSON says besides the figures.
        draw_overlays: draws some of the images into a file.

    Raises:
        UserError: when they cannot be written.
    """
    columns = ["class", "name", "pixels", "iou", "recall", "precision", "predicted", "most_taken_for"]
    title = f"{files.stem}: {scores.figures()['miou']:.1f} % mIoU of {scores.images:,} images"
    record = record | scores.figures() | {"images": scores.images, "classes": len(names)}
    pictures = {
        files.confusion: partial(draw_confusion, scores.confusion.numpy(), names, title, "pixels"),
        files.overlays: draw_overlays,
    }
    write_result(files, [columns, *_class_rows(scores, names)], pictures, record)


def _class_rows(scores: MaskScores, names: tuple[str, ...]) -> list[list[Any]]:
    confusion, iou, recall = scores.confusion.numpy(), scores.iou.tolist(), scores.recall.tolist()
    pixels, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    others = confusion - np.diag(confusion.diagonal())
    rows = []
    for number, name in enumerate(names):
        found = [f"{share:.2f}" if pixels[number] else "" for share in (iou[number], recall[number])]
        precision = f"{100 * confusion[number, number] / predicted[number]:.2f}" if predicted[number] else ""
        most = names[others[number].argmax()] if others[number].any() else ""
        rows.append([number, name, int(pixels[number]), *found, precision, int(predicted[number]), most])
    return rows
