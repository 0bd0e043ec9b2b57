"""numba's compiler as these modules use it: no lock held, and machine code kept on disk between runs."""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastpmae_loaders.builtin_names import pythons_own

# public modules come to numba by way of this one first
with pythons_own():
    import numba
    from numba.core import caching

from fastpmae_loaders.locks import lock

# what compiled code is made of; numba itself asks only whether the one file that a function stands in changed
_SOURCES = (
    "jit/compiled",
    "jit/elementary",
    "jit/philox",
    "jit/memory",
    "jit/vectors",
    "jit/floats",
    "recipes",
    "sampling",
    "pixels/separable",
    "pixels/resize",
    "pixels/bilinear",
    "pixels/colour",
    "engines/scratch",
    "engines/views",
    "blockwise",
    "multiblock",
    "sources/jpeg",
    "sources/markers",
    "sources/turbo",
)


def _stamp() -> str:
    package = Path(__file__).parents[1]
    total = hashlib.sha256()
    for name in (*_SOURCES, "engines/ffcv_engine"):
        total.update((package / f"{name}.py").read_bytes())
    return total.hexdigest()


_STAMP = _stamp()


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a function that Python calls, or many compiled ones do, and keep the code on disk.

    The kept code is used as long as none of these modules changed, and lies beside them, or where
    NUMBA_CACHE_DIR says, or in the user's own cache folder where theirs may not be written to. Where nothing
    may be written, each process compiles anew.
    """
    if function is None:
        return lambda wrapped: kernel(wrapped, **options)
    compiled: Any = numba.njit(nogil=True, **options)(function)
    try:
        compiled.enable_caching()
    except RuntimeError:  # no folder may be written to
        return compiled
    file = getattr(compiled._cache, "_cache_file", None)
    if isinstance(file, caching.IndexDataCacheFile):
        file._source_stamp = _STAMP
        file.load, file.save = _one_at_a_time(file, file.load), _one_at_a_time(file, file.save)
    return compiled


def _one_at_a_time(file: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep other processes out of a function's kept code meanwhile.

    numba numbers the files of a function's overloads by what its index holds: two processes that compile different
    overloads at once would give both the same number, and each then loads the other's code. Where nothing can be
    locked, each process therefore gives its files names of its own: an index that another writes over at the same
    time then costs a compilation, and nothing else.
    """

    def locked(*arguments: Any) -> Any:
        with _alone(Path(file._cache_path) / "fastpmae.lock") as alone:
            if not alone:
                base = file._index_name.removesuffix(".nbi")
                file._data_name_pattern = f"{base}.{_OURS}-{os.getpid()}-{{number:d}}.nbc"
            try:
                return function(*arguments)
            except OSError:  # a full disk, say: what is not kept is compiled anew
                return None

    return locked


_OURS = uuid.uuid4().hex[:12]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    try:
        file = path.open("a")
    except OSError:  # a folder that is not there yet, or may only be read: nobody writes to it
        yield True
        return
    with file:
        yield lock(file, wait=True) is not None


def helper(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a function that only compiled ones call: as a part of them, and without what Python would need."""
    if function is None:
        return lambda wrapped: helper(wrapped, **options)
    compile_with: Any = numba.njit
    return compile_with(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)(function)
