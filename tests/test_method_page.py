"""docs/method.md says which function computes what: each one that it names is there, and its diagram is up to date."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/method.md").read_text()
PLACES = re.findall(r"\[`([\w/]+\.py):([\w.]+)`\]\(\.\./([\w/]+\.py)\)", PAGE)


def defined(path: Path) -> set[str]:
    """Functions, classes, methods and module-level names of a file, methods as `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize(("path", "name", "link"), PLACES, ids=[f"{path}:{name}" for path, name, _ in PLACES])
def test_a_function_that_the_page_names_exists(path, name, link):
    assert path == link
    assert name in defined(ROOT / path)


def test_every_equation_has_its_function():
    """Each place is written as a link, and each of the paper's equations is followed by at least one."""
    assert len(re.findall(r"[\w/]+\.py:\w", PAGE)) == len(PLACES)
    sections = dict(re.findall(r"^### Equation (\d)[^\n]*\n(.*?)(?=^##|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
    assert sorted(sections) == list("12345")
    for section in sections.values():
        assert "```math" in section
        assert re.search(r"\[`[\w/]+\.py:", section)


def test_the_diagram_is_up_to_date():
    spec = importlib.util.spec_from_file_location("method_diagram", ROOT / "scripts/method_diagram.py")
    assert spec is not None
    assert spec.loader is not None
    diagram = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(diagram)
    assert (ROOT / "docs/method.svg").read_text() == diagram.picture(), "run python scripts/method_diagram.py"
