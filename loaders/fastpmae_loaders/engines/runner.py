"""An engine, the memory of its threads, and the streams now running on it."""

import weakref
from collections.abc import Callable

import numpy as np

from fastpmae_loaders.engines.base import Engine, Job, Source
from fastpmae_loaders.engines.lookahead import Fetched, look_ahead
from fastpmae_loaders.engines.names import ENGINES
from fastpmae_loaders.engines.scratch import Scratch
from fastpmae_loaders.engines.stream import Stream
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.machine import MOST_THREADS


def make_engine(name: str, source: Source) -> Engine:
    """The engine of that name. UserError where there is none, or its package is missing."""
    if name == "native":
        from fastpmae_loaders.engines.native_engine import NativeEngine

        return NativeEngine(source)
    if name == "ffcv":
        from fastpmae_loaders.engines.ffcv_engine import FFCVEngine

        return FFCVEngine(source)
    if name == "torch":
        from fastpmae_loaders.engines.torch_engine import TorchEngine

        return TorchEngine(source)
    if name == "dali":
        from fastpmae_loaders.engines.dali_engine import DALIEngine

        return DALIEngine(source)
    raise UserError(f"engine {name!r} is unknown; there are {', '.join(map(repr, ENGINES))}")


class Runner:
    """Opens the engine at once, so that a missing package is known before the first batch."""

    def __init__(self, source: Source, engine: str, ahead: int) -> None:
        if not 1 <= source.workers <= MOST_THREADS:
            raise UserError(f"workers = {source.workers} must be between 0 and {MOST_THREADS} threads")
        if not 1 <= ahead <= 64:
            raise UserError(f"ahead = {ahead} must be between 1 and 64 batches")
        self._source = source
        self._ahead = ahead
        self._engine = make_engine(engine, source)
        self._workers = self._engine.threads or source.workers
        self._idle: list[Scratch] = []
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()

    def stream(
        self,
        job_of: Callable[[int], Job],
        start: int,
        count: int,
        keys_of: Callable[[int], np.ndarray] | None = None,
    ) -> Stream:
        """A new stream of batches; scratch of streams that ended is used again.

        Args:
            keys_of: what a batch shows (see `make_job`), where that is known before it is made.
        """
        scratches = [self._idle.pop() if self._idle else self._source.scratch() for _ in range(self._workers)]
        stream = Stream(self._engine, job_of, start, count, scratches, self._ahead)
        self._streams.add(stream)
        stream.start()
        if keys_of is not None and isinstance(self._source.samples, Fetched):
            look_ahead(self._source.samples, keys_of, stream, start, count)
        return stream

    def end(self, stream: Stream) -> None:
        """Stop a stream, wait for its threads, keep their scratch. Harmless when done twice."""
        stream.close()
        if stream in self._streams:
            self._streams.discard(stream)
            self._idle.extend(stream.scratches)

    def close(self) -> None:
        """Stop every stream."""
        for stream in list(self._streams):
            self.end(stream)
        self._engine.close()
