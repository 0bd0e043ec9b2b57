"""Worker processes that outlive bad input: results in order, whatever a decoder does to its process.

A worker is a fresh interpreter, neither forked (the caller may have threads) nor spawned by multiprocessing
(which would run the caller's main module again). A worker that dies or hangs costs the item it was at, no
more: another takes its place.
"""

import contextlib
import ctypes
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, BinaryIO

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import on_one_line

_GROUPS_AHEAD = 2  # groups of items a worker holds, so that it need not wait for the next one
ITEMS_AHEAD = 4096  # how far any worker may run ahead of the result that is next
_BYTES_AHEAD = 1 << 28
_DEATHS_IN_A_ROW = 20
_START_SECONDS = 120.0
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fastpmae_loaders.write.workers import serve; serve()"
)


@dataclass(frozen=True)
class Failure:
    """In place of a result: why there is none."""

    reason: str


@dataclass
class _Worker:
    process: subprocess.Popen
    connection: Connection
    errors: BinaryIO
    items: deque[int] = field(default_factory=deque)
    groups: deque[int] = field(default_factory=deque)  # last item of each group it holds
    since: float = field(default_factory=time.monotonic)  # of the last sign of life
    ready: bool = False


class WorkerPool:
    """Runs one function over items in `count` processes. A context manager: leaving it ends the processes.

    `task` names a function "module:name"; called with `arguments` in each worker, it returns the function
    that is called as f(place, item). A UserError raised by that is the item's Failure, and so is any other
    exception, a death of the process (tried twice) and more than `timeout` seconds. `tell` receives a
    sentence when a worker had to be replaced.
    """

    def __init__(
        self,
        task: str,
        arguments: tuple[Any, ...],
        count: int,
        timeout: float,
        tell: Callable[[str], None] = lambda sentence: None,
    ):
        self._setup = (task, arguments)
        self._timeout = timeout
        self._tell = tell
        self._deaths = 0
        self._workers: list[_Worker] = []
        try:
            for _ in range(count):
                self._workers.append(self._start())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """Ends every worker at once and waits until it is gone."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
            worker.connection.close()
            worker.errors.close()
        self._workers.clear()

    def in_order(
        self, items: Sequence[Any], same_group: Callable[[Any, Any], bool] | None = None, group_size: int = 8
    ) -> Iterator[tuple[int, Any]]:
        """Yields (place, result or Failure) for each item, in the order of the items.

        Up to `group_size` neighbours go to a worker together; `same_group(a, b)` false keeps them apart.
        """
        done: dict[int, tuple[Any, int]] = {}
        again: deque[list[int]] = deque()
        tries: dict[int, int] = {}
        state = {"next": 0, "out": 0, "bytes": 0}

        def next_group() -> list[int]:
            if again:
                return again.popleft()
            start, ahead = state["next"], state["next"] - state["out"]
            if start >= len(items) or ahead >= ITEMS_AHEAD or (ahead and state["bytes"] > _BYTES_AHEAD):
                return []
            stop = start + 1
            while stop < min(start + group_size, len(items)):
                if same_group and not same_group(items[start], items[stop]):
                    break
                stop += 1
            state["next"] = stop
            return list(range(start, stop))

        def accept(place: int, result: Any, size: int) -> None:
            done[place] = (result, size)
            state["bytes"] += size

        def replace(worker: _Worker, reason: str, again_allowed: bool) -> None:
            unfinished = list(worker.items)
            self._replace(worker, reason)
            if not unfinished:
                return
            culprit, rest = unfinished[0], unfinished[1:]
            if rest:
                again.appendleft(rest)
            tries[culprit] = tries.get(culprit, 0) + 1
            if again_allowed and tries[culprit] < 2:
                again.appendleft([culprit])  # alone, so that a second death is beyond doubt its own
            else:
                accept(culprit, Failure(reason), 0)

        while state["out"] < len(items):
            for worker in self._workers:
                while worker.ready and len(worker.groups) < _GROUPS_AHEAD and (group := next_group()):
                    self._send(worker, group, items)
            ready = wait([worker.connection for worker in self._workers], timeout=0.2)
            for worker in [worker for worker in self._workers if worker.connection in ready]:
                try:
                    message = worker.connection.recv_bytes()
                except (EOFError, OSError):
                    replace(worker, self._cause_of_death(worker), again_allowed=True)
                    continue
                worker.since = time.monotonic()
                if not worker.ready:
                    worker.ready = True
                    continue
                self._deaths = 0
                place, result = pickle.loads(message)
                worker.items.popleft()
                if worker.groups and worker.groups[0] == place:
                    worker.groups.popleft()
                accept(place, result, len(message))
            for worker in list(self._workers):
                limit = self._timeout if worker.ready else _START_SECONDS
                silent = time.monotonic() - worker.since
                if (worker.items or not worker.ready) and silent > limit and not worker.connection.poll():
                    replace(worker, f"it took more than {limit:g} seconds", again_allowed=False)
            while state["out"] in done:
                place = state["out"]
                result, size = done.pop(place)
                state["bytes"] -= size
                state["out"] += 1
                yield place, result

    def _send(self, worker: _Worker, group: list[int], items: Sequence[Any]) -> None:
        if not worker.items:
            worker.since = time.monotonic()
        worker.items.extend(group)
        worker.groups.append(group[-1])
        with contextlib.suppress(OSError):  # if it has died, the next wait finds its connection closed
            worker.connection.send([(place, items[place]) for place in group])

    def _start(self) -> _Worker:
        ours, theirs = Pipe()
        paths = json.dumps([str(path) for path in sys.path])
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, paths, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                process_group=0,  # ctrl-C in the terminal is for us alone
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError as error:
            ours.close()
            errors.close()
            raise UserError(f"a worker process cannot be started: {error.strerror}") from None
        finally:
            theirs.close()
        worker = _Worker(process, ours, errors)
        with contextlib.suppress(OSError):
            ours.send(self._setup)
        return worker

    def _cause_of_death(self, worker: _Worker) -> str:
        try:
            status = worker.process.wait(timeout=5)  # its connection closes a little before it ends
        except subprocess.TimeoutExpired:
            worker.process.kill()
            status = worker.process.wait()
        if status < 0 and -status != signal.SIGKILL:
            return f"the decoder crashed ({signal.Signals(-status).name})"
        if status < 0:
            return "its worker process was killed (SIGKILL: perhaps out of memory)"
        worker.errors.seek(0)
        lines = worker.errors.read()[-2000:].decode(errors="replace").strip().splitlines()
        return f"its worker process ended with status {status}" + (f": {_one_line(lines[-1])}" if lines else "")

    def _replace(self, worker: _Worker, reason: str) -> None:
        worker.process.kill()
        worker.process.wait()
        worker.connection.close()
        worker.errors.close()
        self._deaths += 1
        if self._deaths >= (_DEATHS_IN_A_ROW if worker.ready else 3):
            raise UserError(
                f"worker processes keep dying; the last one: {reason}. "
                "If memory is short, fewer --workers or a lower --max-pixels help"
            )
        self._tell(f"a worker process was replaced: {reason}")
        self._workers[self._workers.index(worker)] = self._start()


def _one_line(reason: str) -> str:
    return on_one_line(reason)[:500]


def serve() -> None:
    """A worker's life: read the task, then answer item by item until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = int(sys.argv[3])
    if sys.platform == "linux":  # die with the parent, even in the midst of an endless decode
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    connection = Connection(int(sys.argv[2]))
    try:
        task, arguments = connection.recv()
        module, _, name = task.partition(":")
        function = getattr(importlib.import_module(module), name)(*arguments)
        connection.send_bytes(b"ready")
        while os.getppid() == parent:
            for place, item in connection.recv():
                try:
                    result = function(place, item)
                except UserError as error:
                    result = Failure(_one_line(str(error)))
                except MemoryError:
                    result = Failure("it takes more memory than there is")
                except Exception as error:
                    result = Failure(_one_line(f"{type(error).__name__}: {error}"))
                connection.send_bytes(pickle.dumps((place, result), protocol=5))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
