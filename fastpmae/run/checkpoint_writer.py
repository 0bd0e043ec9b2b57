"""Checkpoints written beside training: a copy of every tensor at one moment, and a thread that writes it.

In one file by the first rank, or in shards by all of them.
"""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastpmae.distributed.dtensor import is_dtensor, to_full, to_local
from fastpmae.distributed.ranks import Ranks
from fastpmae.run.checkpoint import checkpoints_in, remove_others, write_checkpoint
from fastpmae.run.shards import on_host, write_shards
from fastpmae_loaders.errors import RunError, UserError

BLOCK = 64 * 2**20
"""Bytes of pinned memory that are asked for at a time: torch rounds each request up to a power of two."""
ALIGNMENT = 64


class Saver:
    """Writes checkpoints beside training, one at a time; leaving it waits for the one that is being written.

    A write that is not done when the next is due is waited for. So which checkpoints there are follows from the
    settings and not from the disk, and there is never more than one copy of a run in memory.

    Args:
        device: what the run computes on.
        keep: older checkpoints to keep beside the newest.
        first: whether this rank writes. The others only take part in putting sharded tensors together.
        written: told of each checkpoint that is written.
    """

    def __init__(
        self,
        device: torch.device,
        keep: int,
        *,
        is_main: bool = True,
        written: Callable[[Path], None] = lambda path: None,
    ):
        self.device, self.keep, self.is_main, self.written = device, keep, is_main, written
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.gpu = _FromGpu(device) if is_main and device.type == "cuda" else None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What ends the run is told, not what became of a write that nobody will ask for.
        with contextlib.nullcontext() if error is None else contextlib.suppress(Exception):
            self.wait()

    @property
    def failed(self) -> bool:
        """Whether a write went wrong; the next `wait` or `save` raises how."""
        return self.error is not None

    def save(self, path: Path, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Copy the tensors as the work submitted so far leaves them, and write them to `path` from then on.

        All ranks call it where tensors are sharded.

        Args:
            tensors: on the device or the host; they may change as soon as this returns, on a GPU after
                `before_update`.
            progress: plain values for the checkpoint's header.

        Raises:
            RunError: when the checkpoint before could not be written.
        """
        self.wait()
        copies = {}
        for name, tensor in tensors.items():
            if is_dtensor(tensor):
                together = to_full(tensor)
                # Here and now, so that a GPU has one of them whole at a time.
                if self.is_main:
                    copies[name] = self._room(together).copy_(together)
        if not self.is_main:
            return
        with contextlib.nullcontext() if self.gpu is None else self.gpu.beside():
            for name, tensor in tensors.items():
                if name not in copies:
                    copies[name] = self._room(tensor).copy_(tensor.detach(), non_blocking=True)
        # The tensors go along: some are there for this alone, and their memory is to wait for the copy.
        self._begin(path, copies, progress, tensors)

    def _begin(
        self, path: Path, copies: dict[str, Tensor], progress: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        arguments = (path, copies, copy.deepcopy(progress), tensors)
        # As a daemon it does not hold up a process that a user has interrupted while it was waited for.
        self.thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self.thread.start()

    def before_update(self) -> None:
        """To be called before anything that changes tensors in place: a GPU gets there when they are copied."""
        if self.gpu is not None:
            self.gpu.hold()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            RunError: when the last checkpoint could not be written; once.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.gpu is not None:
            self.gpu.reuse()
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _room(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype) if self.gpu is None else self.gpu.room(like)

    def _write(self, path: Path, copies: dict[str, Tensor], progress: dict[str, Any], _: dict[str, Tensor]) -> None:
        try:
            if self.gpu is not None:
                self.gpu.copied.synchronize()
            self._write_to(path, copies, progress)
            self.written(path)
        except Exception as error:
            self.error = error

    def _write_to(self, path: Path, copies: dict[str, Tensor], progress: dict[str, Any]) -> None:
        write_checkpoint(path, copies, progress, self.keep)


class ShardSaver(Saver):
    """The same for checkpoints in shards: every rank copies and writes its own part, and nothing is put together.

    Args:
        ranks: all of them make one, at the same time.
        keep: older checkpoints to keep beside the newest.
        written: on each rank, told of each checkpoint that all have written.
    """

    def __init__(self, ranks: Ranks, keep: int, *, written: Callable[[Path], None] = lambda path: None):
        super().__init__(ranks.device, keep, written=written)
        self.first = ranks.is_main
        self.group = ranks.group_apart()

    def save(self, path: Path, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """As `Saver.save`, on all ranks."""
        self.wait()
        with contextlib.nullcontext() if self.gpu is None else self.gpu.beside():
            copies = {}
            for name, tensor in tensors.items():
                own = to_local(tensor.detach())
                copies[name] = self._room(own).copy_(own, non_blocking=True)
        self._begin(path, {name: self._placed(tensors[name], held) for name, held in copies.items()}, progress, tensors)

    def _placed(self, tensor: Tensor, held: Tensor) -> Tensor:
        return on_host(tensor, held, self._mesh) if is_dtensor(tensor) else held

    @cached_property
    def _mesh(self) -> Any:
        from torch.distributed.device_mesh import DeviceMesh

        assert self.group is not None
        return DeviceMesh.from_group(self.group, "cpu")

    def _write_to(self, path: Path, copies: dict[str, Tensor], progress: dict[str, Any]) -> None:
        others = checkpoints_in(path.parent.parent)
        try:
            write_shards(path, copies, progress, self.group)
        except (UserError, RunError, OSError) as error:
            raise RunError(f"{error}. Last checkpoint: {next(iter(others), 'none yet')}") from None
        if self.first:
            remove_others(path, others, self.keep)


class _FromGpu:
    """A stream for copies to the host, and pinned host memory, which is asked for once and used for every copy."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream, self.copied = torch.cuda.Stream(device), torch.cuda.Event(blocking=True)
        self.blocks: list[Tensor] = []
        self.block = self.used = 0

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Copies within it wait for the work submitted so far, and nothing waits for them."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        self.copied.record(self.stream)

    def hold(self) -> None:
        """Work submitted from here on waits for the copies."""
        torch.cuda.current_stream(self.device).wait_event(self.copied)

    def reuse(self) -> None:
        """Give all room out anew."""
        self.block = self.used = 0

    def room(self, like: Tensor) -> Tensor:
        """Host memory for a tensor."""
        size = like.numel() * like.element_size()
        while self.block < len(self.blocks) and self.used + size > len(self.blocks[self.block]):
            self.block, self.used = self.block + 1, 0
        if self.block == len(self.blocks):
            self.blocks.append(pinned(max(size, BLOCK)))
        place = self.blocks[self.block][self.used : self.used + size]
        self.used += -(-size // ALIGNMENT) * ALIGNMENT
        return place.view(like.dtype).view(like.shape)


def pinned(size: int) -> Tensor:
    """Bytes that a GPU can write to by itself; where the system locks no more memory, any others.

    To those a copy takes longer, and the host waits for it.
    """
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(size, dtype=torch.uint8)
