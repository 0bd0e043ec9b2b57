"""Linear layers that keep less for the backward pass: what stands before them is kept, not what they read.

A norm and a GELU cost little to compute again; their results are 6 of the 16 widths a token that a transformer block
would keep. torch.compile makes the same choice by itself, so under it the plain form is traced.

On the CPU a block's MLP goes over its tokens some rows at a time. What is in between then stays in the cache and in
memory that has been used before: new pages cost the system more time than a GELU takes, and all rows at once are a good
part of a step's peak.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


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


def mlp(
    tokens: Float[Tensor, "*rows dim"], norm: nn.LayerNorm, first: nn.Linear, second: nn.Linear
) -> Float[Tensor, "*rows dim"]:
    """`second(gelu(first(norm(tokens))))`, which keeps `tokens` and what the GELU reads."""
    plain = type(first) is nn.Linear and type(second) is nn.Linear and not torch.is_autocast_enabled("cpu")
    if tokens.device.type != "cpu" or tokens.dtype != first.weight.dtype or torch.compiler.is_compiling() or not plain:
        return gelu_linear(norm_linear(tokens, norm, first), second)
    parameters = norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias
    return _Mlp.apply(torch.is_grad_enabled(), norm.eps, tokens, *parameters)


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
        ctx: Any, tokens: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor, bias: Tensor
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(tokens, scale, shift, weight)
        ctx.eps, ctx.autocast = eps, _autocast(tokens)
        return F.linear(F.layer_norm(tokens, scale.shape, scale, shift, eps), weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tokens, scale, shift, weight = ctx.saved_tensors
        (gradient,) = gradients
        shape = list(scale.shape)
        # Autocast's norm is in the weights' precision.
        tokens = tokens.to(scale.dtype)
        with ctx.autocast:
            normed, mean, spread = torch.native_layer_norm(tokens, shape, scale, shift, ctx.eps)
            of_weight, of_bias = _linear_backward(gradient, normed)
            del normed
            of_normed = (gradient @ weight).to(scale.dtype)
        of_tokens, of_scale, of_shift = torch.ops.aten.native_layer_norm_backward(
            of_normed, tokens, shape, mean, spread, scale, shift, [True, True, True]
        )
        return of_tokens, of_scale, of_shift, None, of_weight, of_bias


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


ROWS = 1024
"""Tokens that an MLP sees at a time: products as fast as over all of them, and what is in between in the cache."""


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, keeps: bool, eps: float, tokens: Tensor, scale: Tensor, shift: Tensor,
        weight: Tensor, bias: Tensor, second_weight: Tensor, second_bias: Tensor,
    ) -> Tensor:  # fmt: skip
        rows = tokens.flatten(0, -2)
        kept = rows.new_empty(len(rows) if keeps else min(ROWS, len(rows)), len(weight))
        out = rows.new_empty(len(rows), len(second_weight))
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            hidden = kept[start : start + ROWS] if keeps else kept[: len(part)]
            torch.addmm(bias, F.layer_norm(part, scale.shape, scale, shift, eps), weight.t(), out=hidden)
            torch.addmm(second_bias, F.gelu(hidden), second_weight.t(), out=out[start : start + ROWS])
        ctx.save_for_backward(tokens, scale, shift, weight, second_weight, kept)
        ctx.eps = eps
        return out.view(*tokens.shape[:-1], len(second_weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tokens, scale, shift, weight, second_weight, kept = ctx.saved_tensors
        rows, gradient = tokens.flatten(0, -2), gradients[0].flatten(0, -2)
        of_rows, of_weight, of_second = (
            torch.empty_like(rows),
            torch.zeros_like(weight),
            torch.zeros_like(second_weight),
        )
        of_bias, of_scale, of_shift = weight.new_zeros(len(weight)), torch.zeros_like(scale), torch.zeros_like(shift)
        for start in range(0, len(rows), ROWS):
            place = slice(start, start + ROWS)
            above, hidden = gradient[place], kept[place]
            torch.addmm(of_second, above.t(), F.gelu(hidden), out=of_second)
            of_hidden = above @ second_weight
            torch.ops.aten.gelu_backward.grad_input(of_hidden, hidden, grad_input=of_hidden)
            normed, mean, spread = torch.native_layer_norm(rows[place], list(scale.shape), scale, shift, ctx.eps)
            torch.addmm(of_weight, of_hidden.t(), normed, out=of_weight)
            of_bias += of_hidden.sum(dim=0)
            of_part, *others = torch.ops.aten.native_layer_norm_backward(
                of_hidden @ weight, rows[place], list(scale.shape), mean, spread, scale, shift, [True, True, True]
            )
            of_rows[place] = of_part
            of_scale += others[0]
            of_shift += others[1]
        of_second_bias = gradient.sum(dim=0)
        return None, None, of_rows.view_as(tokens), of_scale, of_shift, of_weight, of_bias, of_second, of_second_bias
