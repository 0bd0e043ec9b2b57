"""The student over several ranks: whole on each with averaged gradients (DDP), or everything sharded (FSDP2).

Sharded, each rank keeps its share of every weight, gradient, moment and teacher, and a block is whole only while it
is computed. Share by share the numbers are those of DDP, and a checkpoint holds whole tensors, so either goes on with
the other's runs.
"""

import warnings

from torch import nn

from fastpmae.distributed.data_parallel import average_gradients
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
    return average_gradients(student, static_graph=accumulate == 1)


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
        if teacher.head is not None:
            register_fsdp_forward_method(teacher.head, "uncentred")
