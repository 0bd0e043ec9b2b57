"""numba's compiler as the CPU forms use it: without Python's lock, and machine code is kept on disk between runs."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fastpmae_kernels.builtin_names import pythons_own

# the package comes to numba by way of this module first
with pythons_own():
    from numba import njit

from fastpmae_kernels.cpu.cache import keep


def _stamp() -> str:
    """Told by all modules of the package: functions of one become part of another's code."""
    package = Path(__file__).parents[1]
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()


_STAMP = _stamp()


def compiled(*freedoms: str, error_model: Literal["python", "numpy"] = "python") -> Callable[[Callable], Any]:
    """numba's compiler, allowed these freedoms of arithmetic; the kept code is used while no module here changes.

    `error_model="numpy"` lets a division by 0 pass, as vector instructions do.
    """

    def compile_it(function: Callable) -> Any:
        return keep(njit(nogil=True, fastmath=set(freedoms), error_model=error_model)(function), _STAMP)

    return compile_it
