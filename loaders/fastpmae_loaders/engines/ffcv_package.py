"""The package ffcv, imported in such a way that the rest of the process stays as it was."""

# ffcv is an extra, which may be missing
# pyright: reportMissingImports=false

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numba.typed
import numpy as np
import torch

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.sources.jpeg import turbo_available

MISSING = (
    "engine 'ffcv' needs the package ffcv, which is not installed here: pip install 'fastpmae-loaders[ffcv]' (a build "
    "that takes a C++ compiler and the headers of libturbojpeg and OpenCV; in a checkout, make setup FFCV=1), or use "
    "engine 'native', which gives the same bytes"
)


@contextmanager
def _plain_dict() -> Iterator[None]:
    """FFCV keeps its two storage modes in a compiled numba dictionary, which costs every import four seconds.

    Only Python code ever reads it, so for the time of the import a Python dictionary takes its place.
    """
    typed: Any = numba.typed
    compiled = typed.Dict
    typed.Dict = dict
    try:
        yield
    finally:
        typed.Dict = compiled


@contextmanager
def _thread_counts_kept() -> Iterator[None]:
    before, compiled = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
        numba.set_num_threads(compiled)


def import_ffcv() -> Any:
    """The package, as it is told to leave the rest of the process alone. UserError where it is not to be had."""
    with _thread_counts_kept(), _plain_dict(), warnings.catch_warnings():
        # it imports distutils and builds syntax trees in deprecated ways
        warnings.simplefilter("ignore")
        try:
            import ffcv
            import ffcv.fields
            import ffcv.loader
            import ffcv.memory_managers
            import ffcv.pipeline.allocation_query
            import ffcv.pipeline.compiler
            import ffcv.pipeline.operation
            import ffcv.reader
            import ffcv.traversal_order.base
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] == "ffcv":
                raise UserError(MISSING) from None
            raise UserError(f"the package ffcv is installed but {error.name!r}, which it needs, is not") from None
        except (ImportError, OSError) as error:
            raise UserError(f"the package ffcv is installed but does not load: {error}") from None
    if not turbo_available():
        raise UserError("the package ffcv is installed but was built without libjpeg-turbo's libturbojpeg")
    _leave_shared_types_alone(ffcv)
    return ffcv


def _leave_shared_types_alone(ffcv: Any) -> None:
    """Give FFCV's memory map a reader whose types are its own.

    FFCV declares the map read-only by changing numba's one and only uint8[::1], whose hash changes with it: every
    function that was compiled for such an array before is then lost to numba (a KeyError in the next compilation).
    """
    from ffcv.memory_managers import OSCacheManager

    data = numba.types.Array(numba.uint8, 1, "C", readonly=True)
    table = numba.types.Array(numba.uint64, 1, "C")
    state = numba.types.Tuple([data, table, table])

    def compile_reader(self: Any) -> Any:
        def region(pointer: Any, state: Any) -> Any:
            data, pointers, sizes = state
            return data[pointer : pointer + sizes[np.searchsorted(pointers, pointer)]]

        return ffcv.pipeline.compiler.Compiler.compile(region, data(numba.uint64, state))

    manager: Any = OSCacheManager
    manager.state_type = property(lambda self: state)
    manager.compile_reader = compile_reader
