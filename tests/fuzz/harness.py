"""Runs a kind's cases in a worker process, which a crash, a hang or a failing case ends and another one follows."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.case import ENVIRONMENT

SOUND = ("ok", "refused")
FAILURES = ("crash", "hang", "traceback", "unprintable", "memory")
MEMORY = 4 * 2**30
LIMIT = 60.0
"""Seconds for a case."""
START = 300.0
"""Seconds for a worker's imports and sound files."""


@dataclass
class Report:
    """What became of a kind's cases.

    Attributes:
        outcomes: how many cases ended so.
        failures: what there is to say of each that failed, with the command that runs it again.
        slowest: the longest case, in seconds and by its name.
        peak: the largest resident memory of a worker, in bytes.
        following: the stream to go on with.
    """

    kind: str
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    peak: int = 0
    following: int = 0

    def __str__(self) -> str:
        counts = ", ".join(f"{self.outcomes[outcome]:,} {outcome}" for outcome in (*SOUND, *FAILURES))
        seconds, name = self.slowest
        return (
            f"{self.kind}: {sum(self.outcomes.values()):,} cases: {counts}; "
            f"slowest {seconds:.1f} s ({name}), at most {self.peak / 2**20:,.0f} MiB; "
            f"go on with --stream {self.following}"
        )


class Worker:
    """A worker process and its messages."""

    def __init__(self, kind: str, seed: int, stream: int, skip: int, folder: Path, memory: int):
        extra = ENVIRONMENT.get(kind, {})
        if extra:
            extra = {**extra, "NUMBA_CACHE_DIR": str(folder.resolve() / "numba")}
        words = [kind, str(seed), str(stream), str(skip), str(folder.resolve()), str(memory)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", *words],
            cwd=Path(__file__).parent.parent.parent,
            env={**os.environ, **extra},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,  # what it starts ends with it
        )
        self.rest = b""

    def message(self, limit: float) -> dict[str, Any] | None:
        """The next message; None when the process has ended. Raises TimeoutError after `limit` seconds."""
        assert self.process.stdout is not None
        stream, ends = self.process.stdout.fileno(), time.monotonic() + limit
        while b"\n" not in self.rest:
            if not select.select([stream], [], [], max(0.0, ends - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(stream, 1 << 16)
            if not part:
                self.process.wait()
                return None
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)

    def told(self, limit: float, folder: Path) -> dict[str, Any]:
        """What became of a case, also where the worker can no longer say it."""
        try:
            return self.message(limit) or {
                "outcome": "crash",
                "words": f"exit status {self.process.returncode}\n{_output(folder)}",
            }
        except TimeoutError:
            self.process.send_signal(signal.SIGABRT)  # faulthandler writes where it hangs
            time.sleep(1)
            return {"outcome": "hang", "words": f"{limit:g} s\n{_output(folder)}"}

    def end(self) -> None:
        """Kill it, and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def fuzz(
    kind: str,
    seed: int,
    seconds: float,
    folder: Path,
    kept: Path,
    *,
    memory: int = MEMORY,
    limit: float = LIMIT,
    stream: int = 0,
) -> Report:
    """Run cases of a kind for so many seconds after the first has begun.

    Args:
        folder: where inputs are made; emptied by nobody.
        kept: where the input of a case that fails is kept, with a file that tells what happened.
        memory: bytes that a worker may take beyond what its imports have.
        limit: seconds for a case.
        stream: the stream of cases that is run first.

    Raises:
        RuntimeError: when a worker ends although none of its cases runs: the generator itself fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report, ends = Report(kind), None
    skip = 0
    while ends is None or time.monotonic() < ends:
        worker = Worker(kind, seed, stream, skip, folder, memory)
        case: dict[str, Any] | None = None
        try:
            while ends is None or time.monotonic() < ends:
                case = None
                case = worker.message(START)
                if case is None:
                    raise RuntimeError(f"the cases of {kind} cannot be made:\n{_output(folder)}")
                ends = ends or time.monotonic() + seconds
                stream, skip = case["stream"], case["position"] + 1
                report.following = stream + 1
                began = time.monotonic()
                told = worker.told(limit, folder)
                report.outcomes[told["outcome"]] += 1
                report.slowest = max(report.slowest, (time.monotonic() - began, case["name"]))
                report.peak = max(report.peak, told.get("peak", 0) * 1024)
                if told["outcome"] not in SOUND:
                    report.failures.append(_keep(kept, kind, seed, case, told))
                    break
                if told["last"]:
                    break
        finally:
            worker.end()
    return report


def _output(folder: Path) -> str:
    """The end of what a worker has printed."""
    path = folder / "output.txt"
    return path.read_bytes()[-6000:].decode(errors="replace") if path.exists() else ""


def _keep(kept: Path, kind: str, seed: int, case: dict[str, Any], told: dict[str, Any]) -> str:
    place = kept / f"{kind}-{seed}-{case['stream']}-{case['position']}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name in case["files"]:
        if Path(name).is_dir():
            shutil.copytree(name, place / Path(name).name, symlinks=True)
        elif Path(name).is_file():
            shutil.copy(name, place)
    (place / "case.txt").write_text(f"{told['outcome']}: {case['name']}\n{told['words']}\n")
    words = f"{kind} --seed {seed} --replay {case['stream']} {case['position']}"
    last = next(iter(told["words"].strip().splitlines()[-1:]), "")
    return f"{told['outcome']}: {case['name']}: {last[:300]}\n    in {place}; again: python -m tests.fuzz {words}"
