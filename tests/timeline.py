"""A GPU that is not there: streams that do what they are given one after the other, in pretended milliseconds."""

import contextlib
from collections.abc import Iterator
from typing import Any


class TimedEvent:
    """As torch.cuda.Event."""

    def __init__(self, gpu: "GPU") -> None:
        self.gpu, self.reached = gpu, 0.0
        gpu.events += 1

    def record(self, stream: "TimedStream | None" = None) -> None:
        stream = stream or self.gpu.current
        self.reached = stream.do(0)
        self.gpu.told.append(("record", stream.name))

    def query(self) -> bool:
        return self.reached <= self.gpu.now

    def synchronize(self) -> None:
        self.gpu.now = max(self.gpu.now, self.reached)

    def elapsed_time(self, other: "TimedEvent") -> float:
        assert self.query()
        assert other.query()
        return other.reached - self.reached


class TimedStream:
    """As torch.cuda.Stream."""

    def __init__(self, gpu: "GPU", name: str) -> None:
        self.gpu, self.name, self.free = gpu, name, 0.0

    def do(self, milliseconds: float) -> float:
        """Work that the host gives it now; when it is done."""
        self.free = max(self.free, self.gpu.now) + milliseconds
        return self.free

    def wait_event(self, event: TimedEvent) -> None:
        self.free = max(self.free, event.reached)
        self.gpu.told.append(("wait", self.name))


class GPU:
    """Stands for `torch.cuda`. `now` is the host's clock, `told` what streams were told to do, in the host's order."""

    def __init__(self) -> None:
        self.now, self.events = 0.0, 0
        self.told: list[tuple[str, Any]] = []
        self.main = self.current = TimedStream(self, "main")

    def Event(self) -> TimedEvent:
        return TimedEvent(self)

    def Stream(self, device: Any) -> TimedStream:
        return TimedStream(self, "side")

    def current_stream(self, device: Any) -> TimedStream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: TimedStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before
