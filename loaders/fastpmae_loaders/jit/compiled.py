"""numba's compiler as these modules use it: no lock held, and machine code kept on disk between runs."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastpmae_loaders.builtin_names import pythons_own

# public modules come to numba by way of this one first
with pythons_own():
    import numba

from fastpmae_loaders.jit.cache import keep

# what compiled code is made of
_SOURCES = (
    "jit/compiled",
    "jit/cache",
    "jit/elementary",
    "jit/philox",
    "jit/memory",
    "jit/vectors",
    "jit/floats",
    "recipes",
    "sampling",
    "order",
    "pixels/separable",
    "pixels/resize",
    "pixels/bilinear",
    "pixels/colour",
    "engines/scratch",
    "engines/views",
    "engines/dali_engine",
    "blockwise",
    "multiblock",
    "sources/jpeg",
    "sources/markers",
    "sources/tables",
    "sources/turbo",
    "native/headers",
    "native/huffman",
    "native/data",
    "native/idct",
    "native/colours",
    "native/decoder",
    "native/coefficients",
    "native/jpeg_writer",
)


def _stamp() -> str:
    package = Path(__file__).parents[1]
    total = hashlib.sha256()
    for name in (*_SOURCES, "engines/decoders"):
        total.update((package / f"{name}.py").read_bytes())
    return total.hexdigest()


_STAMP = _stamp()


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a function that Python calls, or many compiled ones do, and keep the code on disk.

    The kept code is used as long as none of these modules changed (see `keep`).
    """
    if function is None:
        return lambda wrapped: kernel(wrapped, **options)
    return keep(numba.njit(nogil=True, **options)(function), _STAMP)


def helper(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a function that only compiled ones call: as a part of them, and without what Python would need."""
    if function is None:
        return lambda wrapped: helper(wrapped, **options)
    compile_with: Any = numba.njit
    return compile_with(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)(function)
