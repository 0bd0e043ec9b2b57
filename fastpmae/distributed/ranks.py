"""The ranks of a run: who we are, what we compute on, and what we agree on."""

import atexit
import contextlib
import gc
import importlib
import os
import re
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastpmae.distributed.rendezvous import meet
from fastpmae_kernels.toolchain import missing_tools
from fastpmae_loaders.errors import AlreadySaid, Interrupted, RunError, UserError

Result = TypeVar("Result")


@dataclass
class Ranks:
    """One process among `size`; a run without torchrun is the only one of 1.

    The group is None again as soon as it is left: see _leave.
    """

    rank: int
    size: int
    local_size: int
    device: torch.device
    group: dist.ProcessGroup | None
    apart: list[Callable[[], object]] = field(default_factory=list)
    """Weak references to the groups that `group_apart` has made."""

    def group_apart(self) -> dist.ProcessGroup | None:
        """A group of the same ranks, over gloo, in which a thread can talk while the loop does in the other; None for a
        single rank. All ranks ask for it. Whoever is gone is noticed in the loop, so that in here nobody is hurried.
        """
        if self.group is None:
            return None
        group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        assert isinstance(group, dist.ProcessGroup)
        self.apart.append(weakref.ref(group))
        return group

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks and writes."""
        return self.rank == 0

    def max_over_ranks(self, *numbers: int) -> tuple[int, ...]:
        """Of each number the largest that any rank brings, the same on all of them."""
        if self.group is None:
            return numbers
        largest = torch.tensor(numbers)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        return tuple(largest.tolist())

    def sum_over_ranks(self, number: int) -> int:
        """The sum of the ranks' numbers, the same on all of them."""
        if self.group is None:
            return number
        total = torch.tensor(number)
        dist.all_reduce(total, group=self.group)
        return int(total)

    def broadcast_from_main(self, function: Callable[[], Result]) -> Result:
        """What `function` returns on the first rank, on every rank; a UserError or RunError is raised on all."""
        if self.group is None:
            return function()
        answer: list[object] = [None, None, None]
        if self.is_main:
            try:
                answer[0] = function()
            except (UserError, RunError) as error:
                answer[1:] = UserError if isinstance(error, UserError) else RunError, str(error)
        dist.broadcast_object_list(answer, src=0, group=self.group)
        if isinstance(answer[1], type):
            raise answer[1](answer[2]) from (None if self.is_main else _OfFirst())
        return answer[0]  # type: ignore[return-value]

    def max_on_device(self, value: Tensor) -> Tensor:
        """The largest of the ranks' values, on the device and without waiting for it."""
        if self.group is not None:
            dist.all_reduce(value, dist.ReduceOp.MAX, self.group)
        return value

    def all_gather(self, value: Tensor) -> Tensor:
        """The ranks' values one after the other."""
        if self.group is None:
            return value
        values = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(values, value, self.group)
        return torch.cat(values)


def mean_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A copy of the values, each the mean over the ranks of the group."""
    values = values.clone()
    if group is not None:
        dist.all_reduce(values, group=group)
        values /= group.size()
    return values


class _OfFirst(Exception):
    """The cause of an error that the first rank raises at the same place, and tells of."""


def choose_device(device: Literal["auto", "cpu", "cuda"], number: int = 0) -> torch.device:
    """The CPU, or GPU `number` of this machine.

    Raises:
        UserError: when a GPU is asked for that is not there, or cannot be used for want of what Triton needs.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; check the driver, or choose --device cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        raise UserError(f"rank {number} of this machine has no GPU: there are {torch.cuda.device_count()} here")
    if missing := missing_tools():
        raise UserError(
            f"Triton needs {missing} to start its kernels on the GPU, and finds none here: install them (on Debian and "
            "Ubuntu, as root: apt-get install gcc python3-dev), name a compiler by CC, or choose --device cpu"
        )
    return torch.device("cuda", number)


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies numbers of bf16 itself. CPUs and older GPUs emulate it, which is slower than fp32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on the device, without waiting for what the device has still to do.

    From memory that the system may move away a copy waits: a GPU's copy therefore starts in pinned memory.
    """
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@contextlib.contextmanager
def join_ranks(device: Literal["auto", "cpu", "cuda"], patience: float = 10.0) -> Iterator[Ranks]:
    """Join the other ranks where torchrun (or SLURM through it) started several, and choose the device.

    An error within it ends every rank: the first to notice says why, the others end with AlreadySaid.

    Args:
        patience: minutes that a rank waits in a message for the others before it gives up.

    Raises:
        UserError: when a GPU is asked for that is not there.
        RunError: when another rank ended or does not answer.
        AlreadySaid: in place of an error when another rank has said why the run ends.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, ranks_here = (
        int(os.environ.get("LOCAL_RANK", 0)),
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
    if size == 1:
        chosen = choose_device(device, local_rank)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        yield Ranks(0, 1, 1, chosen, None)
        return
    ranks = Ranks(rank, size, ranks_here, torch.device("cpu"), None)
    with contextlib.ExitStack() as stack:
        stack.callback(_leave, ranks)
        voice = stack.enter_context(_one_voice(patience))
        chosen = choose_device(device, local_rank)
        on_gpu = chosen.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(chosen)
        # Imported while there is a group, as DDP would, its functions keep the group for good, as a default value.
        importlib.import_module("torch.distributed.nn.functional")
        limit = timedelta(minutes=patience)
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        voice.attempt = meet(store, rank, size, limit)
        # gloo carries what the hosts agree on, so that agreeing never waits for a GPU. NCCL is told its GPU, and so
        # connects here, where a failure has a name, and not in the first message.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore(voice.attempt, store),
            rank=rank,
            world_size=size,
            timeout=limit,
            device_id=chosen if on_gpu else None,
        )
        ranks.device, ranks.group = chosen, dist.group.WORLD
        yield ranks


def _leave(ranks: Ranks) -> None:
    """Take the ranks' connection down, with the threads that work for it.

    A thread of gloo's lets go of a tensor only after it has told us that the message is through, and needs Python's
    lock for it. One that comes to this while the interpreter ends is ended by the interpreter, within a destructor: the
    C++ library then aborts the process ("terminate called without an active exception", SIGABRT), after its work was
    done. Taking the group down waits for its threads, but happens only when nobody refers to the group any more: what
    still does (FSDP, a user's own variable, the frames of an error on its way out) is met at the exit.
    """
    ranks.group = None
    if dist.group.WORLD is not None:
        groups = [weakref.ref(dist.group.WORLD), *ranks.apart]
        dist.destroy_process_group()
        for group in groups:
            if group() is not None:
                atexit.register(_await_threads, group)


def _await_threads(group: Callable[[], object], patience: float = 10.0) -> None:
    """Wait until the threads of a group are gone, or have all been asleep for three looks, for `patience` s at most."""
    gc.collect()
    until, asleep = time.monotonic() + patience, 0
    while group() is not None and asleep < 3 and time.monotonic() < until:
        time.sleep(0.01)  # who waits for Python's lock has it now
        asleep = asleep + 1 if set(_states("pt_gloo_runloop")) <= {"S"} else 0


def _states(name: str) -> list[str]:
    """What the threads of this process that have this name do, as Linux says it: S sleeps, R runs or wants to."""
    found = []
    for status in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            _, _, told = status.read_text().partition(" (")
            told, _, rest = told.rpartition(") ")
            if told == name:
                found.append(rest[0])
    return found


class _Voice:
    """One for all ranks of an attempt: the first of them to ask has it."""

    def __init__(self) -> None:
        # Until the ranks have met, the best there is: each machine counts its own restarts.
        self.attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

    def is_mine(self) -> bool:
        """Whether this rank is the first to ask, or nobody can be asked."""
        try:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            return dist.TCPStore(*address, timeout=timedelta(seconds=5)).add(f"fastpmae/said/{self.attempt}", 1) == 1
        except (RuntimeError, KeyError):
            return True


@contextlib.contextmanager
def _one_voice(patience: float) -> Iterator[_Voice]:
    """Of all ranks the first to end by an error says so; what breaks off on the others after it gets no sentence."""
    voice = _Voice()
    try:
        yield voice
    except Interrupted as stopped:  # all ranks stop in good order, and know the same of it
        stopped.is_main = os.environ["RANK"] == "0"
        raise
    except UserError as error:
        if isinstance(error.__cause__, _OfFirst) or not voice.is_mine():
            raise AlreadySaid(2) from None
        raise
    except RuntimeError as error:
        # gloo's errors have no type of their own, but name the file they come from
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            voice.is_mine()
            raise
        if not voice.is_mine():
            raise AlreadySaid(1) from None
        raise RunError(
            f"another rank ended without a word or has not answered for {patience:g} minutes, so rank "
            f"{os.environ['RANK']} ends too ({_reason(error)}). Killed? Out of memory? torchrun names it "
            "below. --resume continues from the newest checkpoint"
        ) from None
    except Exception as error:
        if isinstance(error.__cause__, _OfFirst) or (not voice.is_mine() and isinstance(error, RunError)):
            raise AlreadySaid(1) from None
        raise


def _reason(error: RuntimeError) -> str:
    """The first sentence of gloo's error, without the place in its source."""
    return re.sub(r"^\[\S+\] ", "", str(error).split(". ")[0].splitlines()[0])
