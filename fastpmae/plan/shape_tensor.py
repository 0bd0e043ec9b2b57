"""Tensors with a shape and no memory, on which a whole training step runs in a second and is counted as it goes.

They say that they lie on the CPU, so that everything above torch's dispatcher (autograd, autocast, the choice of an
attention) does what it does with real ones; each operation is answered by torch's own shape rules (its meta kernels).
torch's FakeTensorMode does the same for any device and any operation, at six times the price.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastpmae.plan.flops import flop_formulas

META = torch.device("meta")
CPU = torch.device("cpu")
_FORMULAS = flop_formulas()


class Buffer:
    """One allocation: counted when it is made, and when the last tensor on it is gone."""

    __slots__ = ("counting", "nbytes", "number")

    def __init__(self, counting: "Counting", nbytes: int):
        self.counting, self.nbytes = counting, nbytes
        self.number = len(counting.tags)
        counting.tags.append(counting.kind)
        counting.events.append((self.number, nbytes, counting.part))

    def __del__(self) -> None:
        self.counting.events.append((self.number, -self.nbytes, self.counting.part))


class ShapeTensor(Tensor):
    """A tensor that knows its shape, strides and dtype; `inner` holds them on the meta device."""

    inner: Tensor
    buffer: Buffer

    @staticmethod
    def __new__(cls, inner: Tensor, buffer: Buffer) -> "ShapeTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CPU,
        )
        made.inner, made.buffer = inner, buffer
        return made

    def __init__(self, inner: Tensor, buffer: Buffer):
        pass

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy: Tensor = self.detach().clone()
        if isinstance(self, nn.Parameter):
            copy = nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} met a tensor without memory outside of the mode that counts")


class Counting(TorchDispatchMode):
    """Within it every new tensor is a `ShapeTensor`, and memory, products and traffic are counted.

    Set `part` to what is being computed and `kind` to what memory that is made now is for; `tags` may be changed
    later, which says of an allocation what it has turned out to be.

    Args:
        observe: called with every operation, its `ShapeTensor` operands and its results.
    """

    _known: ClassVar[dict[Any, Any]] = {}
    """Answers of torch's shape rules, which no two runs differ in."""
    _facts: ClassVar[dict[Any, tuple[bool, bool, bool, bool]]] = {}

    def __init__(self, observe: Callable[[Any, Sequence[ShapeTensor], Sequence[ShapeTensor]], None] | None = None):
        super().__init__()
        self.observe = observe
        self.part, self.kind = "", ""
        self.events: list[tuple[int, int, str]] = []
        """Allocation, bytes (negative where it is given back), part."""
        self.tags: list[str] = []
        """The kind of each allocation."""
        self.flops: dict[str, int] = defaultdict(int)
        """Floating-point operations of products, by part."""
        self.traffic = 0
        """Bytes of operands and results of all operations but views."""

    def hold(self, nbytes: int, kind: str) -> Buffer:
        """Memory that no tensor stands for; given back when the result is dropped."""
        before, self.kind = self.kind, kind
        try:
            return Buffer(self, nbytes)
        finally:
            self.kind = before

    def peak(self) -> tuple[dict[str, int], str]:
        """Bytes by kind at the moment when most were held, and the part that was computed then."""
        held = most = 0
        moment = -1
        for place, (_, nbytes, _) in enumerate(self.events):
            held += nbytes
            if held > most:
                most, moment = held, place
        kinds: dict[str, int] = defaultdict(int)
        for number, nbytes, _ in self.events[: moment + 1]:
            kinds[self.tags[number]] += nbytes
        return {kind: nbytes for kind, nbytes in kinds.items() if nbytes}, self.events[moment][2] if most else ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        fresh, mutates, in_place, takes_device = self._facts_of(func)
        if in_place:
            operands = [value for value in leaves((args, kwargs)) if isinstance(value, ShapeTensor)]
            result = args[0] if func._schema.returns else None
        else:
            operands = []
            shapes, named = _strip(args, operands), {name: _strip(value, operands) for name, value in kwargs.items()}
            if takes_device and (not operands or "device" in named):
                named["device"] = META
            result = self._dressed(self._answer(func, shapes, named, fresh), operands)
        results = [value for value in leaves(result) if isinstance(value, ShapeTensor)]
        if func._overloadpacket in _FORMULAS:
            self.flops[self.part] += _FORMULAS[func._overloadpacket](*args, **kwargs, out_val=result)
        if fresh or mutates:
            self.traffic += sum(min(_nbytes(tensor), tensor.buffer.nbytes) for tensor in (*operands, *results))
        if self.observe is not None:
            self.observe(func, operands, results)
        return result

    def _facts_of(self, func: Any) -> tuple[bool, bool, bool, bool]:
        """Whether an operation gives new memory alone, writes to operands, does no more than that, takes a device."""
        if func not in self._facts:
            schema = func._schema
            aliased = any(value.alias_info is not None for value in (*schema.returns, *schema.arguments))
            self._facts[func] = (
                not aliased,
                schema.is_mutable,
                schema.name.endswith("_") and len(schema.returns) < 2 and torch.Tag.inplace_view not in func.tags,
                any(argument.name == "device" for argument in schema.arguments),
            )
        return self._facts[func]

    def _answer(self, func: Any, args: Any, kwargs: dict[str, Any], fresh: bool) -> Any:
        """What torch's shape rules say; asked once for each operation and shapes, since some rules are slow."""
        if not fresh:
            return func(*args, **kwargs)
        key = (func, _key(args), tuple((name, _key(value)) for name, value in kwargs.items()))
        if key in self._known:
            return _made(self._known[key])
        answer = func(*args, **kwargs)
        given = {tensor.untyped_storage()._cdata for tensor in leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        # Some give their operand's memory although they promise new one (_unsafe_view).
        if all(tensor.untyped_storage()._cdata not in given for tensor in leaves(answer) if isinstance(tensor, Tensor)):
            self._known[key] = _like(answer)
        return answer

    def _dressed(self, answer: Any, operands: Sequence[ShapeTensor]) -> Any:
        if isinstance(answer, Tensor):
            storage = answer.untyped_storage()
            for operand in operands:
                if operand.inner is answer:
                    return operand
                if operand.inner.untyped_storage()._cdata == storage._cdata:
                    return ShapeTensor(answer, operand.buffer)
            return ShapeTensor(answer, Buffer(self, storage.nbytes()))
        if isinstance(answer, list | tuple):
            return type(answer)([self._dressed(part, operands) for part in answer])
        return answer


def _strip(value: Any, operands: list[ShapeTensor]) -> Any:
    """The value with each `ShapeTensor` as its shape; the tensors themselves are added to `operands`."""
    if isinstance(value, ShapeTensor):
        operands.append(value)
        return value.inner
    if isinstance(value, Tensor):
        return value.to(META)
    if isinstance(value, list | tuple):
        return type(value)([_strip(part, operands) for part in value])
    return value


def leaves(value: Any) -> list[Any]:
    """What nested lists, tuples and dicts hold, in their order."""
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in leaves(part)]
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in leaves(part)]
    return [value]


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return value, type(value)


def _like(answer: Any) -> Any:
    """How to make such an answer again."""
    if isinstance(answer, Tensor):
        return (tuple(answer.shape), answer.stride(), answer.dtype)
    return [_like(part) for part in answer] if isinstance(answer, list | tuple) else answer


def _made(like: Any) -> Any:
    if isinstance(like, tuple):
        return torch.empty_strided(like[0], like[1], dtype=like[2], device=META)
    return tuple(map(_made, like)) if isinstance(like, list) else like


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize
