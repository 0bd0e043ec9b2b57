"""Locks on parts of an open file, which belong to whoever opened it and end with the process (Linux).

Other than `locks.lock` these keep two openings of one process apart too ("open file description locks").
"""

import os
import struct

try:
    import fcntl
except ImportError:
    fcntl = None

_COMMAND = getattr(fcntl, "F_OFD_SETLK", None)


def available() -> bool:
    """Whether this system has such locks."""
    return _COMMAND is not None


def lock_range(descriptor: int, start: int, size: int = 1, *, shared: bool = False) -> bool:
    """Lock a part of a file, for this opening alone or, shared, together with others; whether that was possible now."""
    assert fcntl is not None
    return _set(descriptor, fcntl.F_RDLCK if shared else fcntl.F_WRLCK, start, size)


def unlock_range(descriptor: int, start: int, size: int = 1) -> None:
    """Give a part up again."""
    assert fcntl is not None
    _set(descriptor, fcntl.F_UNLCK, start, size)


def _set(descriptor: int, kind: int, start: int, size: int) -> bool:
    assert fcntl is not None
    assert _COMMAND is not None
    try:
        fcntl.fcntl(descriptor, _COMMAND, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, size, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True
