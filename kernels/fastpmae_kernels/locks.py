"""Locks on open files, where the system and the file system keep any."""

from typing import IO, Any

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None


def lock(file: IO[Any] | int, wait: bool = False) -> bool | None:
    """Lock an open file (flock) for as long as it stays open; the process's death ends it too.

    Returns:
        True when it is ours, False when another process has it (never with `wait`), None where nothing can be locked:
        file systems may do without (Lustre mounted without `flock`: ENOSYS; some NFS: ENOLCK). Only "would block" says
        that a lock is taken.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
