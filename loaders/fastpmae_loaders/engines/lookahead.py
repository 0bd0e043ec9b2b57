"""What lies in a store is fetched before its time: the order of an epoch is known in advance."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from fastpmae_loaders.engines.stream import Stream
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.stores.client import Closed, waits_end_when

_PAUSE = 0.02


@runtime_checkable
class Fetched(Protocol):
    """Images that have to be fetched; `window` is how many pages may be asked for before their time."""

    def __len__(self) -> int: ...

    @property
    def window(self) -> int: ...

    def ahead(self, indices: np.ndarray) -> int:
        """Have the pages of some images fetched; how many were not there."""
        ...


def look_ahead(
    samples: Fetched, keys_of: Callable[[int], np.ndarray], stream: Stream, start: int, count: int
) -> threading.Thread:
    """A thread that asks for the pages of batches start ... count - 1 before the stream comes to them; it ends with it.

    Args:
        keys_of: the samples of a batch, by its number; beyond the number of samples they begin anew.
    """

    def run() -> None:
        # batches that the stream has yet to begin, and how many pages were asked for them
        asked: deque[tuple[int, int]] = deque()
        # what is wrong with a file is told by the batch that needs it
        with contextlib.suppress(UserError, Closed), waits_end_when(lambda: stream.closed):
            for number in range(start, count):
                while True:
                    if stream.closed:
                        return
                    while asked and asked[0][0] < stream.reached:
                        asked.popleft()
                    if sum(pages for _, pages in asked) < samples.window:
                        break
                    time.sleep(_PAUSE)
                if number >= stream.reached:
                    asked.append((number, samples.ahead(keys_of(number) % len(samples))))

    thread = threading.Thread(target=run, name="fastpmae-lookahead", daemon=True)
    thread.start()
    return thread
