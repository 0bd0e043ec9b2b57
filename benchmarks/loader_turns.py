"""Processes that take turns: each case in one of its own, all of it stopped while another case is measured.

A case's process and its children are one process group. Between two rounds the group is stopped (SIGSTOP), so no
pipeline fills its queues in another's time, and none finds free work when its turn comes. A round begins by taking a
few batches untimed; then the pipeline runs as it does in the middle of an epoch, its consumer always waiting, and as
much work is under way when the clock stops as when it started. Linux alone has what this needs in /proc.
"""

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.loader_baselines import Task
from benchmarks.loader_cases import CASES
from benchmarks.loader_checks import Evidence, evidence

TICK = os.sysconf("SC_CLK_TCK")
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Round:
    """What one turn took: seconds, CPU-seconds of the whole process group, images."""

    seconds: float
    cpu_seconds: float
    images: int


@dataclass
class Record:
    """Everything known about a case. `wrong` says what its check found, or nothing."""

    task: Task
    wrong: str = ""
    first_batch: float = 0.0
    rounds: list[Round] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    @property
    def images_per_second(self) -> list[float]:
        return [found.images / found.seconds for found in self.rounds]

    @property
    def cpu_seconds_per_image(self) -> list[float]:
        return [found.cpu_seconds / found.images for found in self.rounds]


def group_members(group: int) -> Iterator[tuple[int, list[str]]]:
    """Process ids of a group, with the fields of their /proc/<pid>/stat from the state on."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                # the command's name, in brackets, may hold anything
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group:
                    yield int(entry.name), fields


def cpu_seconds(group: int) -> float:
    """CPU time of a process group so far, its ended threads included, its ended processes not."""
    return sum(int(fields[11]) + int(fields[12]) for _, fields in group_members(group)) / TICK


def memory(group: int) -> float:
    """MiB that a process group holds for itself: anonymous and shared memory, pages that several hold counted once.

    Pages of files are left out: code, and the .beton, which the system keeps in memory for everybody.
    """
    kilobytes = 0
    for process, _ in group_members(group):
        with suppress(OSError):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    kilobytes += int(line.split()[1])
    return kilobytes / 1024


def serve(task: Task, started: float, connection: Any, log: str) -> None:
    """A case's process: opens it, shows the first batch, then does rounds as it is told."""
    _die_with_parent()
    with suppress(PermissionError):
        os.setpgid(0, 0)
    # the terminal belongs to the tables
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        # the cases bring threads of their own; colour on a CPU as the device has this one
        torch.set_num_threads(1)
        batches = CASES[task.case].open(task)
        first = next(batches)
        connection.send((time.monotonic() - started, evidence(first, task.case)))
        del first
        while (count := connection.recv()) is not None:
            connection.send(_round(batches, count, task))
    except EOFError:
        pass
    except BaseException as error:
        traceback.print_exc()
        with suppress(OSError):
            connection.send(f"{type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # whatever threads a library left behind: this process has nothing to save
        os._exit(0)


def _round(batches: Iterator[Any], count: int, task: Task) -> Round:
    group, on_gpu = os.getpgrp(), task.device == "cuda"

    def now() -> tuple[float, float]:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter(), cpu_seconds(group)

    for _ in range(task.workers):
        next(batches)
    start, cpu_start = now()
    images = sum(next(batches).count for _ in range(count))
    end, cpu_end = now()
    return Round(end - start, cpu_end - cpu_start, images)


def _die_with_parent() -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Turns:
    """The processes of several cases. `open` starts one, `round` gives one its turn; use it as a context manager.

    With `forked` a process starts as a copy of this one, imports and all, which saves seconds for each, and leaves it
    unclear whose memory is whose; otherwise afresh.
    """

    def __init__(self, logs: Path, forked: bool) -> None:
        self._context: Any = multiprocessing.get_context("fork" if forked else "spawn")
        self._logs = logs
        self._running: dict[str, tuple[Any, Any]] = {}

    def __enter__(self) -> "Turns":
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._running):
            self.end(name)

    def start(self, task: Task) -> None:
        """Start a case's process; what it says first is `opened`'s."""
        ours, theirs = self._context.Pipe()
        log = str(self._logs / f"{task.case}.log")
        process = self._context.Process(target=serve, args=(task, time.monotonic(), theirs, log))
        process.start()
        with suppress(OSError):
            os.setpgid(process.pid, process.pid)
        theirs.close()
        self._running[task.case] = process, ours

    def opened(self, name: str) -> tuple[float, Evidence]:
        """Seconds to a case's first batch and the evidence of it; its processes stand still afterwards.

        Raises:
            ChildProcessError: when it failed, with its own words.
        """
        found = self._answer(name)
        self._signal(name, signal.SIGSTOP)
        return found

    def ready(self, names: Sequence[str]) -> list[str]:
        """Those of the cases that have said something, once there are any."""
        connections = {self._running[name][1]: name for name in names}
        return [connections[found] for found in multiprocessing.connection.wait(list(connections))]

    def round(self, name: str, batches: int, watch: Callable[[int], None] | None = None) -> Round:
        """Let a case make so many batches; `watch` is called with its process group all the while."""
        process, connection = self._running[name]
        self._signal(name, signal.SIGCONT)
        connection.send(batches)
        while watch is not None and not connection.poll(0.05):
            watch(process.pid)
        found = self._answer(name)
        self._signal(name, signal.SIGSTOP)
        return found

    def end(self, name: str) -> None:
        """End a case's processes, all of them."""
        process, connection = self._running.pop(name)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        connection.close()

    def _signal(self, name: str, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._running[name][0].pid, number)

    def _answer(self, name: str) -> Any:
        try:
            found = self._running[name][1].recv()
        except EOFError:
            found = "its process ended"
        if isinstance(found, str):
            raise ChildProcessError(f"{name}: {found} (its words are in {self._logs / name}.log)")
        return found


def take_turns(turns: Turns, records: Sequence[Record], rounds: int, seconds: float, warm_up: bool = True) -> None:
    """`rounds` turns of about `seconds` for every case, one after the other, and one more first that is not counted."""
    counts = {}
    for record in records:
        task = record.task
        # a whole number of batches for each worker, since workers that are processes finish theirs together
        tried = turns.round(task.case, task.workers)
        each = tried.images / task.workers / tried.seconds * seconds / task.batch
        counts[task.case] = max(1, round(each)) * task.workers
    for turn in range(rounds + warm_up):
        for record in records:
            found = turns.round(record.task.case, counts[record.task.case])
            if turn >= warm_up:
                record.rounds.append(found)


def watch_memory(turns: Turns, records: Sequence[Record], rounds: int, batches: int = 8) -> None:
    """The peak memory of each case in untimed rounds, since looking at it costs what is being timed."""
    for record in records:
        for _ in range(rounds):
            seen: list[float] = []
            turns.round(record.task.case, batches, lambda group, seen=seen: seen.append(memory(group)))
            record.peaks.append(max(seen))
