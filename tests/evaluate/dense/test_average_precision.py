"""COCO's AP on a small set with crowds, small objects and an empty image: pycocotools' figures, to five digits."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastpmae.evaluate.dense.labelled import Boxed, Detection, Objects

pytest.importorskip("faster_coco_eval", reason="pip install 'fastpmae[dense]'")

from fastpmae.evaluate.dense.average_precision import Found, average_precision, run_lengths, write_box_scores
from fastpmae.evaluate.result_files import ResultFiles

SIDE = 200
PYCOCOTOOLS = {
    "bbox": [18.331, 46.2299, 8.0252, 4.5495, 31.2086],
    "segm": [17.4589, 42.1817, 7.0636, 4.2645, 31.2411],
}
"""AP, AP50, AP75, AP of small and of medium objects by pycocotools 2.0.11, in percent. There are no large objects."""


def outline(box: np.ndarray) -> np.ndarray:
    """An ellipse in a box."""
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    left, top, right, bottom = box
    across, down = (2 * columns - left - right) / (right - left), (2 * rows - top - bottom) / (bottom - top)
    return across**2 + down**2 <= 1


def toy() -> tuple[Detection, list[Found]]:
    """Twelve images of three classes (one of them nowhere) and what somebody has found there."""
    random = np.random.default_rng(7)
    entries, found = [], []
    for number in range(12):
        count = 0 if number == 4 else int(random.integers(1, 7))
        corners = random.uniform(0, 120, (count, 2))
        boxes = np.concatenate([corners, corners + random.uniform(8, 78, (count, 2))], axis=1).astype(np.float32)
        labels, crowd = random.integers(1, 3, count), random.random(count) < 0.15
        outlines = np.stack([outline(box) for box in boxes]) if count else np.zeros((0, SIDE, SIDE), bool)
        area = outlines.sum(axis=(1, 2)).astype(float)
        objects = Objects(boxes, labels, crowd, area, lambda outlines=outlines: outlines)
        entries.append(Boxed(f"{number}.png", SIDE, SIDE, objects, lambda: np.zeros((SIDE, SIDE, 3), np.uint8)))
        moved = boxes + random.normal(0, 5, boxes.shape)
        false = random.uniform(0, 80, (3, 2))
        answers = np.concatenate([moved, np.concatenate([false, false + random.uniform(20, 90, (3, 2))], axis=1)])
        answers = np.concatenate([answers[:, :2], np.maximum(answers[:, 2:], answers[:, :2] + 2)], axis=1).clip(0, SIDE)
        named = np.concatenate([np.where(random.random(count) < 0.85, labels, 3 - labels), random.integers(1, 4, 3)])
        scores = np.concatenate([random.uniform(0.3, 1, count), random.uniform(0.05, 0.7, 3)])
        masks = run_lengths(torch.from_numpy(np.stack([outline(box) for box in answers])))
        found.append(Found(answers, named.tolist(), scores.tolist(), masks))
    return Detection(Path("toy"), ("cell", "platelet", "nowhere"), tuple(entries), True), found


def by_pycocotools(images: Detection, found: list[Found], kind: str) -> list[float]:
    """The same set through the original, which is given plain lists of its own."""
    coco = pytest.importorskip("pycocotools.coco", reason="pip install pycocotools")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    rows, answers = [], []
    for number, (entry, each) in enumerate(zip(images.entries, found, strict=True), start=1):
        assert entry.objects.outlines is not None
        lengths = run_lengths(torch.from_numpy(entry.objects.outlines()))
        for place, box in enumerate(entry.objects.boxes.tolist()):
            rows.append({
                "id": len(rows) + 1, "image_id": number, "category_id": int(entry.objects.labels[place]),
                "bbox": [*box[:2], box[2] - box[0], box[3] - box[1]], "area": float(entry.objects.area[place]),
                "iscrowd": int(entry.objects.crowd[place]), "segmentation": lengths[place],
            })  # fmt: skip
        assert each.masks is not None
        for place, box in enumerate(each.boxes.tolist()):
            answer = {"image_id": number, "category_id": each.labels[place], "score": each.scores[place]}
            own = (
                {"bbox": [*box[:2], box[2] - box[0], box[3] - box[1]]}
                if kind == "bbox"
                else {"segmentation": each.masks[place]}
            )
            answers.append(answer | own)
    known = coco.COCO()
    known.dataset = {
        "images": [{"id": number, "height": SIDE, "width": SIDE} for number in range(1, len(found) + 1)],
        "annotations": rows, "categories": [{"id": number, "name": str(number)} for number in (1, 2, 3)],
    }  # fmt: skip
    known.createIndex()
    evaluated = evaluation.COCOeval(known, known.loadRes(answers), kind)
    evaluated.evaluate()
    evaluated.accumulate()
    evaluated.summarize()
    return [100 * value for value in evaluated.stats[:6].tolist() if value >= 0]


def test_figures_are_pycocotools():
    scores = average_precision(*toy())
    assert list(scores.boxes.values()) == pytest.approx(PYCOCOTOOLS["bbox"], abs=1e-3)
    assert scores.masks is not None
    assert list(scores.masks.values()) == pytest.approx(PYCOCOTOOLS["segm"], abs=1e-3)
    assert list(scores.boxes) == ["ap", "ap50", "ap75", "ap_small", "ap_medium"]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_pycocotools_says_so_today(kind: str):
    assert by_pycocotools(*toy(), kind) == pytest.approx(PYCOCOTOOLS[kind], abs=1e-3)


def test_a_class_that_is_nowhere_is_no_zero_in_the_mean():
    scores = average_precision(*toy())
    assert math.isnan(scores.classes[2][0])
    assert np.isnan(scores.curves[2]).all()
    known = [row[0] for row in scores.classes[:2]]
    assert scores.boxes["ap"] == pytest.approx(sum(known) / 2, abs=1e-3)
    images, _ = toy()
    labels = np.concatenate([entry.objects.labels[~entry.objects.crowd] for entry in images.entries])
    assert [row[2] for row in scores.classes] == np.bincount(labels, minlength=4)[1:].tolist()


def test_nothing_found_is_zero():
    images, found = toy()
    nothing = [Found(np.zeros((0, 4)), [], [], None) for _ in found]
    scores = average_precision(images, nothing)
    assert scores.boxes["ap"] == scores.boxes["ap50"] == 0
    assert scores.masks is None


def drawn(path: Path) -> None:
    path.write_text("drawn")


def test_files(tmp_path: Path):
    images, found = toy()
    scores = average_precision(images, found)
    files = ResultFiles(tmp_path, "detect")
    write_box_scores(files, scores, images.names, {"evaluation": "detect"}, drawn)
    record = json.loads(files.figures.read_text())
    assert record["ap50"] == pytest.approx(PYCOCOTOOLS["bbox"][1], abs=1e-3)
    assert record["mask_ap"] == pytest.approx(PYCOCOTOOLS["segm"][0], abs=1e-3)
    with files.classes.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["cell", "platelet", "nowhere"]
    assert rows[2]["ap"] == ""
    assert files.overlays.read_text() == "drawn"
    assert files.curves.read_bytes().startswith(b"\x89PNG")
