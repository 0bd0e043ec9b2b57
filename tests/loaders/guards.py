"""Memory that ends exactly where a page begins that nobody may touch: one byte too far kills the process."""

import ctypes
import mmap

import numpy as np

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NONE = 0


def guarded(array: np.ndarray, *, at_start: bool = False) -> np.ndarray:
    """A writable copy with a forbidden page right behind its last byte, or right before its first one."""
    pages = -(-max(array.nbytes, 1) // _PAGE)
    memory = mmap.mmap(-1, (pages + 2) * _PAGE)
    whole = np.frombuffer(memory, np.uint8)
    base = whole.ctypes.data
    for page in (base, base + (pages + 1) * _PAGE):
        if _libc.mprotect(page, _PAGE, _NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = _PAGE if at_start else (pages + 1) * _PAGE - array.nbytes
    copy = whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
