"""Linear layers that keep less for the backward pass: what stands before them is kept, not what they read.

A norm and a GELU cost little to compute again; their results are 6 of the 16 widths a token that a transformer block
would keep. torch.compile makes the same choice by itself, so under it the plain form is traced.

Attention and the MLP have forms of their own on the CPU: see `fastpmae.model.cpu`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fastpmae.model import cpu
from fastpmae.model.attention import SequenceLengths, attention, is_torchs


def norm_linear(
    tokens: Float[Tensor, "*rows inputs"], norm: nn.LayerNorm, linear: nn.Linear
) -> Float[Tensor, "*rows outputs"]:
    """`linear(norm(tokens))`, which keeps `tokens` and nothing else."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return linear(norm(tokens))
    return _NormLinear.apply(tokens, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias)


def gelu_linear(hidden: Float[Tensor, "*rows inputs"], linear: nn.Linear) -> Float[Tensor, "*rows outputs"]:
    """`linear(gelu(hidden))`, which keeps `hidden` and nothing else."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return linear(F.gelu(hidden))
    return _GeluLinear.apply(hidden, linear.weight, linear.bias)


def attend(
    tokens: Float[Tensor, "batch tokens dim"],
    norm: nn.LayerNorm,
    qkv: nn.Linear,
    heads: int,
    last: int | None = None,
    sequence_lengths: SequenceLengths | None = None,
) -> Float[Tensor, "batch last dim"]:
    """What each of the `last` tokens (by default all) takes from all of them, after `norm`, before the projection."""
    batch, count, dim = tokens.shape
    queries = count if last is None else last
    if sequence_lengths is None and is_torchs() and torch.is_grad_enabled() and cpu.runs(tokens, qkv):
        return cpu.attend(tokens, norm, qkv, heads, queries)
    query, key, value = norm_linear(tokens, norm, qkv).view(batch, count, 3, heads, dim // heads).unbind(2)
    return attention(query[:, count - queries :], key, value, sequence_lengths).reshape(batch, queries, dim)


def add_mlp(
    tokens: Float[Tensor, "*rows dim"],
    norm: nn.LayerNorm,
    first: nn.Linear,
    second: nn.Linear,
    scale: Float[Tensor, "*#rows 1"] | None = None,
) -> Float[Tensor, "*rows dim"]:
    """`tokens + scale * second(gelu(first(norm(tokens))))`, which keeps `tokens` and what the GELU reads."""
    if cpu.runs(tokens, first, second):
        return cpu.add_mlp(tokens, norm, first, second, scale)
    branch = gelu_linear(norm_linear(tokens, norm, first), second)
    return tokens + (branch if scale is None else scale * branch)


def _autocast(tensor: Tensor) -> torch.autocast:
    """Autocast as it is now on the tensor's device, for the backward pass to be under it too."""
    kind = tensor.device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))


def _linear_backward(gradient: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and the bias of a linear layer that read `read`."""
    rows = gradient.flatten(0, -2)
    return rows.t() @ read.flatten(0, -2), rows.sum(dim=0)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(tokens, norm_weight, norm_bias, weight)
        ctx.eps, ctx.autocast = eps, _autocast(tokens)
        return F.linear(F.layer_norm(tokens, norm_weight.shape, norm_weight, norm_bias, eps), weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tokens, norm_weight, norm_bias, weight = ctx.saved_tensors
        (gradient,) = gradients
        shape = list(norm_weight.shape)
        # Autocast's norm is in the weights' precision.
        tokens = tokens.to(norm_weight.dtype)
        with ctx.autocast:
            normed, mean, rstd = torch.native_layer_norm(tokens, shape, norm_weight, norm_bias, ctx.eps)
            of_weight, of_bias = _linear_backward(gradient, normed)
            del normed
            of_normed = (gradient @ weight).to(norm_weight.dtype)
        of_tokens, of_norm_weight, of_norm_bias = torch.ops.aten.native_layer_norm_backward(
            of_normed, tokens, shape, mean, rstd, norm_weight, norm_bias, [True, True, True]
        )
        return of_tokens, of_norm_weight, of_norm_bias, None, of_weight, of_bias


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.autocast = _autocast(hidden)
        return F.linear(F.gelu(hidden), weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        (gradient,) = gradients
        with ctx.autocast:
            of_weight, of_bias = _linear_backward(gradient, F.gelu(hidden))
            of_active = gradient @ weight
        return torch.ops.aten.gelu_backward(of_active.to(hidden.dtype), hidden), of_weight, of_bias
