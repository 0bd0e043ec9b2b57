"""mIoU by the confusion matrix against a count in NumPy, class by class and pixel by pixel."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastpmae.evaluate.dense import overlap
from fastpmae.evaluate.dense.overlap import MaskScores, best_classes, confusion_of, write_mask_scores
from fastpmae.evaluate.result_files import ResultFiles, free_files

IGNORE = -1


def counted(truths: list[np.ndarray], predictions: list[np.ndarray], classes: int) -> tuple[float, float, float]:
    """mIoU, pixel and class accuracy of all images' pixels together, by sets of pixels."""
    truth, predicted = (np.concatenate([mask.ravel() for mask in masks]) for masks in (truths, predictions))
    valid = truth != IGNORE
    truth, predicted = truth[valid], predicted[valid]
    overlaps, recalls = [], []
    for number in range(classes):
        mine, taken = truth == number, predicted == number
        if mine.any():
            overlaps.append((mine & taken).sum() / (mine | taken).sum())
            recalls.append((mine & taken).sum() / mine.sum())
    return 100 * float(np.mean(overlaps)), 100 * float((truth == predicted).mean()), 100 * float(np.mean(recalls))


def test_figures_are_those_of_all_pixels_together():
    random = np.random.default_rng(0)
    # sizes differ, so a mean over images would be another number; class 4 is nowhere, class 3 only predicted
    truths = [random.integers(-1, 3, size) for size in ((5, 7), (30, 20), (1, 1))]
    predictions = [
        np.where(random.random(truth.shape) < 0.6, truth.clip(0), random.integers(0, 4, truth.shape))
        for truth in truths
    ]
    confusion = torch.zeros(5, 5, dtype=torch.int64)
    for truth, predicted in zip(truths, predictions, strict=True):
        confusion += confusion_of(torch.from_numpy(truth), torch.from_numpy(predicted), 5)
    scores = MaskScores(confusion, 3)
    miou, pixels, recall = counted(truths, predictions, 5)
    assert scores.figures() == pytest.approx(
        {"miou": miou, "pixel_accuracy": pixels, "class_accuracy": recall}, abs=1e-4
    )
    assert math.isnan(scores.iou[4])
    assert math.isnan(scores.iou[3])


def test_pixels_outside_the_classes_do_not_count():
    truth = torch.tensor([[0, 1, -1, 255]], dtype=torch.int16)
    assert confusion_of(truth, torch.tensor([[0, 0, 1, 1]]), 2).tolist() == [[1, 0], [1, 0]]


def drawn(path: Path) -> None:
    path.write_text("drawn")


def test_a_result_that_was_not_drawn_to_its_end_leaves_no_part(tmp_path: Path):
    """So that the same command's next result has the same name, wherever the first one was ended."""
    scores, names = MaskScores(torch.tensor([[8, 2], [0, 5]]), 4), ("road", "car")
    record = {"train": {"path": "a", "fingerprint": "1"}, "val": {"path": "b", "fingerprint": "2"}}
    files = free_files(tmp_path, "segment", record)

    def ended(_: Path) -> None:
        assert not any(path.exists() for path in files.every)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_mask_scores(files, scores, names, record, ended)
    assert not list(tmp_path.iterdir())
    for _ in range(2):
        files = free_files(tmp_path, "segment", record)
        assert files.stem == "segment"
        write_mask_scores(files, scores, names, record, drawn)
    assert len(list(tmp_path.iterdir())) == 4


def test_files(tmp_path: Path):
    scores = MaskScores(torch.tensor([[8, 2, 0], [0, 0, 0], [5, 0, 5]]), 4)
    files = ResultFiles(tmp_path / "out", "patches")
    names = ("road", "sky, blue", "car")
    write_mask_scores(files, scores, names, {"evaluation": "patches"}, drawn)
    record = json.loads(files.figures.read_text())
    assert record["miou"] == pytest.approx(100 * (8 / 15 + 5 / 10) / 2, abs=1e-4)
    assert (record["images"], record["classes"], record["evaluation"]) == (4, 3, "patches")
    with files.classes.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["road", "sky, blue", "car"]
    assert rows[1]["iou"] == rows[1]["recall"] == ""
    assert (rows[0]["iou"], rows[0]["recall"], rows[0]["most_taken_for"]) == ("53.33", "80.00", "sky, blue")
    assert files.overlays.read_text() == "drawn"
    assert not files.curves.exists()
    assert files.confusion.read_bytes().startswith(b"\x89PNG")


def test_the_best_class_in_parts_is_that_of_all_classes(monkeypatch: pytest.MonkeyPatch):
    scores = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(0))
    scores[4:, 0], scores[2, 1, 1] = scores[:3, 0], torch.nan  # equal ones, and what a diverged network says
    held = []

    def of(some: slice) -> torch.Tensor:
        held.append(scores[some].numel())
        return scores[some]

    for most in (1, 30, 61, 120, 1000):
        monkeypatch.setattr(overlap, "AT_ONCE", most)
        held.clear()
        assert torch.equal(best_classes(of, 7, 30), scores.argmax(dim=0)), most
        assert max(held) <= max(most, 30)
        assert sum(held) == scores.numel()
