"""What this process may use of its machine: cores and memory, as affinity and control groups leave them."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MOST_THREADS = 256
"""Of one loader."""
_ROOT = Path("/")


def usable_cores(root: Path = _ROOT) -> int:
    """CPU cores that this process may keep busy, at least 1.

    Those that it may run on, or fewer where a control group (a container, a job of a scheduler) has a quota: of that
    the whole cores, because who goes beyond a quota is stopped with all threads, the one that feeds a GPU too.

    Args:
        root: where `proc` and the mounts of the control groups lie.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups("cpu", root):
        quota = _quota(group)
        if quota is not None:
            cores = min(cores, int(quota))
    return max(1, cores)


def usable_memory(root: Path = _ROOT) -> int | None:
    """Bytes of memory that this process and its files in memory may take: the machine's, or a control group's limit.

    None where the system does not tell.

    Args:
        root: where `proc` and the mounts of the control groups lie.
    """
    known = [
        limit
        for group in _groups("memory", root)
        # the first two are version 2's, beyond the second pages are taken back as soon as they are there
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes")
        if (limit := _number(_text(group / name))) is not None and limit > 0
    ]
    total = _physical_memory(root)
    return min(known if total is None else [*known, total], default=None)


def loader_threads(asked: int = 0, sharers: int = 1) -> int:
    """Threads for a loader: as many as asked for, or, for 0, this process's share of the cores.

    Args:
        sharers: processes like this one that the cores are shared with, this one included.
    """
    return asked or max(1, min(usable_cores() // sharers, MOST_THREADS))


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the control groups that this process is in, from its own up to the topmost that is visible.

    Of version 1's hierarchy of the controller and of version 2's, whichever there are. In a container a process may be
    told its path on the host, of which it sees the end: what is mounted says where that begins. A line that is not
    understood says nothing.
    """
    paths: dict[int, PurePosixPath] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            paths[2] = PurePosixPath(path)
        elif controller in controllers.split(","):
            paths[1] = PurePosixPath(path)
    for line in _lines(root / "proc/self/mountinfo"):
        mounted, filesystem = (part.split() for part in (line.partition(" - ")[0], line.partition(" - ")[2]))
        if len(mounted) < 5 or len(filesystem) < 3:
            continue
        version = 2 if filesystem[0] == "cgroup2" else 1
        if version not in paths or (version == 1 and controller not in filesystem[2].split(",")):
            continue
        beginning, path = mounted[3], paths[version]
        inside = path.relative_to(beginning) if path.is_relative_to(beginning) else PurePosixPath()
        if ".." in inside.parts:  # of a process outside of what is visible
            inside = PurePosixPath()
        for group in (inside, *inside.parents):
            yield root / mounted[4].lstrip("/") / group


def _quota(group: Path) -> float | None:
    """Cores that a group may keep busy; None where it has no quota."""
    words = (_text(group / "cpu.max") or "").split()
    if not words:
        words = [_text(group / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    if len(words) != 2:
        return None
    quota, period = map(_number, words)
    if quota is None or period is None or quota <= 0 or period <= 0:
        return None
    return quota / period


def _physical_memory(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        words = line.split()
        if words[:1] == ["MemTotal:"] and (kilobytes := _number(words[1])) is not None:
            return 1024 * kilobytes
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _number(text: str | None) -> int | None:
    """A whole number; None for `max` and for what is none."""
    try:
        return int(text or "")
    except ValueError:
        return None


def _lines(path: Path) -> list[str]:
    return (_text(path) or "").splitlines()


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return None
