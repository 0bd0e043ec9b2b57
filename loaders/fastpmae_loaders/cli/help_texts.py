"""The docstrings of a command's dataclasses and functions, as the help texts of its flags."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any, get_type_hints

import docstring_parser
import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

HELP_TEXTS = ConstructorRegistry()
"""For `tyro.cli(registry=...)`: a help text of several lines in the source is one paragraph.

tyro alone keeps the end of a line that an indented one follows, as is every second line of a field's docstring, and of
an argument's every line but the first.
"""
_reading: list[Any] = []


@HELP_TEXTS.struct_rule
def with_help_texts(info: StructTypeInfo) -> StructConstructorSpec | None:
    """tyro's own reading of a dataclass or a function, with our help texts; None for other types."""
    if inspect.isfunction(info.type):
        return _of_function(info.type)
    if not dataclasses.is_dataclass(info.type) or info.type in _reading:
        return None
    _reading.append(info.type)  # tyro's own rule is asked with this one out of the way
    try:
        found = ConstructorRegistry.get_struct_spec(info)
    finally:
        _reading.pop()
    if not isinstance(found, StructConstructorSpec):
        return None
    # read only when the help is printed: it takes the parsing of the class's source
    fields = tuple(
        dataclasses.replace(field, helptext=partial(_help_text, info.type, field.name)) for field in found.fields
    )
    return dataclasses.replace(found, fields=fields)


def _of_function(function: Callable[..., Any]) -> StructConstructorSpec:
    """A function's arguments, as flags."""
    hints = get_type_hints(function, include_extras=True)
    fields = tuple(
        StructFieldSpec(
            name,
            hints[name],
            tyro.MISSING if argument.default is argument.empty else argument.default,
            helptext=partial(_help_text, function, name),
        )
        for name, argument in inspect.signature(function).parameters.items()
    )
    return StructConstructorSpec(function, fields)


@cache
def _docstrings(kind: Any) -> dict[str, str]:
    """By name, what a function says of its arguments, or a dataclass of its fields and of those that it inherits."""
    kinds = [kind]
    if not inspect.isfunction(kind):
        kinds = [base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base)]
    params = [param for base in kinds for param in docstring_parser.parse_from_object(base).params]
    return {param.arg_name: param.description for param in params if param.description}


def _help_text(kind: Any, name: str) -> str | None:
    text = _docstrings(kind).get(name)
    return text and "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip()))
