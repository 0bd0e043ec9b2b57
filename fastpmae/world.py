"""The ranks of a run: who we are, what we compute on, and what we agree on."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastpmae.errors import UserError

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """One process among `size`; a run without torchrun is the only one of a world of 1."""

    rank: int
    size: int
    ranks_here: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def first(self) -> bool:
        """Whether this rank speaks and writes."""
        return self.rank == 0

    def agree(self, number: int) -> int:
        """The largest number that any rank brings, the same on all of them."""
        if self.group is None:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        return int(largest)

    def from_first(self, function: Callable[[], Result]) -> Result:
        """What `function` returns on the first rank, on every rank; a UserError it raises is raised on all."""
        if self.group is None:
            return function()
        answer: list[object] = [None, None]
        if self.first:
            try:
                answer[0] = function()
            except UserError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, src=0, group=self.group)
        if answer[1] is not None:
            raise UserError(str(answer[1]))
        return answer[0]  # type: ignore[return-value]

    def largest(self, value: Tensor) -> Tensor:
        """The largest of the ranks' values, on the device and without waiting for it."""
        if self.group is not None:
            dist.all_reduce(value, dist.ReduceOp.MAX, self.group)
        return value

    def gathered(self, value: Tensor) -> Tensor:
        """The ranks' values one after the other."""
        if self.group is None:
            return value
        values = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(values, value, self.group)
        return torch.cat(values)


def choose_device(device: Literal["auto", "cpu", "cuda"], number: int = 0) -> torch.device:
    """The CPU, or GPU `number` of this machine. Raises UserError when a GPU is asked for that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; check the driver, or choose --device cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        raise UserError(f"rank {number} of this machine has no GPU: there are {torch.cuda.device_count()} here")
    return torch.device("cuda", number)


@contextlib.contextmanager
def join_world(device: Literal["auto", "cpu", "cuda"]) -> Iterator[World]:
    """Join the other ranks where torchrun (or SLURM through it) started several, and choose the device.

    Raises:
        UserError: when a GPU is asked for that is not there.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, ranks_here = (
        int(os.environ.get("LOCAL_RANK", 0)),
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(0, 1, 1, chosen, None)
        return
    # gloo carries what the hosts agree on, so that agreeing never waits for a GPU.
    dist.init_process_group("gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield World(rank, size, ranks_here, chosen, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
