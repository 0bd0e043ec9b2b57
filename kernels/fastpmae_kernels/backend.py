"""Which form of an operation runs: the one for the tensors' device, unless a test asks for the plain one.

Triton is imported here and nowhere else, so that the package can be imported where there is none (Triton comes with
torch's CUDA and ROCm builds only).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

try:
    import triton as _triton
    import triton.language as _language
except ImportError:  # the kernels are then never launched
    _triton = SimpleNamespace(jit=lambda function: function)
    _language = SimpleNamespace(constexpr=object)

# A kernel's source is no Python that a type checker could follow.
triton: Any = _triton
tl: Any = _language
if TYPE_CHECKING:
    constexpr = Any
else:
    constexpr = tl.constexpr  # the interpreter knows it by this very name

LOW_PRECISION = (torch.float16, torch.bfloat16)

_choice: Literal["device", "ref"] = "device"


@contextlib.contextmanager
def use(choice: Literal["device", "ref"]) -> Iterator[None]:
    """Within the block every public operation takes its plain `_ref` form ("ref") or its device's ("device")."""
    global _choice
    before = _choice
    _choice = choice
    try:
        yield
    finally:
        _choice = before


def runs_plain(*tensors: Tensor) -> bool:
    """Whether the `_ref` form is to run: where asked for, for float64, and on devices without a form of their own."""
    if _choice == "ref":
        return True
    return any(tensor.dtype == torch.float64 or tensor.device.type not in ("cpu", "cuda") for tensor in tensors)


def operation(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Any]:
    """Registers a CPU form as `torch.ops.fastpmae.<name>`; the CUDA form and the fake are added to what it returns."""

    def register(function: Callable) -> Any:
        return torch.library.custom_op(f"fastpmae::{name}", function, mutates_args=mutates, device_types="cpu")

    return register


def written_on(
    device: torch.device, numbers: Sequence[float], dtype: torch.dtype = torch.float32
) -> Float[Tensor, " numbers"]:
    """A few of Python's numbers as a tensor, each written by the device itself.

    `torch.tensor(numbers, device=device)` is made on the host and copied, and the host waits until the device comes to
    that copy; in the capture of a CUDA graph it fails.
    """
    return torch.stack([torch.full((), number, dtype=dtype, device=device) for number in numbers])


def next_power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def ceil_div(number: int, by: int) -> int:
    return -(-number // by)
