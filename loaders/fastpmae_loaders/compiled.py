"""numba's compiler as these modules use it: no lock held, and machine code kept on disk between runs."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba.core import caching

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None

# what compiled code is made of; numba itself asks only whether the one file that a function stands in changed
_SOURCES = (
    "compiled",
    "elementary",
    "philox",
    "vectors",
    "floats",
    "recipes",
    "plan",
    "passes",
    "resize",
    "colour",
    "scratch",
    "views",
    "blockwise",
    "jpeg",
    "markers",
)


def _stamp() -> str:
    here = Path(__file__).parent
    total = hashlib.sha256()
    for name in (*_SOURCES, "ffcv_engine"):
        total.update((here / f"{name}.py").read_bytes())
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
    overloads at once would give both the same number, and each then loads the other's code.
    """

    def locked(*arguments: Any) -> Any:
        with _alone(Path(file._cache_path) / "fastpmae.lock"):
            return function(*arguments)

    return locked


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    try:
        lock = path.open("a")
    except OSError:  # a folder that is not there yet, or may only be read: nobody writes to it
        yield
        return
    with lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def helper(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a function that only compiled ones call: as a part of them, and without what Python would need."""
    if function is None:
        return lambda wrapped: helper(wrapped, **options)
    compile_with: Any = numba.njit
    return compile_with(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)(function)
