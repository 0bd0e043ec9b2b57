"""How long the device has had nothing to do because the next batch was not there."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class Wait(Protocol):
    """A clock that runs from asking for a batch until it is there."""

    def ask(self) -> None:
        """A batch is asked for."""
        ...

    def have(self) -> None:
        """It is there, for what is computed next."""
        ...

    def seconds(self) -> float:
        """What was waited since the last call."""
        ...


class HostWait:
    """On the CPU, where nothing is computed while the loop waits."""

    def __init__(self) -> None:
        self._asked = self._total = 0.0

    def ask(self) -> None:
        """See Wait."""
        self._asked = time.perf_counter()

    def have(self) -> None:
        """See Wait."""
        self._total += time.perf_counter() - self._asked

    def seconds(self) -> float:
        """See Wait."""
        total, self._total = self._total, 0.0
        return total


class DeviceWait:
    """On a GPU, which goes on computing while the loop waits: measured by events on the current stream.

    One event is recorded when a batch is asked for and one when it is there. A GPU that is still at work reaches both
    one after the other; where it has done everything it was given, the time between them is the time for which it had
    nothing to do, and that for which the stream waited for the batch's copy. What the host takes to launch a step's
    work is no waiting for data, and is not in it: while that is launched no batch is asked for.

    The host waits for none of it, but stays within bounds: it asks for a batch only when the GPU has reached the point
    at which `most` batches before were asked for. So there is a limit to the batches that lie in the GPU's memory, and
    to the events kept here.

    Args:
        most: batches of one step of the optimizer.
        make_event: a test's own.
    """

    def __init__(self, most: int, make_event: Callable[[], Any] | None = None) -> None:
        self._most = most
        # "blocking": who waits for one sleeps, and leaves the core to the loader
        self._make = make_event or (lambda: torch.cuda.Event(enable_timing=True, blocking=True))
        self._spare: list[Any] = []
        self._open: deque[tuple[Any, Any]] = deque()
        self._asked: Any = None
        self._total = 0.0

    def ask(self) -> None:
        """See Wait."""
        if len(self._open) >= self._most:
            self._open[-self._most][0].synchronize()
        self._close()
        self._asked = self._recorded()

    def have(self) -> None:
        """See Wait."""
        self._open.append((self._asked, self._recorded()))

    def seconds(self) -> float:
        """See Wait. Batches that the GPU has not reached count in the next call."""
        self._close()
        total, self._total = self._total, 0.0
        return total

    def _recorded(self) -> Any:
        event = self._spare.pop() if self._spare else self._make()
        event.record()
        return event

    def _close(self) -> None:
        """Take the times of the batches that the GPU has reached."""
        while self._open and self._open[0][1].query():
            asked, there = self._open.popleft()
            self._total += asked.elapsed_time(there) / 1000
            self._spare += (asked, there)
