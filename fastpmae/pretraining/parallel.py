"""The student over several ranks: whole on each with averaged gradients (DDP), or everything sharded (FSDP2).

Sharded, each rank keeps its share of every weight, gradient, moment and teacher, and a block is whole only while it
is computed. Share by share the numbers are those of DDP, and a checkpoint holds whole tensors, so either goes on with
the other's runs.
"""

import contextlib
import inspect
import warnings
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastpmae.distributed.ranks import Ranks
from fastpmae.model.teachers import Teachers
from fastpmae.model.vit import Student


def wrap_parallel(student: Student, teachers: Teachers, ranks: Ranks, *, shard: bool, accumulate: int) -> nn.Module:
    """The student as the loop calls it: as it is, with its gradients averaged over the ranks, or sharded.

    With `shard` the networks are changed in place, the teachers with the student: their parameters are DTensors from
    here on, and what was on the CPU is on the rank's device.

    Args:
        accumulate: micro-batches of a step.
    """
    if ranks.group is None:
        return student
    if shard:
        _shard(student, teachers, ranks)
        return student
    # Positions are the same on all ranks and need no message a step. torch has renamed the switch.
    known = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    settings: dict[str, Any] = {"gradient_as_bucket_view": True, switch: False}
    # torch's static graph records the first backward pass and cannot leave its messages out, as micro-batches need
    # (2.14: "expect_autograd_hooks_ INTERNAL ASSERT FAILED").
    return DistributedDataParallel(student, static_graph=accumulate == 1, **settings)


def no_sync(parallel: nn.Module) -> AbstractContextManager[None]:
    """Within it gradients add up on their own rank.

    Sharded ones travel all the same: whole gradients would take the memory that sharding is there to save.
    """
    return parallel.no_sync() if isinstance(parallel, DistributedDataParallel) else contextlib.nullcontext()


def _shard(student: Student, teachers: Teachers, ranks: Ranks) -> None:
    # imported here, since it takes a second
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # The student's predictions are a view, and nothing here writes into them.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    assert ranks.group is not None
    mesh = DeviceMesh.from_group(ranks.group, ranks.device.type)

    def apart(*modules: nn.Module | None) -> None:
        for module in modules:
            if module is not None:
                fully_shard(module, mesh=mesh, reshard_after_forward=True)

    apart(*student.encoder.blocks, *student.decoder.blocks, student.head)
    fully_shard(student, mesh=mesh)
    for teacher in teachers.modules().values():
        # Apart again after every pass, unlike a root by default: a teacher follows the student share by share.
        apart(*teacher.encoder.blocks, teacher.encoder, teacher.head)
        register_fsdp_forward_method(teacher.encoder, "encode_folds")
