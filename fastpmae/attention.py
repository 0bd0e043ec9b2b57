"""The one place that decides which attention runs."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens dim"],
) -> Float[Tensor, "batch heads tokens dim"]:
    """Dense softmax attention. Folds are stacked on the batch axis, so no mask is ever needed."""
    return F.scaled_dot_product_attention(query, key, value)
