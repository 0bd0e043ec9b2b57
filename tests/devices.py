"""Modes that tell, without another device than the host, what waits for one, crosses over to it, or is drawn on it.

Tensors that say they are elsewhere (fake ones on a GPU, or ones without memory on the meta device) go through the same
code as real ones, down to torch's dispatcher, where these look.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastpmae.plan.shape_tensor import leaves

FROM_PYTHON = {torch.tensor, torch.as_tensor, torch.asarray}
"""What makes a tensor of Python's numbers on the host; for another device it is then copied, and waited for."""


def is_away(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def waits_for_result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the host must have an operation's result, or the size of it, before it can go on."""
    if torch.Tag.data_dependent_output in func.tags or func._opname == "equal":
        return True
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func._opname in ("index", "index_put", "index_put_"):
        return any(isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    return func._opname != "repeat_interleave" or kwargs.get("output_size") is None


class _FromPython(TorchFunctionMode):
    def __init__(self, waits: "Waits") -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in FROM_PYTHON and not isinstance(args[0], Tensor) and (self.waits.anywhere or is_away(result)):
            self.waits.note(f"{func.__name__} from Python's numbers")
        return result


class Waits(TorchDispatchMode):
    """Notes each operation whose result the host has to wait for, and all that crosses between host and device.

    Args:
        anywhere: what waits, or is made of Python's numbers, counts on the host too: as if it were the device. Then
            what crosses cannot be seen.
    """

    def __init__(self, *, anywhere: bool = False) -> None:
        super().__init__()
        self.anywhere, self.inside = anywhere, True
        self.found: list[tuple[str, bool]] = []
        self.from_python = _FromPython(self)

    def note(self, what: str) -> None:
        self.found.append((what, self.inside))

    def __enter__(self) -> "Waits":
        self.from_python.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.from_python.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [each for each in leaves((args, kwargs)) if isinstance(each, Tensor)]
        away = any(map(is_away, operands))
        if (self.anywhere or away) and waits_for_result(func, args, kwargs):
            self.note(func._opname)
        result = func(*args, **kwargs)
        # A number of the host's beside tensors of the device is handed over with the kernel.
        copies = func._opname in ("_to_copy", "copy_")
        sides = {is_away(each) for each in operands if each.numel() and (each.ndim or copies)}
        sides |= {is_away(each) for each in leaves(result) if isinstance(each, Tensor) and each.numel()}
        if len(sides) == 2:
            home = any(isinstance(each, Tensor) and not is_away(each) for each in leaves(result))
            self.note(f"{func._opname} to the {'host' if home else 'device'}")
        return result


class Draws(TorchDispatchMode):
    """Notes where random numbers are drawn, and for tensors of which shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, set[torch.Size]] = {}

    @property
    def devices(self) -> set[str]:
        return set(self.shapes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            for each in leaves(result):
                if isinstance(each, Tensor):
                    self.shapes.setdefault(each.device.type, set()).add(each.shape)
        return result
