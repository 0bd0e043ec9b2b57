"""Linear layers that keep less for the backward pass: what stands before them is kept, not what they read.

A norm and a GELU cost little to compute again; their results are 6 of the 16 widths a token that a transformer block
would keep. torch.compile makes the same choice by itself, so under it the plain form is traced.

On the CPU a block's MLP goes over its tokens some rows at a time, both ways, and attention's gradient some images at a
time: what is in between at all tokens at once would be a good part of a step's peak.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

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
    if sequence_lengths is None and is_torchs() and torch.is_grad_enabled() and _plain_on_cpu(tokens, qkv):
        return _Attend.apply(tokens, norm.weight, norm.bias, norm.eps, qkv.weight, qkv.bias, heads, queries)
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
    if not _plain_on_cpu(tokens, first, second):
        branch = gelu_linear(norm_linear(tokens, norm, first), second)
        return tokens + (branch if scale is None else scale * branch)
    parameters = norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias
    rows_scale = None if scale is None else scale.expand(*tokens.shape[:-1], 1).reshape(-1, 1)
    return _AddMlp.apply(torch.is_grad_enabled(), norm.eps, rows_scale, tokens, *parameters)


def _plain_on_cpu(tokens: Tensor, *layers: nn.Linear) -> bool:
    """Whether this is eager work on the CPU in one precision, with layers that are no more than linear."""
    if tokens.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return all(type(layer) is nn.Linear and layer.weight.dtype == tokens.dtype for layer in layers)


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
        ctx: Any, tokens: Tensor, scale: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(tokens, scale, norm_bias, weight)
        ctx.eps, ctx.autocast = eps, _autocast(tokens)
        return F.linear(F.layer_norm(tokens, scale.shape, scale, norm_bias, eps), weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tokens, scale, norm_bias, weight = ctx.saved_tensors
        (gradient,) = gradients
        shape = list(scale.shape)
        # Autocast's norm is in the weights' precision.
        tokens = tokens.to(scale.dtype)
        with ctx.autocast:
            normed, mean, rstd = torch.native_layer_norm(tokens, shape, scale, norm_bias, ctx.eps)
            of_weight, of_bias = _linear_backward(gradient, normed)
            del normed
            of_normed = (gradient @ weight).to(scale.dtype)
        of_tokens, of_scale, of_shift = torch.ops.aten.native_layer_norm_backward(
            of_normed, tokens, shape, mean, rstd, scale, norm_bias, [True, True, True]
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
"""Tokens at a time on the CPU. All at once are a little faster, and their memory is a good part of a step's peak."""


def _norm_linear_backward(
    gradient: Tensor,
    rows: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    sums: list[Tensor],
) -> Tensor:
    """The gradient of some rows that a norm and a linear layer read; those of their parameters are added to `sums`."""
    of_gain, of_shift, of_weight, of_bias = sums
    normed, mean, rstd = torch.native_layer_norm(rows, list(norm_weight.shape), norm_weight, norm_bias, eps)
    torch.addmm(of_weight, gradient.t(), normed, out=of_weight)
    of_bias += gradient.sum(dim=0)
    of_rows, *of_norm = torch.ops.aten.native_layer_norm_backward(
        gradient @ weight, rows, list(norm_weight.shape), mean, rstd, norm_weight, norm_bias, [True, True, True]
    )
    of_gain += of_norm[0]
    of_shift += of_norm[1]
    return of_rows


def _zero_sums(norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> list[Tensor]:
    """The `sums` that `_norm_linear_backward` adds to: of norm_weight, norm_bias, weight and bias."""
    return [
        torch.zeros_like(norm_weight),
        torch.zeros_like(norm_bias),
        torch.zeros_like(weight),
        weight.new_zeros(len(weight)),
    ]


class _Attend(torch.autograd.Function):
    """Forward all images at once, and backward a few at a time, so that gradients of queries, keys and values are
    never whole."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor,
        heads: int, queries: int,
    ) -> Tensor:  # fmt: skip
        batch, count, dim = tokens.shape
        qkv = F.linear(F.layer_norm(tokens, norm_weight.shape, norm_weight, norm_bias, eps), weight, bias)
        qkv = qkv.view(batch, count, 3, heads, dim // heads)
        mixed, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(qkv, queries))
        ctx.save_for_backward(tokens, norm_weight, norm_bias, weight, qkv, mixed, sums)
        ctx.eps = eps
        return mixed.transpose(1, 2).reshape(batch, queries, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tokens, norm_weight, norm_bias, weight, qkv, mixed, sums = ctx.saved_tensors
        batch, count, dim = tokens.shape
        queries = mixed.shape[2]
        gradient = gradients[0].view(batch, queries, *qkv.shape[3:]).transpose(1, 2)
        of_tokens, sums_of = tokens.new_empty(tokens.shape), _zero_sums(norm_weight, norm_bias, weight)
        few = max(1, ROWS // count)
        for start in range(0, batch, few):
            place = slice(start, start + few)
            of_qkv = torch.zeros_like(qkv[place])
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient[place], *_heads_first(qkv[place], queries), mixed[place], sums[place], 0.0, False
            )
            for here, part in zip(_heads_first(of_qkv, queries), parts, strict=True):
                here.copy_(part)
            of_part = _norm_linear_backward(
                of_qkv.view(-1, 3 * dim),
                tokens[place].reshape(-1, dim),
                norm_weight,
                norm_bias,
                ctx.eps,
                weight,
                sums_of,
            )
            of_tokens[place] = of_part.view(-1, count, dim)
        of_gain, of_shift, of_weight, of_bias = sums_of
        return of_tokens, of_gain, of_shift, None, of_weight, of_bias, None, None


def _heads_first(qkv: Float[Tensor, "batch tokens 3 heads dim"], queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (of the last tokens), keys and values, as (batch, heads, tokens, dim)."""
    query, key, value = (each.transpose(1, 2) for each in qkv.unbind(2))
    return query[:, :, query.shape[2] - queries :], key, value


class _AddMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, keeps: bool, eps: float, scale: Tensor | None, tokens: Tensor, norm_weight: Tensor, norm_bias: Tensor,
        weight: Tensor, bias: Tensor, second_weight: Tensor, second_bias: Tensor,
    ) -> Tensor:  # fmt: skip
        rows = tokens.flatten(0, -2)
        kept = rows.new_empty(len(rows) if keeps else min(ROWS, len(rows)), len(weight))
        out = rows.new_empty(rows.shape)
        for start in range(0, len(rows), ROWS):
            place = slice(start, start + ROWS)
            part, sums = rows[place], out[place]
            hidden = kept[place] if keeps else kept[: len(part)]
            torch.addmm(
                bias, F.layer_norm(part, norm_weight.shape, norm_weight, norm_bias, eps), weight.t(), out=hidden
            )
            if scale is None:
                torch.add(part, second_bias, out=sums)
                torch.addmm(sums, F.gelu(hidden), second_weight.t(), out=sums)
            else:
                torch.addcmul(part, torch.addmm(second_bias, F.gelu(hidden), second_weight.t()), scale[place], out=sums)
        ctx.save_for_backward(tokens, norm_weight, norm_bias, weight, second_weight, kept, scale)
        ctx.eps = eps
        return out.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tokens, norm_weight, norm_bias, weight, second_weight, kept, scale = ctx.saved_tensors
        rows, gradient = tokens.flatten(0, -2), gradients[0].flatten(0, -2)
        of_rows, of_second = rows.new_empty(rows.shape), torch.zeros_like(second_weight)
        sums_of = _zero_sums(norm_weight, norm_bias, weight)
        of_second_bias = weight.new_zeros(len(second_weight))
        for start in range(0, len(rows), ROWS):
            place = slice(start, start + ROWS)
            above, hidden = gradient[place], kept[place]
            of_branch = above if scale is None else above * scale[place]
            of_second_bias += of_branch.sum(dim=0)
            torch.addmm(of_second, of_branch.t(), F.gelu(hidden), out=of_second)
            of_hidden = of_branch @ second_weight
            torch.ops.aten.gelu_backward.grad_input(of_hidden, hidden, grad_input=of_hidden)
            of_part = _norm_linear_backward(of_hidden, rows[place], norm_weight, norm_bias, ctx.eps, weight, sums_of)
            torch.add(above, of_part, out=of_rows[place])
        of_gain, of_shift, of_weight, of_bias = sums_of
        of_tokens = of_rows.view_as(tokens)
        return None, None, None, of_tokens, of_gain, of_shift, of_weight, of_bias, of_second, of_second_bias
