"""torch's formulas for the FLOPs of its operations, with attention on the CPU, which torch before 2.15 leaves out."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """The registry that FlopCounterMode, too, reads; the missing formulas are added to it."""
    aten = torch.ops.aten
    for here, known in (
        (aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention),
        (
            aten._scaled_dot_product_flash_attention_for_cpu_backward,
            aten._scaled_dot_product_flash_attention_backward,
        ),
    ):
        flop_registry.setdefault(here, flop_registry[known])
    return flop_registry
