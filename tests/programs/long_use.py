"""Long use of a loader, in a process of its own: `python -m tests.programs.long_use CASE[+CASE] BETON ENGINE ...`.

Each case prints as JSON, on a line of its own, what it has found of memory, threads and open files.
"""

import contextlib
import gc
import json
import linecache
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from fastpmae_loaders import PairedViews, ViewSettings

SETTINGS = ViewSettings(image_size=32, patch_size=8)
OWN = ("stream.py", "runner.py", "paired.py")


def opened(batch_size: int = 50, workers: int = 2) -> PairedViews:
    path, engine = sys.argv[2:4]
    return PairedViews(path, batch_size, engine, SETTINGS, workers=workers)


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208 - open files are counted: no generator may hold one


def files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def memory() -> int:
    """Anonymous memory alone: pages of libraries count as ours or not by who else uses them just now."""
    gc.collect()
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


def settled(count: int, limit: float = 5.0) -> bool:
    """No more threads than so many, and none of a loader's; one that was told to end is gone a little later."""
    until = time.monotonic() + limit
    while tasks() > count and time.monotonic() < until:
        time.sleep(0.01)
    ours = [thread.name for thread in threading.enumerate() if thread.name.startswith("fastpmae-loader")]
    return tasks() <= count and not ours


def epochs(count: str = "100") -> dict[str, Any]:
    """So many epochs, of whose memory ten samples are taken."""
    sizes, before, tenth = [], (0, 0), int(count) // 10
    with opened() as views:
        for epoch in range(10 * tenth):
            views.set_epoch(epoch)
            for _ in views:
                pass
            if epoch % tenth == tenth - 1:
                sizes.append(memory())
            if epoch == 2 * tenth - 1:
                before = tasks(), files()
        after = tasks(), files()
    return {"sizes": sizes, "before": before, "after": after}


def epochs_of_many_threads() -> list[int]:
    sizes = []
    with opened(10, workers=8) as views:
        for epoch in range(250):
            views.set_epoch(epoch)
            for _ in views:
                pass
            if epoch in (49, 249):
                sizes.append(memory())
    return sizes


def loaders() -> list[tuple[int, int, int]]:
    """Loaders that come and go."""
    sizes = []
    for number in range(150):
        with opened() as views:
            next(iter(views))
        del views
        if number in (49, 149):
            sizes.append((memory(), tasks(), files()))
    return sizes


def iterations() -> dict[str, bool]:
    """An epoch left early, two at once, an iteration that is dropped, one that is never finished."""
    with opened() as views:
        next(iter(views))
    gc.collect()
    before = tasks()
    views = opened()
    for _ in views:
        break
    gc.collect()
    # DALI's own threads are its pipeline's, which lives as long as the loader
    working = tasks() if sys.argv[3] == "dali" else before
    for _ in range(3):
        for _ in views:
            break
    early = settled(working)
    for _, first, second in zip(range(3), views, views, strict=False):
        assert (first.index == second.index).all()
    del first, second
    gc.collect()
    one, other = iter(views), iter(views)
    for each in (one, other, other):
        next(each)
    one.close()
    other.close()
    held = iter(views)
    next(held)
    views.close()
    closed = settled(before)
    assert next(held, None) is None
    del held, views
    return {"early": early, "closed": closed}


def ctrl_c() -> list[bool]:
    """A real SIGINT while the program waits for a batch, or works on one."""
    with opened() as views:
        next(iter(views))
    before = tasks()
    ends = []

    def press(ended: threading.Event, after: float = 0.1) -> None:
        # again after a while: Python passes over an interrupt that falls into a __del__
        while not ended.wait(after):
            os.kill(os.getpid(), signal.SIGINT)
            after = 3.0

    for pause in (0.0, 0.002, 0.05):
        ended = threading.Event()
        presser = threading.Thread(target=press, args=(ended,))
        presser.start()
        try:
            with opened() as views:
                while True:
                    for _ in views:
                        time.sleep(pause)
        except KeyboardInterrupt:
            ended.set()
            presser.join()
            ends.append(settled(before))
    return ends


class Presser:
    """Presses before the n-th line, and never again."""

    def __init__(self, n: int):
        self.left, self.where = n, None

    def __call__(self, frame: FrameType, event: str, argument: object) -> "Presser | None":
        if Path(frame.f_code.co_filename).name not in OWN:
            return None
        # a `with` is met again between its body and the lock's release, where no signal can fall
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not line.strip().startswith("with "):
            self.left -= 1
            if self.left == 0:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


def ctrl_c_at_every_line(left: str) -> tuple[int, list[str]]:
    """An interrupt before any line of the loader's own that the program runs, once before each."""
    # an interrupt in __del__ is passed over, by Python's rules
    sys.unraisablehook = lambda unraisable: None
    with opened(2) as views:
        next(iter(views))
    before = tasks()
    pressed, leaks = [], []
    while True:
        presser = Presser(len(pressed) + 1)
        sys.settrace(presser)
        try:
            with contextlib.suppress(KeyboardInterrupt), opened(2) as views:
                for _ in views:
                    if left == "early":
                        break
        finally:
            sys.settrace(None)
        if presser.where is None:
            return len(pressed), leaks
        pressed.append(presser.where)
        if not settled(before):
            leaks.append(presser.where)
            before = tasks()


CASES: tuple[Callable[..., Any], ...] = (
    epochs, epochs_of_many_threads, loaders, iterations, ctrl_c, ctrl_c_at_every_line,
)  # fmt: skip

if __name__ == "__main__":
    for name in sys.argv[1].split("+"):
        print(json.dumps({case.__name__: case for case in CASES}[name](*sys.argv[4:])), flush=True)
