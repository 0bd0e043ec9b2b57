"""What `fastpmae-eval` has left in a folder, told apart as the report and the model card show it."""

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.sources.reading import read_file

STEP = re.compile(r"step-(\d{8,15})")
POOLS = {"class": "class token", "mean": "mean of the patches"}


@dataclass(frozen=True)
class Result:
    """The figures of one evaluation.

    Attributes:
        step: of the checkpoint whose encoder it was; None where the weights are no run's.
        images_of: the images that were tested, as a user would name them.
        detail: what else tells it from another evaluation of the same kind.
        source: the weights, in words.
        date: when it ended.
    """

    evaluation: str
    network: str
    step: int | None
    images_of: str
    detail: str
    top1: float
    top5: float
    images: int
    source: str
    date: str


def step_in(name: str) -> int | None:
    """The step in the name of a checkpoint or of its folder of results; None where there is none."""
    found = STEP.match(name)
    return int(found[1]) if found else None


def results_in(folder: Path) -> list[Result]:
    """Every result in a folder and below it, the newest last; files that are no results are passed over."""
    found = []
    for path in sorted(folder.glob("**/*.json")):
        with contextlib.suppress(
            OSError, UserError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError,
            RecursionError,
        ):  # fmt: skip
            found.append(_result(json.loads(read_file(path)), path))
    return sorted(found, key=lambda result: result.date)


def _result(record: dict[str, Any], path: Path) -> Result:
    source = str(record.get("source", ""))
    top1, top5, images = float(record["top1"]), float(record["top5"]), int(record["images"])
    if not (0 <= top1 <= 100 and 0 <= top5 <= 100 and 0 <= images < 2**63):
        raise ValueError("no shares and no number of images")
    return Result(
        str(record["evaluation"]),
        str(record["network"]),
        # A result that says no source may still lie in the folder of its checkpoint.
        step_in(Path(source).name) or step_in(path.parent.name),
        _images_of(record),
        ", ".join(_details(record)),
        top1,
        top5,
        images,
        source,
        str(record.get("date", "")),
    )


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
