"""The edits that docs/adapters.md describes, as it describes them: where they are, and made in a text.

An edit is one of these, where A and B are how a statement begins, and FILE a path in the codebase:

    In `FILE`, in place of `A`:              and a block of lines; also: in place of `A` to `B`
    In `FILE`, after `A`:                    and a block of lines, after or before every statement that begins so
    In `FILE`, before `A`:
    In `FILE`, `one text` becomes `another`.   wherever it stands
"""

import ast
import re
import textwrap
from dataclasses import dataclass
from typing import Any, Literal

_EDIT = re.compile(
    r"In `(?P<path>[^`]+)`,\s(?:"
    r"(?P<how>in\splace\sof|after|before)\s`(?P<first>[^`]+)`(?:\sto\s`(?P<last>[^`]+)`)?:\n\n```python\n(?P<lines>.*?)```"
    r"|`(?P<old>[^`]+)`\sbecomes\s`(?P<new>[^`]+)`)",
    re.DOTALL,
)


class EditError(Exception):
    """An edit that does not fit the text: in one sentence, where and why."""


@dataclass(frozen=True)
class Edit:
    """One change of a file: `lines` in place of, before or after statements, or `last` (a text) in place of `first`."""

    path: str
    how: Literal["in place of", "after", "before", "becomes"]
    first: str
    last: str
    lines: str = ""


def edits_of(page: str, section: str) -> list[Edit]:
    """The edits of a section of the page, in their order.

    Raises:
        EditError: where there is no such section, or no edit in it.
    """
    found = re.search(rf"^##+ {re.escape(section)}\n(.*?)(?=^##+ |\Z)", page, re.DOTALL | re.MULTILINE)
    if found is None:
        raise EditError(f"docs/adapters.md has no section {section!r}")
    edits = []
    for match in _EDIT.finditer(found[1]):
        part = match.groupdict()
        if part["old"]:
            edits.append(Edit(part["path"], "becomes", part["old"], part["new"]))
        else:
            how: Any = " ".join(part["how"].split())
            edits.append(Edit(part["path"], how, part["first"], part["last"] or part["first"], part["lines"]))
    if not edits:
        raise EditError(f"docs/adapters.md describes no edit in its section {section!r}")
    return edits


def applied(edit: Edit, text: str) -> str:
    """The text of a Python file with the edit made.

    Raises:
        EditError: where what the edit looks for is not there, or not once.
    """
    if edit.how == "becomes":
        if edit.first not in text:
            raise EditError(f"{edit.path}: `{edit.first}` is nowhere in it")
        return text.replace(edit.first, edit.last)
    rows = text.split("\n")
    places = _statements(text, edit.first)
    if not places or (edit.how == "in place of" and len(places) > 1):
        raise EditError(f"{edit.path}: {len(places)} statements begin with `{edit.first}`")
    for start, end in reversed(places):
        stop = end
        if edit.last != edit.first:
            later = [place for place in _statements(text, edit.last) if place[0] > start]
            if not later:
                raise EditError(f"{edit.path}: no statement after `{edit.first}` begins with `{edit.last}`")
            stop = later[0][1]
        indent = rows[start][: len(rows[start]) - len(rows[start].lstrip())]
        lines = textwrap.indent(edit.lines.rstrip("\n"), indent).split("\n")
        if edit.how == "in place of":
            rows[start:stop] = lines
        else:
            at = start if edit.how == "before" else end
            rows[at:at] = lines
    return "\n".join(rows)


def _statements(text: str, beginning: str) -> list[tuple[int, int]]:
    """The first line and the one past the last of every statement that begins so, from the top on."""
    rows = text.split("\n")
    return sorted(
        (node.lineno - 1, node.end_lineno or node.lineno)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.stmt) and rows[node.lineno - 1].lstrip().startswith(beginning)
    )
