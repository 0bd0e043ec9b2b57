"""What only a CPU runs of the networks: attention and the MLP of a block, a part of the tokens at a time.

The MLP goes over its tokens some rows at a time, both ways, and attention's gradient some images at a time: what is in
between at all tokens at once would be a good part of a step's peak. Both write where torch's public functions would
allocate, by private operators of aten's. `use(False)` turns them off: to debug, or for a torch that has changed these.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_used = True


@contextlib.contextmanager
def use(these: bool) -> Iterator[None]:
    """Within the block the CPU's own forms run where they can, or nowhere: then the forms of every device do."""
    global _used
    before = _used
    _used = these
    try:
        yield
    finally:
        _used = before


def runs(tokens: Tensor, *layers: nn.Linear) -> bool:
    """Whether the CPU's own forms fit this work: eager, in one precision, with layers that are no more than linear."""
    if not _used or tokens.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return all(type(layer) is nn.Linear and layer.weight.dtype == tokens.dtype for layer in layers)


def attend(
    tokens: Float[Tensor, "batch tokens dim"], norm: nn.LayerNorm, qkv: nn.Linear, heads: int, queries: int
) -> Float[Tensor, "batch queries dim"]:
    """What each of the last `queries` tokens takes from all of them, after `norm`, before the projection."""
    return _Attend.apply(tokens, norm.weight, norm.bias, norm.eps, qkv.weight, qkv.bias, heads, queries)


def add_mlp(
    tokens: Float[Tensor, "*rows dim"],
    norm: nn.LayerNorm,
    first: nn.Linear,
    second: nn.Linear,
    scale: Float[Tensor, "*#rows 1"] | None,
) -> Float[Tensor, "*rows dim"]:
    """`tokens + scale * second(gelu(first(norm(tokens))))`, which keeps `tokens` and what the GELU reads."""
    parameters = norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias
    rows_scale = None if scale is None else scale.expand(*tokens.shape[:-1], 1).reshape(-1, 1)
    return _AddMlp.apply(torch.is_grad_enabled(), norm.eps, rows_scale, tokens, *parameters)


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
    of_norm_weight, of_norm_bias, of_weight, of_bias = sums
    normed, mean, rstd = torch.native_layer_norm(rows, list(norm_weight.shape), norm_weight, norm_bias, eps)
    torch.addmm(of_weight, gradient.t(), normed, out=of_weight)
    of_bias += gradient.sum(dim=0)
    of_rows, *of_norm = torch.ops.aten.native_layer_norm_backward(
        gradient @ weight, rows, list(norm_weight.shape), mean, rstd, norm_weight, norm_bias, [True, True, True]
    )
    of_norm_weight += of_norm[0]
    of_norm_bias += of_norm[1]
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
        of_norm_weight, of_norm_bias, of_weight, of_bias = sums_of
        return of_tokens, of_norm_weight, of_norm_bias, None, of_weight, of_bias, None, None


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
        of_norm_weight, of_norm_bias, of_weight, of_bias = sums_of
        of_tokens = of_rows.view_as(tokens)
        return None, None, None, of_tokens, of_norm_weight, of_norm_bias, of_weight, of_bias, of_second, of_second_bias
