"""Where the results of an evaluation lie, and what their files are called: none takes another one's place."""

import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpmae.run.checkpoint import step_of
from fastpmae.run.folder import run_of
from fastpmae.run.shards import is_sharded


@dataclass(frozen=True)
class ResultFiles:
    """Every file that an evaluation may leave for a result, whichever it is of: no evaluation writes another beside.

    Attributes:
        folder: where they lie.
        stem: what their names begin with.
    """

    folder: Path
    stem: str

    @property
    def figures(self) -> Path:
        """The figures and what they are of, as JSON: the file that makes the others a result."""
        return self.folder / f"{self.stem}.json"

    @property
    def classes(self) -> Path:
        """A row for each class."""
        return self.folder / f"{self.stem}-classes.csv"

    @property
    def confusion(self) -> Path:
        """The picture of the confusion matrix."""
        return self.folder / f"{self.stem}-confusion.png"

    @property
    def curves(self) -> Path:
        """The picture of precision by recall."""
        return self.folder / f"{self.stem}-curves.png"

    @property
    def overlays(self) -> Path:
        """Pictures of some of the images, with labels and predictions on them."""
        return self.folder / f"{self.stem}-overlays.png"

    @property
    def every(self) -> tuple[Path, ...]:
        """All of them."""
        return self.figures, self.classes, self.confusion, self.curves, self.overlays


def stem_of(evaluation: str, network: str) -> str:
    """What a result's files begin with. A network's name may come out of a stranger's file."""
    return "-".join(filter(None, [evaluation, re.sub(r"[^A-Za-z0-9.]+", "-", network)]))


def free_files(folder: Path, stem: str, record: dict[str, Any]) -> ResultFiles:
    """The files for a result: of that stem, or, where figures of other images or files that are no result bear it, of
    one with these images' name.

    A second data set does not replace the figures of the first, and the same command finds its own files again.
    """
    path = Path((record["val"] or record["train"])["path"])
    images = re.sub(r"[^A-Za-z0-9_.]+", "-", "-".join(path.with_suffix("").parts[-2:])).strip("-")
    others = (f"{stem}-{images}-{number}" for number in itertools.count(2))
    names = itertools.chain([stem, f"{stem}-{images}"], others)
    each = (ResultFiles(folder, name) for name in names)
    return next(files for files in each if _has_room(files, record))


def _has_room(files: ResultFiles, record: dict[str, Any]) -> bool:
    """Whether none of the files is there, or they are a result of the same images."""
    if not any(map(os.path.lexists, files.every)):
        return True
    try:
        before = json.loads(files.figures.read_text(encoding="utf-8"))
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
