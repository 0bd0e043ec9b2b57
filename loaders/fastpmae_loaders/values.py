"""Values from Python as the kind that is asked for: converted where nothing is lost, else refused by a sentence."""

import dataclasses
import functools
import inspect
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path, PurePath
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable, short

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", Path: "a path"}
_LONGEST, _LONGEST_NAME = 80, 4096
PATH_MAX, NAME_MAX = 4095, 255
"""Bytes of the longest path on Linux, and of the longest name in it."""


class Refused(Exception):
    """A value that is not of its kind. Never leaves this module."""


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path, unless it is an address such as s3://bucket/run: those would be taken for folders of that name.

    What has a colon in its name and is there is a path all the same.

    Raises:
        UserError: for an address, for what is no path, and for a name that is too long for any file.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(text, str):
        raise UserError(f"{_shown(path)} is no path: give a text or a pathlib.Path")
    found = SCHEME.match(text)
    if found and not os.path.lexists(f"{found[1]}:"):
        # A Path has lost one of the two slashes.
        address = text if "://" in text else f"{found[1]}://{text[found.end() :]}"
        raise UserError(f"{printable(address)}: {found[1]}:// is not supported; name a file or folder of this machine")
    try:
        name = os.fsencode(text)
    except UnicodeEncodeError:
        raise UserError(f"{short(text)}: no file can be called so") from None
    if b"\0" in name:
        raise UserError(f"{short(text)} does not exist: no file can be called so")
    if len(name) > PATH_MAX or max(map(len, name.split(b"/"))) > NAME_MAX:
        raise UserError(f"{short(text)}: no file or folder can have so long a name")
    return Path(path)


def check_replaceable(path: Path) -> None:
    """Raise UserError where what has a name is neither a file nor nothing: a folder, a device, a pipe, a socket.

    A link counts as what it leads to, and one that leads nowhere as nothing. OSError where that cannot be seen.
    """
    if path.is_dir():
        raise UserError(f"{printable(str(path))} is a folder; name the file to write")
    if path.exists() and not path.is_file():
        raise UserError(f"{printable(str(path))} is a device, a pipe or a socket; name a file to write")


def typed(value: Any, kind: Any, where: str, *, strict: bool = False) -> Any:
    """`value` as `kind` says, the annotation of a setting or an argument.

    1.0 becomes 1, a number of NumPy's Python's own, a list a tuple, a text a path: nothing is lost. A bool is no
    number, a number no bool and a text neither.

    Args:
        where: what the value is of, for the sentence.
        strict: a whole number is written without a point, as in files.

    Raises:
        UserError: for anything else.
    """
    try:
        return _as(value, kind, strict)
    except Refused:
        pass
    raise UserError(f"{where} is {_shown(value)}; expected {_expected(kind)}{_hint(value, kind)}")


class Typed:
    """A dataclass whose fields are what their annotations say, however it came to be (see `typed`)."""

    OF = ""
    """What stands before a field's name in a sentence."""

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():
            object.__setattr__(self, name, typed(getattr(self, name), kind, self.OF + name))


def checked(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function with its arguments as their annotations say (see `typed`): a sentence where one is not."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        bound = signature.bind(*args, **kwargs)
        kinds = _kinds_of_arguments(function)
        for name, value in bound.arguments.items():
            if name in kinds:
                bound.arguments[name] = typed(value, kinds[name], name)
        return function(*bound.args, **bound.kwargs)

    return wrapper


@functools.cache
def _kinds(kind: type) -> dict[str, Any]:
    hints, fields = get_type_hints(kind), dataclasses.fields(kind)
    return {field.name: hints[field.name] for field in fields}


@functools.cache
def _kinds_of_arguments(function: Callable[..., Any]) -> dict[str, Any]:
    several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    plain = {name for name, given in inspect.signature(function).parameters.items() if given.kind not in several}
    return {name: kind for name, kind in get_type_hints(function).items() if name in plain}


def _as(value: Any, kind: Any, strict: bool) -> Any:
    origin, choices = get_origin(kind), get_args(kind)
    if origin is Literal:
        if isinstance(value, str) and value in choices:
            return str(value)
    elif origin in (Union, types.UnionType):
        return _as_one_of(value, choices, strict)
    elif origin in (tuple, Sequence):
        # Whatever is counted and ordered, a configuration's list or an array too.
        if hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, str | bytes | Mapping):
            kinds = choices if origin is tuple and choices[-1] is not ... else choices[:1] * len(value)
            if len(kinds) == len(value):
                return tuple(_as(part, of, strict) for part, of in zip(value, kinds, strict=True))
    elif kind is Path or (origin or kind) is os.PathLike:
        if isinstance(value, str | os.PathLike) and "\0" not in str(value) and (value or not strict):
            return local_path(value)
    elif kind in _SIMPLE:
        return _SIMPLE[kind](value, strict)
    elif kind is Any or not isinstance(origin or kind, type) or _is_a(value, origin or kind):
        return value
    raise Refused


def _as_one_of(value: Any, choices: tuple[Any, ...], strict: bool) -> Any:
    if value is None and type(None) in choices:
        return None
    for kind in choices:  # an address in a store, where one may stand, before it is taken for a path
        if hasattr(kind, "of_text") and (found := kind.of_text(value)) is not None:
            return found
    # An array stays one, and is not gone through; a text is a path where a path may stand.
    first = (Path, os.PathLike) if isinstance(value, str) else (type(value), Path, os.PathLike)
    order = sorted(choices, key=lambda kind: (get_origin(kind) or kind) not in first)
    for kind in order:
        if kind is not type(None):
            try:
                return _as(value, kind, strict)
            except Refused:
                continue
    raise Refused


def _is_a(value: Any, kind: type) -> bool:
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol: what it asks for is seen when it is used
        return not isinstance(value, str | bytes | int | float)


def _number(value: Any) -> Any:
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # of a tensor or an array
        value = value.item()
    # NumPy's bool is no Real, Python's is.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise Refused
    return value


def _whole(value: Any, strict: bool) -> int:
    number = _number(value)
    if isinstance(number, Integral):
        return int(number)
    try:
        whole = int(number)
    except (ValueError, OverflowError):  # not finite
        raise Refused from None
    if strict or whole != number:
        raise Refused
    return whole


def _real(value: Any, strict: bool) -> float:
    number = _number(value)
    try:
        real = float(number)
    except OverflowError:
        raise Refused from None
    if real != number and real == real:
        raise Refused
    return real


def _bool(value: Any, strict: bool) -> bool:
    if type(value).__name__ not in ("bool", "bool_") or type(value).__module__ not in ("builtins", "numpy"):
        raise Refused
    return bool(value)


def _text(value: Any, strict: bool) -> str:
    if not isinstance(value, str | PurePath) or not _can_be_named(value):
        raise Refused
    return str(value)


def _can_be_named(text: Any) -> bool:
    """Whether a file may be called so, and so anything else that a setting names."""
    return "\0" not in str(text) and len(str(text)) <= _LONGEST_NAME


_SIMPLE: dict[Any, Callable[[Any, bool], Any]] = {int: _whole, float: _real, bool: _bool, str: _text}


def _expected(kind: Any) -> str:
    origin, choices = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, choices))
    if origin in (Union, types.UnionType):
        words = dict.fromkeys(_expected(choice) for choice in choices if choice is not type(None))
        return " or ".join([*words, *(["None"] if type(None) in choices else [])])
    if origin is tuple and choices[-1] is not ...:
        return f"{len(choices)} values, each {' or '.join(dict.fromkeys(map(_expected, choices)))}"
    if origin in (tuple, Sequence):
        return "several whole numbers" if choices[0] is int else f"several values, each {_expected(choices[0])}"
    if (origin or kind) is os.PathLike:
        return _WORDS[Path]
    return _WORDS.get(kind) or getattr(kind, "__name__", str(kind))


def _hint(value: Any, kind: Any) -> str:
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if isinstance(value, bool) and {"on", "off"} <= set(choices):
        return f" ({value} is {'on' if value else 'off'!r})"
    if "cuda" in choices and str(value).startswith("cuda:"):
        return f" (which GPU is chosen by CUDA_VISIBLE_DEVICES={str(value).removeprefix('cuda:')})"
    return ""


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python writes
        text = f"of the kind {type(value).__name__}, and very long"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
