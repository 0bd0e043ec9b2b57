"""Every `python -m benchmarks.…` that a page or a docstring names is there, with the flags it is called with."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.made import REPOSITORY

PAGES = [
    *REPOSITORY.glob("*.md"),
    *(REPOSITORY / "docs").rglob("*.md"),
    *(REPOSITORY / "benchmarks").rglob("*.md"),
    *(REPOSITORY / "benchmarks").rglob("*.py"),
]
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")


def calls(text: str) -> Iterator[tuple[str, set[str]]]:
    """(module, flags) of every call, to the end of its line, sentence or code span; `\\` goes on."""
    for found in re.finditer(r"python -m (benchmarks(?:\.\w+)+)((?:\\\n|[^\n`;#])*)", text):
        yield found[1], set(FLAG.findall(found[2]))


def flags_of(module: str) -> set[str]:
    """The flags that its file or `benchmarks.common` declares."""
    files = (REPOSITORY / (module.replace(".", "/") + ".py"), REPOSITORY / "benchmarks/common.py")
    return set(re.findall(r'"--([a-z][a-z0-9-]*)"', "".join(file.read_text() for file in files))) | {"help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_benchmarks_that_are_named_take_those_flags(page: Path):
    for module, named in calls(page.read_text()):
        assert named <= flags_of(module), f"{module} has no --{', --'.join(sorted(named - flags_of(module)))}"


def test_calls_are_found():
    text = "`python -m benchmarks.a --x 1` or\npython -m benchmarks.gpu.b --y \\\n   --z 2 # --none\n"
    assert list(calls(text)) == [("benchmarks.a", {"x"}), ("benchmarks.gpu.b", {"y", "z"})]
    assert sum(len(list(calls(page.read_text()))) for page in PAGES) > 40
