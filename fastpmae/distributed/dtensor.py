"""Tensors of which each rank holds a part (FSDP2's DTensors): from them to local and whole tensors, and back.

They are known by their methods: importing DTensor takes a second, which runs without --shard need not wait for.
"""

from torch import Tensor, nn


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's weights are whole while it computes and sharded again afterwards."""
    return hasattr(module, "reshard")


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the ranks hold parts of it."""
    return hasattr(tensor, "full_tensor")


def to_local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def to_full(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, for which all ranks must ask; any other tensor as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has whole, on the device of `like` and sharded where `like` is; nothing is sent."""
    if not is_dtensor(like) or tensor.ndim == 0:
        return tensor.to(like.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
