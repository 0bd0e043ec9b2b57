"""A mean loss over rows that is computed with its gradients, some rows at a time: nothing in between is ever whole.

It costs no work that the usual way does not: of each row the forward and the backward pass are taken once, one right
after the other, while what the one leaves for the other is still in cache.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def mean_in_chunks(
    loss_of: Callable[[Float[Tensor, "chunk dim"], slice], Float[Tensor, ""]],
    rows: Float[Tensor, "rows dim"],
    parameters: Sequence[Tensor],
    chunk: int,
) -> Float[Tensor, ""]:
    """The mean over all rows of a loss that `loss_of` gives as the mean over the rows of a slice.

    Args:
        loss_of: may use `parameters`, and nothing else that has a gradient.
        rows, parameters: gradients flow to these.
        chunk: rows at a time, at least 1.
    """
    return _InChunks.apply(loss_of, chunk, rows, *parameters)


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss_of: Callable, chunk: int, rows: Tensor, *parameters: Tensor) -> Tensor:
        loss = torch.zeros((), device=rows.device)
        of_rows = torch.empty_like(rows)
        of_parameters = [torch.zeros_like(parameter) for parameter in parameters]
        for start in range(0, len(rows), chunk):
            place = slice(start, start + chunk)
            with torch.enable_grad():
                part = rows[place].detach().requires_grad_()
                # of a leaf itself torch's module trackers, as of its count of FLOPs, cannot follow the gradient
                share = loss_of(part.view_as(part), place) * (len(part) / len(rows))
                of_part, *others = torch.autograd.grad(share, (part, *parameters))
            # Not in place: torch 2.11, compiling, would give no gradient to a result that is written to.
            loss = loss + share.detach()
            of_rows[place] = of_part
            torch._foreach_add_(of_parameters, others)
        ctx.save_for_backward(of_rows, *of_parameters)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, *(gradients[0].to(each.dtype) * each for each in ctx.saved_tensors)
