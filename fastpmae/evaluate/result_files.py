"""Where the results of an evaluation lie, and what their files are called: none takes another one's place."""

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

from fastpmae.evaluate.metrics import files_of
from fastpmae.run.checkpoint import step_of
from fastpmae.run.folder import run_of
from fastpmae.run.shards import is_sharded


def stem_of(evaluation: str, network: str) -> str:
    """What a result's files begin with. A network's name may come out of a stranger's file."""
    return "-".join(filter(None, [evaluation, re.sub(r"[^A-Za-z0-9.]+", "-", network)]))


def free_name(folder: Path, stem: str, record: dict[str, Any]) -> str:
    """The name for a result's files: the stem, or, where that holds figures of other images or files that are no
    result, with these images' name.

    A second data set does not replace the figures of the first, and the same command finds its own files again.
    """
    path = Path((record["val"] or record["train"])["path"])
    images = re.sub(r"[^A-Za-z0-9_.]+", "-", "-".join(path.with_suffix("").parts[-2:])).strip("-")
    others = (f"{stem}-{images}-{number}" for number in itertools.count(2))
    names = itertools.chain([stem, f"{stem}-{images}"], others)
    return next(name for name in names if _has_room(folder, name, record))


def _has_room(folder: Path, name: str, record: dict[str, Any]) -> bool:
    """Whether the files of that name are not there, or are a result of the same images."""
    files = files_of(folder, name)
    if not any(map(os.path.lexists, files)):
        return True
    try:
        before = json.loads(files[-1].read_text(encoding="utf-8"))
        return _prints(before) == _prints(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _prints(record: dict[str, Any]) -> list[str | None]:
    """The fingerprints of the images that a result was trained and tested on."""
    return [None if record[part] is None else record[part]["fingerprint"] for part in ("train", "val")]


def place_of(weights: str) -> Path:
    """Where results go by default: beside a run's checkpoints, or beside the file."""
    if weights.startswith("timm:"):
        return Path("eval") / weights.removeprefix("timm:").replace("/", "-").replace(":", "-")
    path = Path(weights)
    run = run_of(path)
    if run is None:
        return path.parent / f"{path.stem}-eval"
    # A checkpoint that was named has results of its own; a run folder's are those of its newest one.
    return run / "eval" / f"step-{step_of(path):08d}" if path.is_file() or is_sharded(path) else run / "eval"
