"""Tensors of which each rank holds a part (FSDP2's DTensors): from them to parts and wholes, and back.

They are known by their methods: importing DTensor takes a second, which runs without shards need not wait for.
"""

from torch import Tensor, nn


def comes_apart(module: nn.Module) -> bool:
    """Whether a module's weights are whole while it computes and in shards again afterwards."""
    return hasattr(module, "reshard")


def in_shards(tensor: Tensor) -> bool:
    """Whether the ranks hold parts of it."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor in shards; any other tensor as it is."""
    return tensor.to_local() if in_shards(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor in shards, for which all ranks must ask; any other tensor as it is."""
    return tensor.full_tensor() if in_shards(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def shared_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has whole, on the device of `like` and in shards where `like` is; nothing is sent."""
    if not in_shards(like) or tensor.ndim == 0:
        return tensor.to(like.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
