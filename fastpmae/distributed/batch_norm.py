"""BatchNorm over the images of all ranks. torch's SyncBatchNorm does that on GPUs alone."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn


class _Sum(torch.autograd.Function):
    """A tensor's sum over the ranks; so is its gradient, since every rank's loss reads it."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        context.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=context.group)
        return total, None


class RankBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with the means and variances of all ranks' maps, of which each rank may have another number."""

    group: dist.ProcessGroup

    def forward(
        self, input: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        if not self.training:
            return super().forward(input)
        maps = input.float()
        count = maps.new_tensor([maps.numel() / maps.shape[1]])
        dist.all_reduce(count, group=self.group)
        mean = _total(maps.sum(dim=(0, 2, 3)), self.group) / count
        centred = maps - mean[:, None, None]
        variance = _total(centred.square().sum(dim=(0, 2, 3)), self.group) / count
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), self.momentum)
            self.num_batches_tracked += 1
        normal = centred * (variance + self.eps).rsqrt()[:, None, None]
        return (normal * self.weight[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def _total(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    found = _Sum.apply(tensor, group)
    assert isinstance(found, Tensor)
    return found


def over_ranks(network: nn.Module, group: dist.ProcessGroup | None, device: torch.device) -> nn.Module:
    """The network with every BatchNorm2d taken over all ranks; its weights stay its own, under the same names."""
    if group is None:
        return network
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network, group)
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = RankBatchNorm2d
            module.group = group  # pyright: ignore[reportArgumentType]
    return network
