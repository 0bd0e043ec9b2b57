"""Python's own functions, whatever a program has put in their place.

MAE, SdAE, DINO, iBOT, DINOv2 and DeiT put a function of their own in the place of `print`, which is silent on all ranks
but one. numba registers `print` when it is imported, looks it up by its module and name, and does not find theirs.
"""

import builtins
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType
from typing import Any


@contextmanager
def pythons_own() -> Iterator[None]:
    """Within it the functions of `builtins` are Python's; what a program had put there comes back after it."""
    replaced = _replaced()
    theirs = {name: getattr(builtins, name) for name in replaced}
    for name, own in replaced.items():
        setattr(builtins, name, own)
    try:
        yield
    finally:
        for name, function in theirs.items():
            setattr(builtins, name, function)


def _replaced() -> dict[str, Any]:
    """Python's own functions that something else stands in the place of, by their names."""
    # there are no functions written in Python before somebody puts one there: seldom is anything looked for
    if not any(isinstance(value, FunctionType) for value in vars(builtins).values()):
        return {}
    own = {
        found.__name__: found
        for found in gc.get_objects()
        if type(found) is BuiltinFunctionType and found.__self__ is builtins
    }
    return {name: function for name, function in own.items() if getattr(builtins, name, function) is not function}
