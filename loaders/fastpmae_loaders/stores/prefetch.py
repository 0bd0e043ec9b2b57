"""Threads that fetch parts of files: those that somebody waits for first, and then those that are known to be next."""

import contextlib
import heapq
import itertools
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence

from fastpmae_loaders.stores.client import Closed, StoreError, waits_end, waits_end_when

THREADS = 16
"""Requests at a time: a store answers one with some 100 MB/s."""
_URGENT, _AHEAD = 0, 1


def side_by_side(works: Sequence[Callable[[], int]], threads: int) -> int:
    """The sum of what all give, worked at by several threads, which wait as this one does (see `waits_end_when`).

    They are daemons: a program's end does not wait for them. Raises what one of them raised.
    """
    stopped = waits_end()
    left = iter(works)
    lock, found, errors = threading.Lock(), [0], []

    def run() -> None:
        with contextlib.nullcontext() if stopped is None else waits_end_when(stopped):
            while not errors:
                with lock:
                    work = next(left, None)
                if work is None:
                    return
                try:
                    count = work()
                except BaseException as error:
                    errors.append(error)
                    return
                with lock:
                    found[0] += count

    workers = [
        threading.Thread(target=run, name=f"fastpmae-open-{i}", daemon=True) for i in range(min(threads, len(works)))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return found[0]


class Fetcher:
    """Does tasks by their keys, each once at a time. Threads begin with the first task and end with `close`.

    A task's error goes to whoever waits for it; of one that nobody waits for nothing is said, and it is tried again
    when it is asked for.
    """

    def __init__(self, threads: int = THREADS) -> None:
        self._count = threads
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._queue: list[tuple[int, int, Hashable]] = []
        self._numbers = itertools.count()
        self._tasks: dict[Hashable, Callable[[], None]] = {}
        self._running: set[Hashable] = set()
        self._errors: dict[Hashable, BaseException] = {}
        self._threads: list[threading.Thread] = []
        self._closed = False

    def ask(self, tasks: Iterable[tuple[Hashable, Callable[[], None]]], *, ahead: bool = False) -> None:
        """Have tasks done, in this order; those that are asked for without `ahead` come before all others.

        Raises:
            StoreError: in a process that was forked from the one that made this, whose threads are not there.
        """
        if os.getpid() != self._process:
            raise StoreError(
                f"process {os.getpid()} reads a store that process {self._process} opened before it was forked: open "
                "it anew in the process that reads, or start that process afresh (spawn)"
            )
        with self._lock:
            for key, work in tasks:
                if key in self._running or (ahead and key in self._tasks):
                    continue
                self._tasks[key] = work
                self._errors.pop(key, None)
                heapq.heappush(self._queue, (_AHEAD if ahead else _URGENT, next(self._numbers), key))
            self._start_threads()
            self._changed.notify_all()

    def wait(self, keys: Iterable[Hashable]) -> None:
        """Until these tasks are done.

        Raises:
            Closed: when this was closed, or as `waits_end_when` says.
            Exception: what a task raised.
        """
        left = set(keys)
        stopped = waits_end()
        with self._lock:
            while True:
                for key in list(left):
                    if (error := self._errors.pop(key, None)) is not None:
                        raise error
                    if key not in self._tasks and key not in self._running:
                        left.discard(key)
                if not left:
                    return
                if self._closed or (stopped is not None and stopped()):
                    raise Closed
                self._changed.wait(0.2)

    @property
    def waiting(self) -> int:
        """How many tasks have not begun."""
        return len(self._tasks)

    def forget_ahead(self) -> None:
        """Drop the tasks that nobody waits for: another order has begun."""
        with self._lock:
            kept = [entry for entry in self._queue if entry[0] == _URGENT]
            keys = {key for _, _, key in kept}
            for _, _, key in self._queue:
                if key not in keys:
                    self._tasks.pop(key, None)
            heapq.heapify(kept)
            self._queue = kept

    def close(self) -> None:
        """Begin no task any more; those under way are left to themselves. Harmless when done twice."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._tasks.clear()
            self._changed.notify_all()

    def join(self, end: float) -> None:
        """Wait for the threads after `close`, until this time of `time.monotonic` at most."""
        for thread in self._threads:
            with contextlib.suppress(RuntimeError):
                thread.join(max(0.0, end - time.monotonic()))

    def _start_threads(self) -> None:
        while not self._closed and len(self._threads) < min(self._count, len(self._tasks)):
            name = f"fastpmae-fetch-{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                _, _, key = heapq.heappop(self._queue)
                work = self._tasks.pop(key, None)
                if work is None:  # done already, by a more urgent entry
                    del key
                    continue
                self._running.add(key)
            error: BaseException | None = None
            try:
                work()
            except BaseException as caught:
                error = caught
            with self._lock:
                self._running.discard(key)
                if error is not None:
                    self._errors[key] = error
                self._changed.notify_all()
            # while it waits for the next, a thread keeps no file open that a task was of
            del work, key, error
