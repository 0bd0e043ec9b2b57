"""Kept machine code, when several processes make it at once."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastpmae_loaders.jit.compiled import _SOURCES
from tests.made import REPOSITORY

PACKAGE = REPOSITORY / "loaders" / "fastpmae_loaders"


@pytest.mark.slow
def test_processes_that_compile_different_overloads_keep_them_apart(tmp_path: Path):
    """Without a lock both give their code the same number, and a later process loads the wrong one.

    Functions of the loaders and of the kernels, in the same processes.
    """
    script = REPOSITORY / "tests/programs/compile_race.py"
    paths = os.pathsep.join(str(REPOSITORY / part) for part in ("", "kernels", "loaders"))
    environment = {**os.environ, "PYTHONPATH": paths, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    kinds = ["f8", "f4", "i8"]
    for _ in range(2):
        running = [
            subprocess.Popen([sys.executable, script, kind], env=environment, stderr=subprocess.PIPE, text=True)
            for kind in kinds
        ]
        for process in running:
            errors = process.communicate(timeout=400)[1]
            assert process.returncode == 0, errors
    # each overload has a file of its own
    for package in ("loaders", "kernels"):
        assert len(list((tmp_path / "cache").rglob(f"*{package}_total*.nbc"))) == len(kinds)


def parsed(name: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))


def is_compiled(function: ast.FunctionDef) -> bool:
    """Whether a function is decorated with `kernel` or `helper`."""
    plain = [each.func if isinstance(each, ast.Call) else each for each in function.decorator_list]
    return any(isinstance(each, ast.Name) and each.id in ("kernel", "helper") for each in plain)


class Module:
    """What the names at a module's top are: bound to what is imported, or to text that other names stand in."""

    def __init__(self, name: str) -> None:
        self.imported: dict[str, tuple[str, str]] = {}
        self.bound: dict[str, list[ast.stmt]] = {}
        self.compiled: list[str] = []
        for statement in parsed(name).body:
            if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("fastpmae_loaders."):
                source = (statement.module or "").removeprefix("fastpmae_loaders.").replace(".", "/")
                self.imported |= {each.asname or each.name: (source, each.name) for each in statement.names}
            elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
                self.bound.setdefault(statement.name, []).append(statement)
                if isinstance(statement, ast.FunctionDef) and is_compiled(statement):
                    self.compiled.append(statement.name)
                    statement.decorator_list = []
            elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                for node in (node for target in targets for node in ast.walk(target)):
                    if isinstance(node, ast.Name):
                        self.bound.setdefault(node.id, []).append(statement)


def test_kept_code_is_bound_to_all_that_it_is_made_of():
    """Every module that a compiled function, or a constant or function that it names, stands in."""
    names = [path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")]
    modules = {name: Module(name) for name in names if not name.endswith("__init__")}
    pending = [(name, function) for name, module in modules.items() for function in module.compiled]
    assert len(pending) > 50
    seen = set()
    while pending:
        name, bound = pending.pop()
        module = modules.get(name)
        if module is None or (name, bound) in seen:
            continue
        seen.add((name, bound))
        if bound in module.imported:
            pending.append(module.imported[bound])
        for statement in module.bound.get(bound, []):
            used = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
            pending += [(name, each) for each in used if each in module.bound or each in module.imported]
    made_of = {name for name, bound in seen if bound in modules[name].bound}
    assert made_of <= {*_SOURCES, "engines/decoders"}
