"""Runs a training program for TRY_STEPS steps on a CPU, with what it asks of CUDA and of older packages stood in for.

python scripts/adapters/on_cpu.py [--one-process] PROGRAM [ARGUMENTS]: a line for each step with its loss, marked with
"@ ". The stand-ins are for trying a program, not for training: see `old_names`, `no_cuda` and one_process.py.
"""

import os
import runpy
import sys
import types
from typing import Any

import numpy as np
import one_process
import torch
import torch._dynamo
from torch import nn


def old_names() -> None:
    """Names that torch, numpy and the codebases' timm have lost since: torch._six, np.float."""
    six: Any = types.ModuleType("torch._six")
    import collections.abc

    six.inf, six.string_classes, six.int_classes, six.container_abcs = torch.inf, (str, bytes), int, collections.abc
    sys.modules["torch._six"] = six
    for name, kind in (("float", float), ("int", int), ("bool", bool)):
        if name not in np.__dict__:
            setattr(np, name, kind)


def no_cuda() -> None:
    """Calls that move things to a GPU leave them; process groups are gloo's."""
    cuda: Any = torch.cuda
    cuda.is_available = lambda: "RANK" in os.environ and sys._getframe(1).f_code.co_name == "init_distributed_mode"
    cuda.synchronize = cuda.set_device = lambda *_: None
    cuda.max_memory_allocated = lambda *_: 0
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    module: Any = nn.Module
    module.cuda = lambda self, *_, **__: self
    move: Any = nn.Module.to

    def to(self: nn.Module, *arguments: Any, **named: Any) -> nn.Module:
        named.pop("device", None)
        return move(self, *(part for part in arguments if not isinstance(part, torch.device | str)), **named)

    module.to = to
    groups: Any = torch.distributed
    begin = groups.init_process_group

    def init_process_group(*_: Any, **named: Any) -> None:
        begin(**named | {"backend": "gloo"})

    groups.init_process_group = init_process_group
    # DINO asks a server for the names of networks
    hub: Any = torch.hub
    hub.list = lambda *_, **__: []
    parallel: Any = nn.parallel.DistributedDataParallel
    wrap = parallel.__init__

    def wrapped(self: Any, inner: nn.Module, *_: Any, **named: Any) -> None:
        wrap(self, inner, **named | {"device_ids": None})

    parallel.__init__ = wrapped


def count_steps(steps: int) -> None:
    """Print the loss of each backward pass, and end the program when the one after the last is asked for."""
    backward: Any = torch.Tensor.backward
    done = 0

    def counted(self: torch.Tensor, *arguments: Any, **named: Any) -> None:
        nonlocal done
        if done == steps:
            say(f"{steps} steps with torch {torch.__version__} on a CPU")
            sys.stdout.flush()
            os._exit(0)  # past whatever threads and exit handlers the program has
        done += 1
        say(f"step {done}: loss {self.detach().item():.4f}")
        backward(self, *arguments, **named)

    module: Any = torch.Tensor
    module.backward = counted


def say(text: str) -> None:
    """A line of ours: the program may have put another function in the place of `print`."""
    sys.stdout.write(f"@ {text}\n")
    sys.stdout.flush()


def main() -> None:
    old_names()
    no_cuda()
    count_steps(int(os.environ["TRY_STEPS"]))
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "--one-process":
        sys.argv = sys.argv[1:]
        one_process.stand_in()
    runpy.run_path(sys.argv[0], run_name="__main__")
    say("the program ended before it had made the steps")
    sys.exit(1)


if __name__ == "__main__":
    main()
