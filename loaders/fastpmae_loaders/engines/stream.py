"""Threads that make batches ahead of the consumer.

Every thread works on the earliest batch that has rows left and then goes on to the next, so none waits at
a batch's end for the slowest. No numba parallel region is used: its thread pools cannot be entered twice.
"""

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

from fastpmae_loaders.engines.base import Engine, Job
from fastpmae_loaders.engines.scratch import Scratch
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.stores.client import Closed, waits_end_when


class Stream:
    """Batches start ... count-1, made in order of need by `workers` threads, at most `ahead` before their time.

    `job_of(number)` makes the empty job of a batch; `scratches` are lent to the threads and given back.
    Nothing runs before `start`. An exception in a thread reaches the consumer in `take`; `close` ends every thread
    and waits for it.
    """

    def __init__(
        self,
        engine: Engine,
        job_of: Callable[[int], Job],
        start: int,
        count: int,
        scratches: list[Scratch],
        ahead: int,
    ) -> None:
        self.scratches = scratches
        self._engine = engine
        self._job_of = job_of
        self._taken = self._begun = start
        self._count = count
        self._ahead = ahead
        self._jobs: dict[int, Job] = {}
        self._error: BaseException | None = None
        self._stopped = False
        # a forked child has none of the threads, and whatever lock one of them held
        self._process = os.getpid()
        # entered by itself and not by way of the condition, whose `with` can be interrupted while it holds the lock
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._threads = [
            threading.Thread(target=self._work, args=(scratch,), name=f"fastpmae-loader-{i}", daemon=True)
            for i, scratch in enumerate(scratches)
        ]

    def start(self) -> None:
        """Let the threads run. Who is to end them has to know of the stream before: an interrupt may fall in here."""
        _open.add(self)
        _rest_at_the_end()
        for thread in self._threads:
            thread.start()

    @property
    def closed(self) -> bool:
        """Whether its threads have been ended."""
        return self._stopped

    @property
    def reached(self) -> int:
        """The first batch that has not been begun."""
        return max(self._begun, self._taken)

    def take(self, wait: bool = True) -> Job | None:
        """The next batch, in order; None when there is no more. Raises what a thread raised.

        Without `wait` None also where it is not ready, and what a thread raised is left to the next call that waits.

        Raises:
            UserError: in a process that was forked from the one that made the stream.
        """
        if os.getpid() != self._process:
            raise UserError(
                f"process {os.getpid()} goes on with an iteration that process {self._process} began before it was "
                "forked: its threads are not here, begin a new iteration"
            )
        with self._lock:
            if self._taken >= self._count:
                return None
            number = self._taken
            while not self._stopped and self._error is None:
                job = self._jobs.get(number)
                if job is not None and job.left == 0:
                    break
                if not wait:
                    return None
                self._changed.wait()
            if not wait and self._error is not None:
                return None
            if self._error is not None:
                raise self._error
            if not self._stopped:
                job = self._jobs.pop(number)
                self._taken = number + 1
                self._changed.notify_all()
                return job
        _rest_at_the_end()
        return None

    def close(self) -> None:
        """End the threads and wait until they are gone. Harmless when done twice."""
        if os.getpid() != self._process:
            self._stopped = True
            return
        with self._lock:
            self._stopped = True
            for job in self._jobs.values():
                # no row is left to take: the threads come back after the one each is at
                job.counter[0] = len(job.indices)
            self._jobs.clear()
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                # an interpreter that is shutting down no longer lets threads be joined
                with suppress(RuntimeError):
                    thread.join()
        _open.discard(self)

    def _next_job(self, number: int) -> tuple[int, Job | None]:
        """The first job from `number` on that the consumer has not taken, once it may be begun."""
        with self._lock:
            while True:
                number = max(number, self._taken)
                if self._stopped or self._error is not None or number >= self._count:
                    return number, None
                if number <= self._taken + self._ahead:
                    break
                self._changed.wait()
            job = self._jobs.get(number)
            if job is None:
                job = self._jobs[number] = self._job_of(number)
                self._begun = max(self._begun, number + 1)
            return number, job

    def _work(self, scratch: Scratch) -> None:
        number = 0
        try:
            while True:
                number, job = self._next_job(number)
                if job is None:
                    return
                with waits_end_when(lambda: self._stopped):
                    done = self._engine.fill(job, scratch)
                number += 1
                if done:
                    with self._lock:
                        job.left -= done
                        if job.left == 0:
                            self._changed.notify_all()
        except BaseException as error:
            with self._lock:
                # what ends a wait for a store, where the stream is closed, is none of anybody's business
                if self._error is None and not (self._stopped and isinstance(error, Closed)):
                    self._error = error
                self._changed.notify_all()


_open: weakref.WeakSet[Stream] = weakref.WeakSet()
_ending = False
"""Whether the process is at its end."""


def _rest_at_the_end() -> None:
    """Keep a program's own daemon thread from beginning anew while the process ends.

    Up to Python 3.13 the interpreter ends such a thread wherever it next takes the GIL. Within torch or compiled code,
    where it would soon be again, that aborts the process; here it does not.
    """
    if _ending and threading.current_thread() is not threading.main_thread():
        threading.Event().wait()


@atexit.register
def _close_all() -> None:
    """End what the program left open while threads can still end: later on Python 3.13 waits for them for ever."""
    global _ending
    _ending = True
    for stream in list(_open):
        stream.close()
