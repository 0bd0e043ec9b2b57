"""Average precision of detections, as COCO counts it, by faster-coco-eval."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from fastpmae.evaluate.dense.extra import imported
from fastpmae.evaluate.dense.labelled import Detection
from fastpmae.evaluate.metrics import write_result
from fastpmae.evaluate.result_files import ResultFiles

FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
PACKAGE = "faster-coco-eval"


@dataclass(frozen=True)
class Found:
    """Detections in one image.

    Attributes:
        boxes: left, top, right, bottom in pixels of the whole image.
        masks: COCO's run lengths of each, where there are masks.
    """

    boxes: Float[np.ndarray, "found 4"]
    labels: list[int]
    scores: list[float]
    masks: list[dict[str, Any]] | None = None

    def outlines(self) -> Bool[np.ndarray, "found height width"] | None:
        """The masks as pixels of the whole image; None where there are none.

        Raises:
            UserError: where faster-coco-eval is not installed.
        """
        if not self.masks:
            return None
        decode = imported("faster_coco_eval.core.mask", PACKAGE).decode
        return np.asarray(decode(self.masks)).transpose(2, 0, 1).astype(bool)


@dataclass(frozen=True)
class BoxScores:
    """Average precision of boxes, and of masks where there are any.

    Attributes:
        boxes, masks: COCO's figures in percent by their names; what no object stands for (a size that none has) is not
            among them.
        classes: of each class AP, AP50 and how many objects there are; NaN where there is none.
        curves: of each class the precision at 101 recalls, at an IoU of 0.5, for boxes; NaN where there is no object.
        images: that were tested.
        by_image: the F1 of each at the score that pictures show, where that is known (see `Matches`); NaN where there
            is nothing to find and nothing shown.
    """

    boxes: dict[str, float]
    masks: dict[str, float] | None
    classes: list[tuple[float, float, int]]
    curves: Float[np.ndarray, "classes recalls"]
    images: int
    by_image: Float[np.ndarray, " images"] | None = None

    def figures(self) -> dict[str, float]:
        """All figures, those of masks with `mask_` before their names."""
        return self.boxes | {f"mask_{name}": value for name, value in (self.masks or {}).items()}


def average_precision(images: Detection, found: Sequence[Found]) -> BoxScores:
    """COCO's figures of detections in a set's images, in its order.

    Crowds are no misses, and what is found in one is no false alarm.

    Raises:
        UserError: where faster-coco-eval is not installed.
    """
    boxes = _evaluated(images, found, "bbox")
    precision = boxes.eval["precision"]
    masks = None
    if images.has_outlines and all(each.masks is not None for each in found):
        masks = _figures(_evaluated(images, found, "segm"))
    counts = np.zeros(len(images.names) + 1, np.int64)
    for entry in images.entries:
        np.add.at(counts, entry.objects.labels[~entry.objects.crowd], 1)
    # [IoU thresholds, recalls, classes, sizes, numbers of detections]
    of_class = [precision[:, :, number, 0, -1] for number in range(len(images.names))]
    rows = [(_mean(each), _mean(each[:1]), int(count)) for each, count in zip(of_class, counts[1:], strict=True)]
    curves = np.stack([each[0] for each in of_class])
    return BoxScores(_figures(boxes), masks, rows, np.where(curves < 0, np.nan, curves), len(images))


def run_lengths(masks: Tensor) -> list[dict[str, Any]]:
    """COCO's run lengths of boolean masks [n, height, width]."""
    encode = imported("faster_coco_eval.core.mask", PACKAGE).encode
    return encode(np.asfortranarray(masks.cpu().numpy().astype(np.uint8).transpose(1, 2, 0))) if len(masks) else []


def _mean(precision: np.ndarray) -> float:
    """In percent; COCO writes -1 where there is no object."""
    valid = precision[precision > -1]
    return 100 * float(valid.mean()) if valid.size else math.nan


def _figures(evaluated: Any) -> dict[str, float]:
    values = zip(FIGURES, evaluated.stats[:6].tolist(), strict=True)
    return {name: round(100 * value, 4) for name, value in values if value >= 0}


def _evaluated(images: Detection, found: Sequence[Found], kind: str) -> Any:
    library = imported("faster_coco_eval", PACKAGE)
    truth, answers = _annotations(images, kind), []
    for number, each in enumerate(found, start=1):
        corners = each.boxes
        sides = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).astype(float)
        for place, (label, score) in enumerate(zip(each.labels, each.scores, strict=True)):
            answer = {"image_id": number, "category_id": int(label), "score": float(score)}
            if kind == "segm":
                assert each.masks is not None
                answer["segmentation"] = each.masks[place]
            else:
                answer["bbox"] = sides[place].tolist()
            answers.append(answer)
    silent = {"print_function": lambda *_: None}
    known = library.COCO(truth, **silent)
    if not answers:  # it takes no empty list: a detection of score 0 that is no number of any class's objects
        answers = [{"image_id": 1, "category_id": 1, "score": 0.0, "bbox": [0.0, 0.0, 1e-3, 1e-3]}]
        kind = "bbox"
    evaluated = library.COCOeval_faster(known, known.loadRes(answers), kind, **silent)
    evaluated.evaluate()
    evaluated.accumulate()
    evaluated.summarize()
    return evaluated


def _annotations(images: Detection, kind: str) -> dict[str, Any]:
    """The set in COCO's layout."""
    rows = []
    for number, entry in enumerate(images.entries, start=1):
        objects = entry.objects
        outlines = None
        if kind == "segm" and objects.outlines is not None:
            import torch

            outlines = run_lengths(torch.from_numpy(objects.outlines()))
        for place in range(len(objects)):
            left, top, right, bottom = objects.boxes[place].tolist()
            row = {
                "id": len(rows) + 1,
                "image_id": number,
                "category_id": int(objects.labels[place]),
                "bbox": [left, top, right - left, bottom - top],
                "area": float(objects.area[place]),
                "iscrowd": int(objects.crowd[place]),
            }
            rows.append(row if outlines is None else row | {"segmentation": outlines[place]})
    pictures = [
        {"id": number, "file_name": entry.name, "height": entry.height, "width": entry.width}
        for number, entry in enumerate(images.entries, start=1)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(images.names, start=1)]
    return {"images": pictures, "annotations": rows, "categories": categories}


def write_box_scores(
    files: ResultFiles,
    scores: BoxScores,
    names: Sequence[str],
    record: dict[str, Any],
    draw_overlays: Callable[[Path], None],
) -> None:
    """Write a result's figures, a row for each class, the picture of precision by recall, and overlays.

    Args:
        record: what the JSON says besides the figures.
        draw_overlays: draws some of the images into a file.

    Raises:
        UserError: when they cannot be written.
    """
    rows: list[list[Any]] = [["class", "name", "objects", "ap", "ap50"]]
    for number, (called, (whole, half, objects)) in enumerate(zip(names, scores.classes, strict=True), start=1):
        shown = ["" if math.isnan(value) else f"{value:.2f}" for value in (whole, half)]
        rows.append([number, called, objects, *shown])
    title = f"{files.stem}: AP50 {scores.boxes.get('ap50', 0):.1f} %"
    record = record | scores.figures() | {"images": scores.images, "classes": len(names)}
    pictures = {files.curves: partial(_draw_curves, scores, names, title), files.overlays: draw_overlays}
    write_result(files, rows, pictures, record)


def _draw_curves(scores: BoxScores, names: Sequence[str], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fastpmae.plotting import drawable, save_picture
    from fastpmae_loaders.printable import printable

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # of many classes those with the most objects
    shown = sorted(range(len(names)), key=lambda number: -scores.classes[number][2])[:10]
    recalls = np.linspace(0, 1, scores.curves.shape[1])
    for number in sorted(shown):
        label = drawable(printable(names[number]))[:24]
        axes.plot(recalls, scores.curves[number], label=f"{label}  {scores.classes[number][1]:.1f}")
    axes.set(xlabel="recall", ylabel="precision at IoU 0.5", title=title, xlim=(0, 1), ylim=(0, 1.02))
    legend = axes.legend(title="AP50, %", fontsize=8)
    for text in (axes.title, *legend.get_texts()):
        text.set_parse_math(False)
    save_picture(figure, path, dpi=120)
