"""What a command may write over: nothing that is there without --force, no input, and no file of a run with it."""

import os
from collections.abc import Iterable
from pathlib import Path

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable
from fastpmae_loaders.values import check_replaceable, local_path

RUN_FILES = frozenset((
    "config.json", "metrics.jsonl", "train.log", "machine.jsonl", ".lock", "report.html", "classifier.safetensors",
    "segmenter.safetensors", "detector.safetensors",
))  # fmt: skip
RUN_FOLDERS = frozenset(("checkpoints", "eval"))
RUN_EVENTS = "events.out.tfevents."


def check_output(out: Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> None:
    """See, before any work, that a command may write the file `out`.

    Args:
        force: what is there may be replaced; but for an input and a run's own file, which no command of another kind
            replaces.
        inputs: files that the command reads, and folders all of whose files it may read.

    Raises:
        UserError: when it may not, or there is no folder to write it in.
    """
    local_path(out)
    name = printable(str(out))
    try:
        check_replaceable(out)
        if not out.parent.is_dir():
            raise UserError(f"{name} cannot be written: there is no folder {printable(str(out.parent))}")
        check_no_run_file(out)
        if os.path.lexists(out):
            for given in inputs:
                if _is_of(out, given):
                    raise UserError(f"{name} is what this command reads: name another file to write")
            if not force:
                raise UserError(f"{name} exists already; --force replaces it")
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def check_no_run_file(out: Path) -> None:
    """Raise UserError where `out` is, or would be taken for, a file that a run or a training keeps in its folder."""
    for place in {out.parent.resolve() / out.name, out.resolve()}:
        for folder in place.parents:
            first, *below = place.relative_to(folder).parts
            own = first in RUN_FOLDERS if below else first in RUN_FILES or first.startswith(RUN_EVENTS)
            if own and is_run_folder(folder):
                raise UserError(
                    f"{printable(str(out))} belongs to the run in {printable(str(folder))}: name another place"
                )


def is_run_folder(folder: Path) -> bool:
    """Whether a folder is that of a pretraining, or of a training that starts from one."""
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir():
        return False
    return any((folder / name).exists() for name in (".lock", "metrics.jsonl")) or any(checkpoints.glob("step-*"))


def _is_of(out: Path, given: Path) -> bool:
    if not given.exists():
        return False
    if given.is_dir():
        return out.resolve().is_relative_to(given.resolve())
    return out.exists() and out.samefile(given)
