"""`--deterministic`: a run on a GPU computes the same bits each time, by what torch offers for it."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from fastpmae_loaders.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""What cuBLAS and torch read, once a process, at the first product."""


@contextlib.contextmanager
def deterministic(wanted: bool, device: torch.device) -> Iterator[None]:
    """Within it torch takes algorithms on a GPU that add up in one order, and refuses to compute what has none.

    A run on the CPU is the same each time anyway, and nothing is changed for it. Everything is put back at the end, but
    cuBLAS stays as it has started.

    Raises:
        UserError: where cuBLAS has started in this process as it adds up in any order.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings = cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory
    workspace = os.environ.get(WORKSPACE)
    try:
        os.environ.setdefault(WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        # For finding reads of what was never written: it costs a pass over all new memory.
        memory.fill_uninitialized_memory = False
        _check_products(device)
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = settings
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if workspace is None:
            os.environ.pop(WORKSPACE, None)


def _check_products(device: torch.device) -> None:
    """A first product tells whether torch has found cuBLAS set up in time."""
    try:
        torch.ones(8, 8, device=device).mm(torch.ones(8, 8, device=device))
    except RuntimeError as error:
        if WORKSPACE not in str(error):
            raise
        raise UserError(
            f"--deterministic: cuBLAS has started in this process with another {WORKSPACE}; set it to :4096:8 before "
            "the first product on a GPU, or start a process of its own"
        ) from None
