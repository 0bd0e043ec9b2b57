"""What a stage finds: a line of JSON for each figure, on the disk as soon as it is known."""

import contextlib
import datetime
import gc
import json
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastpmae_loaders.errors import UserError


@dataclass
class Record:
    """The findings of one stage, appended to a file that all stages of a run share."""

    file: Path
    stage: str
    device: torch.device
    began: float = field(default_factory=time.perf_counter)

    def note(self, name: str, **figures: Any) -> None:
        """Write one line, flushed to the disk: a machine may be taken away at any moment."""
        seconds = round(time.perf_counter() - self.began, 2)
        line = json.dumps({"stage": self.stage, "name": name, "seconds": seconds, **figures}, default=str)
        passed = {True: "passed", False: "FAILED"}.get(figures.get("ok", ""), "")
        print(f"  {name}: {figures_in_words(figures)} {passed}".rstrip(" :"), flush=True)
        with self.file.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def check(self, name: str, value: float, limit: float, **figures: Any) -> None:
        """A figure that must not exceed a limit; NaN does."""
        self.note(name, value=value, limit=limit, ok=bool(value <= limit), **figures)

    @contextlib.contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """A part of a stage: what goes wrong in it is written down and ends nothing else."""
        try:
            yield
        except Exception as error:
            said, where = f"{type(error).__name__}: {str(error)[:800]}", traceback.format_exc()[-2000:]
            self.note(name, ok=False, failed=said, where=where)
            del error  # with its frames, and what they hold on the device
            gc.collect()
            if self.device.type == "cuda":
                with contextlib.suppress(RuntimeError):  # after some errors a device answers nothing any more
                    torch.cuda.empty_cache()


UNSAID = ("stage", "name", "seconds", "ok", "where", "said", "losses", "case", "versions")
"""What a line of a table or a terminal has no room for."""


def figures_in_words(figures: dict[str, Any]) -> str:
    """The figures of a line, as a table shows them."""
    told = {key: value for key, value in figures.items() if key not in UNSAID and value is not None}
    return ", ".join(f"{key.replace('_', ' ')} {_shown(value)}" for key, value in told.items())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{name} {_shown(one)}" for name, one in value.items())
    return " ".join(map(_shown, value)) or "none" if isinstance(value, list) else str(value)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_results(file: Path) -> list[dict[str, Any]]:
    """The lines of a result file; a torn last one is passed over.

    Raises:
        UserError: when there is no such file, or something in it is no line of ours.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    lines = text.splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise UserError(f"{file}, line {number}, is no JSON: it is no result file of on_gpu") from None
        if not isinstance(row, dict) or not isinstance(row.get("stage"), str) or not isinstance(row.get("name"), str):
            raise UserError(f"{file}, line {number}, names no stage and figure: it is no result file of on_gpu")
        found.append(row)
    return found
