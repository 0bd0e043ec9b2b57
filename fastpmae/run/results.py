"""What `fastpmae-eval` has left in a folder, told apart as the report and the model card show it."""

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.sources.reading import read_file

STEP = re.compile(r"step-(\d{8,15})")
POOLS = {"class": "class token", "mean": "mean of the patches"}


DENSE = {
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "class_accuracy": "class accuracy",
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "mask_ap": "AP of masks",
    "mask_ap50": "AP50 of masks",
}
"""Figures of masks and boxes as a result's file has them, and what they are called."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluation.

    Attributes:
        step: of the checkpoint whose encoder it was; None where the weights are no run's.
        images_of: the images that were tested, as a user would name them.
        detail: what else tells it from another evaluation of the same kind.
        images: how many were tested.
        source: the weights, in words.
        date: when it ended.
    """

    evaluation: str
    network: str
    step: int | None
    images_of: str
    detail: str
    images: int
    source: str
    date: str


@dataclass(frozen=True)
class Result(Evaluated):
    """What came of an evaluation on labelled images, in percent."""

    top1: float
    top5: float


@dataclass(frozen=True)
class DenseResult(Evaluated):
    """What came of an evaluation on masks or boxes.

    Attributes:
        figures: their names and what they are in percent, the one that counts first.
    """

    figures: tuple[tuple[str, float], ...]

    @property
    def words(self) -> str:
        """The figures in words."""
        return ", ".join(f"{name} {figure:.2f} %" for name, figure in self.figures)


Kind = TypeVar("Kind", bound=Evaluated)


def step_in(name: str) -> int | None:
    """The step in the name of a checkpoint or of its folder of results; None where there is none."""
    found = STEP.match(name)
    return int(found[1]) if found else None


def results_in(folder: Path) -> list[Result]:
    """Every result on labelled images in a folder and below it, the newest last; other files are passed over."""
    return _results(folder, _result)


def dense_results_in(folder: Path) -> list[DenseResult]:
    """The same of results on masks and boxes."""
    return _results(folder, _dense_result)


def _results(folder: Path, read: Callable[[dict[str, Any], Path], Kind]) -> list[Kind]:
    found = []
    for path in sorted(folder.glob("**/*.json")):
        with contextlib.suppress(
            OSError, UserError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError,
            RecursionError,
        ):  # fmt: skip
            found.append(read(json.loads(read_file(path)), path))
    return sorted(found, key=lambda result: result.date)


def _result(record: dict[str, Any], path: Path) -> Result:
    return Result(**_evaluated(record, path), top1=_share(record["top1"]), top5=_share(record["top5"]))


def _dense_result(record: dict[str, Any], path: Path) -> DenseResult:
    figures = tuple((name, _share(record[key])) for key, name in DENSE.items() if key in record)
    if not figures:
        raise ValueError("no figures of masks or boxes")
    return DenseResult(**_evaluated(record, path), figures=figures)


def _share(said: Any) -> float:
    share = float(said)
    if not 0 <= share <= 100:
        raise ValueError("no share in percent")
    return share


def _evaluated(record: dict[str, Any], path: Path) -> dict[str, Any]:
    source, images = str(record.get("source", "")), int(record["images"])
    if not 0 <= images < 2**63:
        raise ValueError("no number of images")
    return {
        "evaluation": str(record["evaluation"]),
        "network": str(record["network"]),
        # A result that says no source may still lie in the folder of its checkpoint.
        "step": step_in(Path(source).name) or step_in(path.parent.name),
        "images_of": _images_of(record),
        "detail": ", ".join(_details(record)),
        "images": images,
        "source": source,
        "date": str(record.get("date", "")),
    }


def _images_of(record: dict[str, Any]) -> str:
    """The file or folder of the tested images with the folder that it lies in: many are called val.beton."""
    images = record.get("val") or record.get("train") or {}
    return "/".join(Path(images.get("path", "")).parts[-2:]).lstrip("/")


def _details(record: dict[str, Any]) -> list[str]:
    said = record.get("shown")
    shown = said if isinstance(said, dict) else {}
    finetune, table = record.get("finetune") or {}, record.get("table") or [{}]
    details = []
    if record["evaluation"] == "lowshot" and "share" in table[0]:
        details.append(f"{100 * table[0]['share']:g} % of the labels")
    if "k" in shown:
        details.append(f"k = {shown['k']}")
    if "chosen" in record:
        details.append(f"{'c' if 'c' in table[0] else 'rate'} {record['chosen']:g}")
    if record.get("choose_on") == "val":
        details.append("chosen on these images")
    if "epochs" in finetune:
        details.append(f"{finetune['epochs']} epochs")
    pool = shown.get("pool") or record.get("pool") or finetune.get("pool")
    if pool:
        details.append(POOLS.get(pool, str(pool)))
    if record.get("leave_one_out"):
        details.append("each left out once")
    if "image_size" in record:
        details.append(f"{record['image_size']} px")
    return details
