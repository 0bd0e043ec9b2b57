"""The pickle machine without its functions: what torch.save's pickles make, nothing imported and nothing called.

A pickle is a program for a small machine, and a stranger's may call any function of Python. Here its steps are followed
one by one (`pickletools` takes the file apart) on a machine that has no functions: what would be imported is a name,
what would be called gives a stand-in that says whose it is. Only dictionaries, lists, plain values and torch's
plain tensors become what they are. So the optimizers' numpy numbers, the options and the settings of any trainer are
passed over, whatever their classes are and wherever they come from.
"""

import math
import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

STEPS = 10_000_000
"""Steps of a pickle; the largest checkpoints take some hundred thousand."""
LONGEST_NAME = 1000
"""Signs in the name of a module or class: a stand-in keeps it, and each step may make one."""
LARGEST_KEY = 2**64
"""Whole numbers are keys below it: Python computes the hash of a number of megabytes anew each time."""

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
    # of quantised tensors, which are told from plain ones later
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
    "QUInt4x2Storage": torch.uint8,
    "QUInt2x4Storage": torch.uint8,
}
DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
KINDS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor on the meta device, which has no numbers",
    "_rebuild_njt": "a nested tensor",
}
DANGEROUS = (
    "os",
    "posix",
    "nt",
    "subprocess",
    "sys",
    "shutil",
    "socket",
    "importlib",
    "runpy",
    "ctypes",
    "pty",
    "code",
)
"""Modules whose functions do something, which nobody's weights need."""
HARMLESS = (
    "set", "frozenset", "bytearray", "bytes", "complex", "dict", "list", "tuple", "slice", "range", "object", "int",
    "float", "str", "bool", "getattr", "Ellipsis", "NotImplemented",
)  # fmt: skip
"""Names of Python's own that options and settings hold; the others (eval, exec, open, ...) run something."""


class PickleError(Exception):
    """A file that torch.save has not written, or a damaged one; the message says what is odd about `it`."""


class CutOffError(PickleError):
    """A file that ends before it should."""


@dataclass(frozen=True, eq=False)
class StandIn:
    """In the place of an object that is not made; `kind` says what it would be."""

    kind: str


@dataclass(frozen=True, eq=False)
class _Name:
    """In the place of what would be imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, eq=False)
class Storage:
    """Numbers one after the other in the file."""

    key: str
    dtype: torch.dtype
    count: int
    read: Callable[["Storage", int, int], bytearray]
    """(itself, first byte, bytes) -> that part of its numbers."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor that is still in the file."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> Tensor:
        """The tensor, with memory of its own. Raises PickleError where the file does not hold its numbers."""
        if not self.nbytes:
            return torch.zeros(self.shape, dtype=self.dtype)
        # Only the part that the tensor spans: many may share a storage.
        spanned = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        width = self.dtype.itemsize
        raw = self.storage.read(self.storage, self.offset * width, spanned * width)
        tensor = torch.frombuffer(raw, dtype=self.dtype).as_strided(self.shape, self.strides)
        return tensor.clone(memory_format=torch.contiguous_format)


def storage_of(pid: tuple[Any, ...], read: Callable[[Storage, int, int], bytearray]) -> Storage:
    """The storage that a pickle names by ("storage", type, key, device, count, ...)."""
    match pid:
        case ("storage", _Name(name=name), str(key), _, int(count), *_) if count >= 0 and name in STORAGES:
            return Storage(key, STORAGES[name], count, read)
    raise PickleError("it is damaged: it names numbers that are none")


def _tensor(arguments: tuple[Any, ...], dtype: torch.dtype | None = None) -> Stored:
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_):
            pass
        case _:
            raise PickleError("it is damaged: a tensor without numbers")
    dtype = dtype or storage.dtype
    counts = (offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > 64 or any(type(n) is not int or not 0 <= n < 2**62 for n in counts):
        raise PickleError("it is damaged: a tensor without a shape")
    # torch counts an empty tensor's other axes too.
    if math.prod(max(1, size) for size in shape) >= 2**59:
        raise PickleError("it is damaged: a tensor of more numbers than there can be")
    last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    if math.prod(shape) and (last + 1) * dtype.itemsize > storage.size:
        raise PickleError(f"it is damaged: a tensor of {list(shape)} is larger than its numbers")
    if math.prod(shape) >= 2**62:
        raise PickleError(f"it is damaged: a tensor of {list(shape)}")
    return Stored(storage, dtype, offset, shape, strides)


def _called(function: Any, arguments: Any) -> Any:
    """What calling `function` would give: a tensor, an empty container, or a stand-in."""
    if not isinstance(function, _Name):
        return StandIn("of a kind that the file makes itself")
    given = arguments if isinstance(arguments, tuple) else ()
    match str(function):
        case "collections.OrderedDict" | "collections.defaultdict" | "builtins.dict" | "__builtin__.dict":
            return {}
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2":
            return _tensor(given)
        case "torch._utils._rebuild_tensor_v3" if len(given) > 6 and isinstance(given[6], _Name):
            kind = DTYPES.get(str(given[6]))
            return _tensor(given, kind) if kind else StandIn(f"a tensor of {given[6]}, which this torch does not know")
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state" if given:
            return given[0]
        case "torch._tensor._rebuild_from_type_v2" if len(given) > 2:
            return _called(given[0], given[2])
        case "torch.Size" if given and isinstance(given[0], tuple):
            return given[0]
    return StandIn(KINDS.get(function.name, f"of the type {function}"))


def _imported(module: Any, name: Any) -> _Name:
    """A name; refused where no weights would have it and calling it would do something."""
    if not (isinstance(module, str) and isinstance(name, str) and len(module) + len(name) <= LONGEST_NAME):
        raise PickleError("it is damaged: it names something by what is no name")
    first, last = module.split(".")[0], name.split(".")[-1]
    own = first in ("builtins", "__builtin__")
    if first in DANGEROUS or last in ("open", "system") or (own and name.split(".")[0] not in HARMLESS):
        raise PickleError(f"it would call {module}.{name} where it is unpickled")
    return _Name(module, name)


def _is_key(key: Any) -> bool:
    """Whether a dictionary's entry is kept: the others (tuples, objects) are no names of tensors."""
    return isinstance(key, str | float | None) or (isinstance(key, int) and abs(key) < LARGEST_KEY)


@dataclass(eq=False)
class _Machine:
    """The pickle machine's memory, and its steps by name."""

    stored: Callable[[tuple[Any, ...]], Storage]
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def marked(self) -> list[Any]:
        """What was pushed since the last mark, taken off."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update((key, value) for key, value in pairs if _is_key(key))

    def append(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def call(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _called(self.stack[-1], arguments)

    def step(self, name: str, argument: Any) -> None:
        """One step. Raises PickleError for one that no file of torch.save takes."""
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(stack)
                self.stack = []
            case "POP":
                if stack:
                    stack.pop()
                else:
                    self.marked()
            case "POP_MARK":
                self.marked()
            case "DUP":
                stack.append(stack[-1])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_SET":
                stack.append(StandIn("of the type set"))
            case "TUPLE" | "LIST":
                items = self.marked()
                self.stack.append(tuple(items) if name == "TUPLE" else items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                items = tuple(stack[-count:])
                if len(items) < count:
                    raise IndexError("a tuple of nothing")
                stack[-count:] = [items]
            case "DICT":
                items = self.marked()
                self.stack.append({})
                self.set_items(items)
            case "FROZENSET":
                self.marked()
                self.stack.append(StandIn("of the type frozenset"))
            case "ADDITEMS":
                self.marked()
            case "SETITEM":
                self.set_items([stack.pop(-2), stack.pop()])
            case "SETITEMS":
                self.set_items(self.marked())
            case "APPEND":
                self.append([stack.pop()])
            case "APPENDS":
                self.append(self.marked())
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[int(argument)])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[int(argument)] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GLOBAL":
                module, _, word = str(argument).partition(" ")
                stack.append(_imported(module, word))
            case "STACK_GLOBAL":
                word, module = stack.pop(), stack.pop()
                stack.append(_imported(module, word))
            case "INST":
                module, _, word = str(argument).partition(" ")
                arguments = tuple(self.marked())
                self.stack.append(_called(_imported(module, word), arguments))
            case "OBJ":
                function, *rest = self.marked()
                self.stack.append(_called(function, tuple(rest)))
            case "REDUCE" | "NEWOBJ":
                self.call()
            case "NEWOBJ_EX":
                stack.pop()
                self.call()
            case "BUILD":
                stack.pop()  # what an object's attributes would be
            case "BINPERSID":
                pid = stack.pop()
                pid = pid if isinstance(pid, tuple) else ()
                # "module": a class with its source, as torch before 1.6 kept it beside a whole network
                stack.append(pid[1] if pid[:1] == ("module",) and len(pid) > 1 else self.stored(pid))
            case _ if argument is not None and name not in ("PERSID", "EXT1", "EXT2", "EXT4"):
                stack.append(argument)  # numbers, strings and bytes, decoded already
            case _:
                raise PickleError(f"it is damaged: a step {name}")


def follow(file: Any, stored: Callable[[tuple[Any, ...]], Storage]) -> Any:
    """What the pickle at the file's place makes; the file, of which only `read` and `readline` are used, then stands
    behind it."""
    machine = _Machine(stored)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd strings, which are no weights
        return _run(machine, file)


def _run(machine: _Machine, file: Any) -> Any:
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if operation.name == "STOP":
            return machine.stack[-1]
        if count > STEPS:
            raise PickleError("its pickle takes too many steps")
        machine.step(operation.name, argument)
    raise CutOffError("it is cut off")
