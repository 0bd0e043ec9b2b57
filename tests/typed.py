"""While tests run, every annotation of the three packages is checked, shapes and all: see `addopts` in pyproject.toml.

jaxtyping's plugin puts a check (beartype's) around every function and every dataclass as its module is imported. This
module, which conftest imports before any of them, sets right what that must not touch:

- a function that numba, Triton or DALI compiles is read as source: one under a decorator of `COMPILERS` stays as it is.
- torch.compile traces a method of a NamedTuple, and cannot trace what would stand around it there: these stay too.
- what some modules import for type checkers alone, so that they need no jaxtyping, is imported: their shapes count.
- settings (`Typed`) check and convert their own values, such as a list for a tuple: that is left to them.
- an int is a float to a type checker, and so it is here.
- a function within a function would get its check, which takes milliseconds to make, at every call of the outer one;
  and no torch.compile traces that.

Not checked: other processes; and tests with the mark `untyped`, which hand over what no annotation allows, to see it
refused, or let torch.compile trace a function whole. A shape in an item of a list (beartype looks at one, by chance)
should name no axis that another item has with another length: `_rows` tells a reader as much and binds nothing.
"""

import ast
import hashlib
import random
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Any

import beartype._check.code.codemain as beartypes_code
import jaxtyping._import_hook as hook
from beartype import BeartypeConf, FrozenDict, beartype

COMPILERS = {"compiled", "helper", "intrinsic", "jit", "kernel", "overload", "pipeline_def", "operation"}
PACKAGES = {"fastpmae", "fastpmae_kernels", "fastpmae_loaders"}
# tyro's mark of what a command line has yet to give stands in its fields
UNFINISHED = {
    ("fastpmae.evaluate.cli", "LabelledCommon.__init__"),
    ("fastpmae.evaluate.dense.arguments", "DenseCommon.__init__"),
    ("fastpmae.evaluate.dense.arguments", "Predict.__init__"),
}

# beartype picks the item of a list that it looks at by Python's own generator, whose state our checkpoints keep
beartypes_code.getrandbits = random.Random(0).getrandbits
# beartype asks of an IO[bytes] what no BytesIO has
_FILES = FrozenDict({IO[bytes]: BufferedIOBase})
_as_beartype_sees_it = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=_FILES))


def check(function: Any) -> Any:
    """The function with its annotations checked at each call; jaxtyping calls this, as pyproject.toml says."""
    if (function.__module__, function.__qualname__) in UNFINISHED:
        return function
    return _as_beartype_sees_it(function)


_is_no_type_check = hook._is_no_type_check


def _stays_as_it_is(decorator: ast.AST) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
    return name in COMPILERS or _is_no_type_check(decorator)


class _Transformer(hook.JaxtypingTransformer):
    def visit_Module(self, node: ast.Module) -> ast.Module:
        for statement in list(node.body):
            if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
                place = node.body.index(statement)
                node.body[place:place] = [each for each in statement.body if _is_from_outside(each)]
        return super().visit_Module(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
        if "NamedTuple" in bases:
            return node
        written = list(node.decorator_list)
        super().visit_ClassDef(node)
        if "Typed" in bases:
            node.decorator_list = written
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        written = list(node.decorator_list)
        super().visit_FunctionDef(node)
        if any(isinstance(parent, ast.FunctionDef) for parent in self._parents):
            node.decorator_list = written
        return node


def _is_from_outside(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.ImportFrom) or statement.level or statement.module is None:
        return False
    return statement.module.split(".")[0] not in PACKAGES


def _name_of_kept_code(self: hook.Typechecker) -> str:
    """Modules with their checks are kept as bytecode, under another name once this file has changed."""
    return self.hash + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


hook._is_no_type_check = _stays_as_it_is
hook.JaxtypingTransformer = _Transformer
hook.Typechecker.get_hash = _name_of_kept_code
