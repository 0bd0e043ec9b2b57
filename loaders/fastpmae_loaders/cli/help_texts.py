"""The docstrings under the fields of a command's dataclasses, as the help texts of its flags."""

import dataclasses
import re
from functools import cache, partial
from typing import Any

import docstring_parser
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

HELP_TEXTS = ConstructorRegistry()
"""For `tyro.cli(registry=...)`: a help text of several lines in the source is one paragraph.

tyro alone keeps the end of a line that an indented one follows, as is every second line of a field's docstring.
"""
_reading: list[Any] = []


@HELP_TEXTS.struct_rule
def with_help_texts(info: StructTypeInfo) -> StructConstructorSpec | None:
    """tyro's own reading of a dataclass, with our help texts; None for other types."""
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


@cache
def _docstrings(kind: type) -> dict[str, str]:
    """The docstrings of a dataclass's fields, and of those that it inherits, by name."""
    kinds = [base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base)]
    params = [param for base in kinds for param in docstring_parser.parse_from_object(base).params]
    return {param.arg_name: param.description for param in params if param.description}


def _help_text(kind: type, name: str) -> str | None:
    text = _docstrings(kind).get(name)
    return text and "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip()))
