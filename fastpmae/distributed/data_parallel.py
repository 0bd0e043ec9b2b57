"""A network that is whole on every rank, with its gradients averaged over them (DDP)."""

import contextlib
import inspect
import warnings
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def average_gradients(network: nn.Module, *, static_graph: bool) -> DistributedDataParallel:
    """The network as it is called on one of several ranks.

    Its buffers stay as they are: what is in them is the same on all ranks and needs no message a step.

    Args:
        static_graph: record the first backward pass. torch's cannot leave its messages out afterwards, as `no_sync`
            needs (2.14: "expect_autograd_hooks_ INTERNAL ASSERT FAILED").
    """
    # torch has renamed the switch.
    known = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # Of a 1 x 1 kernel torch knows two orders in memory, which are the same; it warns that they differ.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    settings: dict[str, Any] = {"gradient_as_bucket_view": True, switch: False}
    return DistributedDataParallel(network, static_graph=static_graph, **settings)


def no_sync(parallel: nn.Module) -> AbstractContextManager[None]:
    """Within it gradients add up on their own rank.

    Shards travel all the same: whole gradients would take the memory that shards are there to save.
    """
    return parallel.no_sync() if isinstance(parallel, DistributedDataParallel) else contextlib.nullcontext()
