"""Threads that fetch parts of files: those that somebody waits for first, and then those that are known to be next."""

import contextlib
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Hashable, Iterable

from fastpmae_loaders.stores.client import Closed

THREADS = 16
"""Requests at a time: a store answers one with some 100 MB/s."""
_URGENT, _AHEAD = 0, 1


class Fetcher:
    """Does tasks by their keys, each once at a time. Threads begin with the first task and end with `close`.

    A task's error goes to whoever waits for it; of one that nobody waits for nothing is said, and it is tried again
    when it is asked for.
    """

    def __init__(self, threads: int = THREADS) -> None:
        self._count = threads
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
        """Have tasks done, in this order; those that are asked for without `ahead` come before all others."""
        with self._lock:
            for key, work in tasks:
                if key in self._running or (ahead and key in self._tasks):
                    continue
                self._tasks[key] = work
                self._errors.pop(key, None)
                heapq.heappush(self._queue, (_AHEAD if ahead else _URGENT, next(self._numbers), key))
            self._start_threads()
            self._changed.notify_all()

    def wait(self, keys: Iterable[Hashable], stopped: Callable[[], bool]) -> None:
        """Until these tasks are done.

        Args:
            stopped: whether whoever waits has been told to end.

        Raises:
            Closed: when it has, or this was closed.
            Exception: what a task raised.
        """
        left = set(keys)
        with self._lock:
            while True:
                for key in list(left):
                    if (error := self._errors.pop(key, None)) is not None:
                        raise error
                    if key not in self._tasks and key not in self._running:
                        left.discard(key)
                if not left:
                    return
                if self._closed or stopped():
                    raise Closed
                self._changed.wait(0.2)

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
