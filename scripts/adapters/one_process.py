"""What DINOv2 takes from xformers and from torch's sharding, for one process on a CPU."""

import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed.fsdp as sharding
from torch import Tensor, nn
from torch.nn import functional as F


class Packed:
    """How sequences lie in one row: each attends to itself alone. For xformers' BlockDiagonalMask."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._batch_sizes: list[int] | None = None

    @classmethod
    def from_seqlens(cls, lengths: Sequence[int]) -> "Packed":
        return cls(lengths)

    @classmethod
    def from_tensor_list(cls, parts: Sequence[Tensor]) -> tuple["Packed", Tensor]:
        """Of batches [B, N, D] with sizes of their own: how they lie, and the row [1, sum of B N, D]."""
        packed = cls([part.shape[1] for part in parts for _ in range(len(part))])
        packed._batch_sizes = [len(part) for part in parts]
        return packed, torch.cat([part.reshape(1, -1, part.shape[-1]) for part in parts], 1)

    def split(self, row: Tensor) -> list[Tensor]:
        """The batches that a row was made of."""
        sizes = self._batch_sizes or [1] * len(self.lengths)
        out, place, at = [], 0, 0
        for size in sizes:
            length = self.lengths[place]
            out.append(row[:, at : at + size * length].reshape(size, length, *row.shape[2:]))
            place, at = place + size, at + size * length
        return out


def attention(query: Tensor, key: Tensor, value: Tensor, attn_bias: Packed | None = None) -> Tensor:
    """[B, N, heads, D] -> [B, N, heads, D], sequence by sequence. For xformers' memory_efficient_attention."""
    lengths = [query.shape[1]] if attn_bias is None else attn_bias.lengths
    parts = [[side.transpose(1, 2) for side in whole.split(lengths, 1)] for whole in (query, key, value)]
    done = [F.scaled_dot_product_attention(q, k, v) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(done, 2).transpose(1, 2)


class Whole(nn.Module):
    """A network on one process, with what DINOv2 asks a sharded one for. Inputs are cast, as for mixed precision."""

    def __init__(self, module: nn.Module, sharding_strategy: Any = None, **_: Any) -> None:
        super().__init__()
        self.module = module
        self.sharding_strategy = sharding.ShardingStrategy.NO_SHARD
        self._streams = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*map(_as_float32, inputs), **named)

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    def clip_grad_norm_(self, largest: float) -> Tensor:
        return nn.utils.clip_grad_norm_(self.params, largest)

    @staticmethod
    def fsdp_modules(module: nn.Module) -> list["Whole"]:
        return [part for part in module.modules() if isinstance(part, Whole)]

    @staticmethod
    @contextmanager
    def state_dict_type(*_: Any) -> Iterator[None]:
        yield


def _as_float32(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_float32(part) for part in value]
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def stand_in() -> None:
    """Put them where DINOv2 imports them from."""
    ops: Any = types.ModuleType("xformers.ops")
    ops.fmha = types.SimpleNamespace(BlockDiagonalMask=Packed)
    ops.memory_efficient_attention, ops.unbind = attention, torch.unbind
    # of drop path and of SwiGLU networks, with neither of which it is tried
    ops.scaled_index_add = ops.index_select_cat = None
    ops.SwiGLU = nn.Module
    package: Any = types.ModuleType("xformers")
    package.ops = ops
    sys.modules |= {"xformers": package, "xformers.ops": ops}
    where: Any = sharding
    where.FullyShardedDataParallel = Whole
