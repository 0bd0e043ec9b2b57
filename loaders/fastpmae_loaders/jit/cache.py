"""Machine code that numba has made, kept on disk between runs: one process at a time reads or writes a function's."""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastpmae_loaders.builtin_names import pythons_own

# public modules come to numba by way of this one first
with pythons_own():
    from numba.core.caching import IndexDataCacheFile

from fastpmae_loaders.locks import lock


def keep(compiled: Any, stamp: str) -> Any:
    """Keep what numba makes of a function, for as long as `stamp` stays the same; the function itself is returned.

    The code lies beside the function's module, or where NUMBA_CACHE_DIR says, or in the user's own cache folder where
    the module's may not be written to. Where nothing may be written, each process compiles anew.
    """
    if not hasattr(compiled, "enable_caching"):  # NUMBA_DISABLE_JIT leaves a function as it is
        return compiled
    try:
        compiled.enable_caching()
    except RuntimeError:  # no folder may be written to
        return compiled
    file = getattr(compiled._cache, "_cache_file", None)
    if isinstance(file, IndexDataCacheFile):
        # numba itself asks only whether the one file that a function stands in has changed
        file._source_stamp = stamp
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
