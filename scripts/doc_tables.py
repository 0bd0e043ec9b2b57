"""Writes three parts of the documentation from the code: fastpmae-train's settings, fastpmae-eval's flags, the map.

.venv/bin/python scripts/doc_tables.py      rewrites the parts of docs/*.md between their markers
"""

import ast
import dataclasses
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import fastpmae.config
import fastpmae.evaluate.cli
import fastpmae.evaluate.recipe
from fastpmae.config import Config
from fastpmae.evaluate.cli import Common, Finetune, Knn, Linear, Lowshot, Probe
from fastpmae.evaluate.recipe import FinetuneConfig
from fastpmae.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("fastpmae", "loaders/fastpmae_loaders", "kernels/fastpmae_kernels", "scripts")


def settings() -> str:
    """One table for each group of settings, with the values of the `paper` preset."""
    texts, lines = _help_texts(fastpmae.config), []
    for group, kind in get_type_hints(Config).items():
        lines += [f"**{group}**: {kind.__doc__}", "", *_table(kind, getattr(PRESETS["paper"], group), texts), ""]
    return "\n".join(lines)


def evaluation() -> str:
    """One table for the flags that every evaluation has, for each subcommand's own, and for fine-tuning's settings."""
    texts = _help_texts(fastpmae.evaluate.cli) | _help_texts(fastpmae.evaluate.recipe)
    lines = ["**every subcommand**", "", *_table(Common, None, texts), ""]
    for name, kind in (
        ("knn", Knn), ("linear", Linear), ("lowshot", Lowshot), ("probe", Probe), ("finetune", Finetune)
    ):  # fmt: skip
        lines += [f"**{name}**: {kind.__doc__}", "", *_table(kind, None, texts), ""]
    lines += [
        "**probe and finetune**, with the values of `--preset paper`",
        "",
        *_table(FinetuneConfig, FinetuneConfig(), texts),
        "",
    ]
    return "\n".join(lines)


def _table(kind: type, values: Any, texts: dict[tuple[str, str], str]) -> list[str]:
    """A row for each flag: those of a dataclass but for its positional arguments and what has tables of its own."""
    lines, hints = ["| flag | value | meaning |", "| --- | --- | --- |"], get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, text = hints[field.name], texts.get((kind.__name__, field.name), "")
        if field.name == "weights" or dataclasses.is_dataclass(hint):
            continue
        if get_origin(hint) is Literal:
            text = ", ".join(f"`{choice}`" for choice in get_args(hint)) + ". " + text
        value = field.default if values is None else getattr(values, field.name)
        shown = "" if value is dataclasses.MISSING else _plain(value)
        lines.append(f"| `--{field.name.replace('_', '-')}` | {shown} | {text.replace('|', '/')} |")
    return lines


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


def _help_texts(module: ModuleType) -> dict[tuple[str, str], str]:
    """The docstring under each field of the settings, by class and field."""
    texts = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            for field, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                    texts[node.name, ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
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
