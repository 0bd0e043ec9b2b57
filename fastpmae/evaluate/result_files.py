"""Where the results of an evaluation lie, and what their files are called: none takes another one's place."""

import contextlib
import itertools
import json
import os
import re
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from typing import Any

from fastpmae.config import run_at
from fastpmae.evaluate.dense.labelled import same_images
from fastpmae.run.checkpoint import step_of
from fastpmae.run.folder import run_of
from fastpmae.run.shards import is_sharded
from fastpmae.run.stored_run import LARGEST_RESULT, is_checkpoint, local_copy, local_folder
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable
from fastpmae_loaders.stores import address as stores
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.stores.cache import CacheSettings
from fastpmae_loaders.stores.client import StoreError
from fastpmae_loaders.write.store_target import StoreTarget


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
    """The files for a result: of that stem, or, where figures of other images, of other weights or files that are no
    result bear it, of one with the name of what is other.

    A second data set or network does not replace the figures of the first, and the same command finds its own files
    again.
    """
    first = ResultFiles(folder, stem)
    if _has_room(first, record):
        return first
    before = _result_in(first)
    others = before is not None and _same_images(before, record)
    word = _word(record["weights"], 1) if others else _word((record["val"] or record["train"])["path"], 2)
    names = itertools.chain([f"{stem}-{word}"], (f"{stem}-{word}-{number}" for number in itertools.count(2)))
    each = (ResultFiles(folder, name) for name in names)
    return next(files for files in each if _has_room(files, record))


def _word(name: str, parts: int) -> str:
    """The last parts of a path or an address, without an ending, for the name of a file."""
    path = Path(name)
    if path.name in ("", ".."):
        path = path.resolve()
    last = "-".join([*path.parts[:-1], path.stem][-parts:])
    return re.sub(r"[^A-Za-z0-9_.]+", "-", last).strip("-") or "other"


def _has_room(files: ResultFiles, record: dict[str, Any]) -> bool:
    """Whether none of the files is there, or they are a result of the same images and weights."""
    if not any(map(os.path.lexists, files.every)):
        return True
    before = _result_in(files)
    return before is not None and _same_images(before, record) and _same_weights(before, record, files.folder)


def _result_in(files: ResultFiles) -> dict[str, Any] | None:
    """What is recorded there of a result's images and weights; None where it is no result."""
    try:
        found = json.loads(files.figures.read_text(encoding="utf-8"))
        prints = {
            part: None if found[part] is None else {"fingerprint": found[part]["fingerprint"]}
            for part in ("train", "val")
        }
        return prints | {"weights": str(found.get("weights", ""))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _same_images(before: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether two results were trained and tested on the same images."""
    return all(
        before[part] is record[part] is None
        or (before[part] is not None and record[part] is not None and same_images(before[part], record[part]))
        for part in ("train", "val")
    )


def _same_weights(before: dict[str, Any], record: dict[str, Any], folder: Path) -> bool:
    """Whether two results are of weights of one name; a run goes on, and its folder may be named from elsewhere."""
    earlier, now = Path(before["weights"]), Path(str(record.get("weights", "")))
    try:
        if earlier.resolve() == now.resolve():
            return True
        run = run_of(now)
        return not earlier.exists() and run is not None and folder.resolve().is_relative_to(run.resolve())
    except (OSError, ValueError, RuntimeError):  # a stranger's file may name what is no path
        return False


def place_of(weights: str) -> Path | Address:
    """Where results go by default: beside a run's checkpoints, or beside the file; of https:// into a folder here."""
    if weights.startswith("timm:"):
        return Path("eval") / weights.removeprefix("timm:").replace("/", "-").replace(":", "-")
    named = Address.of_text(weights)
    if named is not None:
        return _beside(named)
    path = Path(weights)
    run = run_of(path)
    if run is None:
        return path.parent / f"{path.stem}-eval"
    # A checkpoint that was named has results of its own; a run folder's are those of its newest one.
    return run / "eval" / f"step-{step_of(path):08d}" if path.is_file() or is_sharded(path) else run / "eval"


def _beside(named: Address) -> Path | Address:
    """The same of weights in a store."""
    copy = local_copy(named)
    if named.scheme in ("https", "http"):
        return Path("eval") / copy.stem
    if is_checkpoint(named):
        return run_at(named) / "eval" / f"step-{step_of(copy):08d}"
    if (copy / "metrics.jsonl").exists() or (copy / "checkpoints").exists():
        return named / "eval"
    return named.parent / f"{Path(named.name).stem}-eval"


def named_folder(out: Path | None) -> Path | Address | None:
    """What --out names, which may be an address. UserError for one that is none."""
    return None if out is None else stores.place_of(out)


def _check_writable(folder: Path, more: str) -> None:
    """See before any work that a file can be written there; nothing of the trial is left."""
    missing = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{printable(str(folder))} cannot be written: {error.strerror or error}{more}") from None
    finally:
        for place in missing:  # the innermost first; what others have put something into by now stays
            with contextlib.suppress(OSError):
                place.rmdir()


class ResultFolder:
    """Where the files of a result are written: a folder of this machine, or one that is taken to an address.

    Args:
        place: the folder, or the address.
        named: whether the user has said so; else it follows from the weights.
        lasts: at an address, keep the folder of this machine when the process ends, as a training is resumed from it.
        is_main: whether this process writes.

    Attributes:
        path: the folder of this machine; of an address it holds the results that are there already.
        address: the address, if it is one.

    Raises:
        UserError: where the folder is a file, or it or the address cannot be written, within 20 s.
    """

    def __init__(self, place: Path | Address, *, named: bool, lasts: bool = False, is_main: bool = True) -> None:
        self._before: dict[str, bytes] = {}
        more = "" if named else "; by default the result lies beside the weights: name another folder with --out"
        if isinstance(place, Path):
            self.path, self.address = place, None
            if place.exists() and not place.is_dir():
                raise UserError(f"--out {place} is a file; name a folder")
            if is_main:
                _check_writable(place, more)
            return
        self.address = place
        try:
            self._target = StoreTarget(place)
        except StoreError as error:
            raise UserError(f"{error}{more}") from None
        if lasts:
            self.path = local_folder(place, CacheSettings())
            self.path.mkdir(parents=True, exist_ok=True)
        else:
            self.path = Path(mkdtemp(prefix="fastpmae-results-"))
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        if is_main:
            self._bring()

    def _bring(self) -> None:
        for name in list(self._target.names()):
            if "/" not in name and name.endswith(".json") and (self._target.size(name) or 0) <= LARGEST_RESULT:
                found = self._target.read(name)
                if found is not None:
                    self._before[name] = found
                    (self.path / name).write_bytes(found)

    def publish(self) -> None:
        """Take what was written to the address; the JSON last, by which others find it. UserError where that fails."""
        if self.address is None:
            return
        files = [path for path in self.path.iterdir() if path.is_file() and not path.name.startswith(".")]
        for path in sorted(files, key=lambda path: path.suffix == ".json"):
            before = self._before.get(path.name)
            if before is None or before != path.read_bytes():
                self._target.put(path.name, path)

    def called(self, path: Path) -> Path | Address:
        """What a file in the folder is called for the user."""
        return path if self.address is None else self.address / path.name
