"""Writes parts of the documentation from the code: the flags of every command, and the map.

.venv/bin/python scripts/doc_tables.py      rewrites the parts of docs/*.md between their markers
"""

import ast
import dataclasses
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

from fastpmae.config import Config
from fastpmae.evaluate.arguments import Training
from fastpmae.evaluate.cli import Finetune, Knn, LabelledCommon, Linear, Lowshot, Patches, Probe
from fastpmae.evaluate.dense.arguments import DenseCommon, Detect, Predict, Segment
from fastpmae.evaluate.dense.recipe import DETECT_PRESETS, SEGMENT_PRESETS, DetectConfig, SegmentConfig
from fastpmae.evaluate.features import embed_command
from fastpmae.evaluate.recipe import FinetuneConfig
from fastpmae.export.export import export_command
from fastpmae.pictures.report import report_command
from fastpmae.pictures.view import view_command
from fastpmae.plan.plan import Plan
from fastpmae.presets import PRESETS
from fastpmae_loaders.write import cli as write
from fastpmae_loaders.write.images import ImageSettings

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("fastpmae", "loaders/fastpmae_loaders", "kernels/fastpmae_kernels", "scripts")


def settings() -> str:
    """One table for each group of settings, with the values of the `paper` preset."""
    lines = []
    for group, kind in get_type_hints(Config).items():
        lines += [f"**{group}**: {kind.__doc__}", "", *_table(kind, getattr(PRESETS["paper"], group)), ""]
    return "\n".join(lines)


def evaluation() -> str:
    """One table for the flags that every evaluation has, for each subcommand's own, and for fine-tuning's settings."""
    lines = ["**every subcommand**", "", *_table(LabelledCommon), ""]
    for name, kind in (
        ("knn", Knn), ("linear", Linear), ("lowshot", Lowshot), ("probe", Probe), ("finetune", Finetune)
    ):  # fmt: skip
        lines += [f"**{name}**: {kind.__doc__}", "", *_table(kind), ""]
    lines += [
        "**probe and finetune**, with the values of `--preset paper`",
        "",
        *_table(FinetuneConfig, FinetuneConfig()),
        "",
    ]
    return "\n".join(lines)


def dense() -> str:
    """The same for dense tasks, with the values of the presets of the paper."""
    tables = [
        ("**data and network**", _table(DenseCommon)),
        (f"**patches**: {Patches.__doc__}", _table(Patches)),
        (f"**segment**: {Segment.__doc__}", _table(Segment)),
        ("**segment**, with the values of `--preset paper`", _table(SegmentConfig, SEGMENT_PRESETS["paper"])),
        (f"**detect**: {Detect.__doc__}", _table(Detect)),
        ("**detect**, with the values of `--preset paper`", _table(DetectConfig, DETECT_PRESETS["paper"])),
        (f"**predict**: {Predict.__doc__}", _table(Predict)),
    ]
    return "\n".join(line for title, table in tables for line in (title, "", *table, ""))


def flags(*kinds: Any) -> str:
    """One table for the flags of some dataclasses and functions."""
    rows = [row for kind in kinds for row in (_own_table if isinstance(kind, type) else _table_of_function)(kind)[2:]]
    return "\n".join([*HEAD, *rows, ""])


HEAD = ["| flag | value | meaning |", "| --- | --- | --- |"]


def _table(kind: type, values: Any = None) -> list[str]:
    """A row for each flag: those of a dataclass but for its positional arguments and what has tables of its own."""
    lines, hints, texts = [*HEAD], get_type_hints(kind, include_extras=True), _help_texts(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if Training in _alternatives(hint):
            lines += _table(Training)[len(HEAD) :]
            continue
        if _is_positional(hint) or any(map(dataclasses.is_dataclass, _alternatives(hint))):
            continue
        value = field.default if values is None else getattr(values, field.name)
        lines.append(_row(field.name, hint, value, texts[field.name]))
    return lines


def _own_table(kind: type) -> list[str]:
    """The same without what a dataclass has of others, which have tables of their own."""
    own = {f"| `--{name.replace('_', '-')}` |" for name in kind.__annotations__}
    return [row for row in _table(kind) if row in HEAD or any(map(row.startswith, own))]


def _table_of_function(function: Callable[..., Any]) -> list[str]:
    """The same for the arguments of a function, with the texts of its docstring."""
    hints = get_type_hints(function, include_extras=True)
    texts = {part.arg_name: part.description or "" for part in docstring_parser.parse(function.__doc__ or "").params}
    arguments = inspect.signature(function).parameters.values()
    return HEAD + [
        _row(argument.name, hints[argument.name], argument.default, " ".join(texts[argument.name].split()))
        for argument in arguments
        if not _is_positional(hints[argument.name])
    ]


def _is_positional(hint: Any) -> bool:
    return get_origin(hint) is Annotated and tyro.conf.Positional in hint.__metadata__


def _row(name: str, hint: Any, value: Any, text: str) -> str:
    choices = [choice for part in _alternatives(hint) if get_origin(part) is Literal for choice in get_args(part)]
    if choices:
        text = ", ".join(f"`{choice}`" for choice in choices) + ". " + text
    shown = "" if value is dataclasses.MISSING else _plain(value)
    return f"| `--{name.replace('_', '-')}` | {shown} | {text.replace('|', '/')} |"


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def modules() -> str:
    """A row for each module, with the first paragraph of its docstring."""
    lines = ["| module | what it is |", "| --- | --- |"]
    for folder in MAPPED:
        for path in sorted((ROOT / folder).rglob("*.py"), key=lambda path: (path.parent, path.name)):
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            if path.name != "__init__.py":
                first = text.split("\n\n")[0].replace("\n", " ").replace("|", "/")
                lines.append(f"| `{path.relative_to(ROOT)}` | {first} |")
    return "\n".join([*lines, ""])


PARTS = (
    ("docs/commands.md", "settings", settings),
    ("docs/commands.md", "evaluation", evaluation),
    (
        "docs/commands.md",
        "write",
        partial(flags, write.Command, ImageSettings, write.Source, write.Writing, write.Parts),
    ),
    ("docs/commands.md", "plan", partial(flags, Plan)),
    ("docs/commands.md", "view", partial(flags, view_command)),
    ("docs/commands.md", "report", partial(flags, report_command)),
    ("docs/commands.md", "embed", partial(flags, embed_command)),
    ("docs/commands.md", "export", partial(flags, export_command)),
    ("docs/dense.md", "dense", dense),
    ("docs/map.md", "modules", modules),
)


def rewritten() -> dict[Path, str]:
    """The pages with all parts as they should be, by path."""
    pages = {ROOT / page: (ROOT / page).read_text() for page, _, _ in PARTS}
    for page, name, part in PARTS:
        begin, end = f"<!-- {name}: written by scripts/doc_tables.py -->", f"<!-- end of {name} -->"
        before, rest = pages[ROOT / page].split(begin)
        pages[ROOT / page] = f"{before}{begin}\n\n{part()}\n{end}{rest.split(end)[1]}"
    return pages


def _help_texts(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, the nearest where classes above it have the field too."""
    texts: dict[str, str] = {}
    for above in reversed(kind.__mro__[:-1]):
        texts |= _own_texts(above)
    return texts


def _own_texts(kind: type) -> dict[str, str]:
    texts = {}
    for node in ast.parse(inspect.getsource(sys.modules[kind.__module__])).body:
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
            for field, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                    texts[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return texts


def _plain(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    for path, text in rewritten().items():
        path.write_text(text)
