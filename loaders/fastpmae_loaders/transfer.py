"""The way to a GPU: copies on a stream of their own, so that they run while the taker's stream computes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fastpmae_loaders.batch import Batch
from fastpmae_loaders.errors import UserError

Load = TypeVar("Load", Batch, Tensor)


@dataclass(frozen=True)
class Sent(Generic[Load]):
    """What is on its way to a device, and the event after which it is there (None: it is there already)."""

    load: Load
    there: Any


def device_named(device: torch.device | str | None) -> torch.device | None:
    """The device of that name; None is the host's memory.

    Raises:
        UserError: for a name that torch does not know, for a GPU that is not there, and for a device that does not take
            every tensor of a batch, which holds float64.
    """
    try:
        found = None if device is None else torch.device(device)
    except RuntimeError:
        raise UserError(f"device is {device!r}; expected one that torch has, such as cpu or cuda:0") from None
    if found is not None and found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {str(device)!r}, and torch finds no GPU here: leave device out, or name 'cpu'")
    if found is not None and found.type == "cuda" and 0 < torch.cuda.device_count() <= (found.index or 0):
        raise UserError(
            f"device is {str(device)!r}, and this machine's GPUs are cuda:0 to cuda:{torch.cuda.device_count() - 1}"
        )
    if found is not None and found.type == "mps":
        raise UserError("device is 'mps', which has no float64, and batches hold some: leave it out and move the views")
    return found


def pinned(asked: bool | None, on_gpu: bool) -> bool:
    """Whether batches are made in memory that the system leaves where it is. UserError without a GPU to copy it to."""
    if asked and not torch.cuda.is_available():
        raise UserError("pin_memory=True is for copies to a GPU, and torch finds none here: leave it out")
    return on_gpu if asked is None else asked


class Transfer:
    """Sends what lies in pinned memory to `device`, and hands it over to whichever stream is the taker's.

    To another device than a GPU it is copied at once, and what is there already stays as it is.

    Args:
        cuda: `torch.cuda`, or what stands for it in a test.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._cuda = cuda
        # One for all batches: memory that is given back serves the stream alone that it was first asked for on.
        self._stream: Any = None
        # Iterations of a loader in several threads send by the same way.
        self._lock = threading.Lock()
        self._kept: deque[tuple[Any, Any]] = deque()

    def send(
        self,
        load: Load,
        then: Callable[[Load], Load] | None = None,
        before: Callable[[], None] | None = None,
    ) -> Sent[Load]:
        """Begin to copy, and let `then` change the copy on the device; the host waits for neither.

        `before` lets the copy's stream, which is current in it, wait for what is still being made on the device.

        The host's memory is kept until its copy is made, so that nobody writes to it before.
        """
        if not self.on_gpu:
            moved = load.to(self.device)
            return Sent(moved if then is None else then(moved), None)
        with self._lock:
            if self._stream is None:
                self._stream = self._cuda.Stream(self.device)
            while self._kept and self._kept[0][0].query():
                self._kept.popleft()
            with self._cuda.stream(self._stream):
                if before is not None:
                    before()
                moved = load.to(self.device, non_blocking=True)
                if then is not None:
                    moved = then(moved)
                there = self._cuda.Event()
                there.record(self._stream)
            self._kept.append((there, load))
        return Sent(moved, there)

    def take(self, sent: Sent[Load]) -> Load:
        """What was sent, for the current stream to use from now on as if it had been made there.

        That stream waits for the copy; the host does not. The memory is used again only when everything is done that
        the stream has been given by the time the tensors are dropped.
        """
        if sent.there is not None:
            stream = self._cuda.current_stream(self.device)
            stream.wait_event(sent.there)
            sent.load.record_stream(stream)
        return sent.load

    def carry(self, tensor: Tensor) -> Tensor:
        """A tensor of the host's, of any memory, on the device for the current stream.

        From memory that the system may move away the copy would wait for what the GPU has still to do.
        """
        return self.take(self.send(tensor.pin_memory() if self.on_gpu else tensor))
