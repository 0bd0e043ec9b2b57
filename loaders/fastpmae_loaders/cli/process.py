"""How a command's process begins and ends: ctrl-C gets one sentence at any moment, and a second one ends it at once.

Importing torch takes seconds, in which an interrupt would end in a traceback out of somebody's import. So the package
looks, before anything else is imported, whether this process is one of our commands. In a program of somebody else's,
which merely imports us, nothing is changed.
"""

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import PurePath
from types import FrameType
from typing import Any, NoReturn

TOGETHER = 0.2
"""Seconds: what passes a signal on (timeout, a wrapper) may send it to the process and to its group, which is one."""

COMMANDS = {"protocols": "eval", "features": "embed"}
"""The commands that bear another name than their module."""

_command: str | None = None
_speaking, _said = threading.Lock(), False


def command_of(arguments: list[str], original: list[str]) -> str | None:
    """Which command a process was started as, by `sys.argv` and `sys.orig_argv` while packages are imported.

    Either by its script (`fastpmae-train`), or by its module (`python -m fastpmae.train`), while whose package is
    imported the first argument is "-m". None for any other process.
    """
    first = PurePath(arguments[0]).name if arguments else ""
    if first.startswith("fastpmae-"):
        return first
    if first == "-m" and "-m" in original:
        package, _, module = "".join(original[original.index("-m") + 1 :][:1]).partition(".")
        if package in ("fastpmae", "fastpmae_loaders") and module:
            name = module.removesuffix(".cli").rpartition(".")[2]
            return f"fastpmae-{COMMANDS.get(name, name)}"
    return None


def is_command() -> bool:
    """Whether this process is one of our commands, and its signals therefore ours."""
    return _command is not None


def begin() -> None:
    """To be called before anything that takes long is imported."""
    global _command
    if _command is None:
        _command = command_of(getattr(sys, "argv", []), sys.orig_argv)
    if _command is None:
        return
    _open_what_is_closed()
    # A process that a shell started deaf to ctrl-C stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Within it ctrl-C raises KeyboardInterrupt, or does what the work itself asks for; a second one ends the process.

    After it there is nothing left to lose, and a signal does what it does by default.
    """
    if _command is None or signal.getsignal(signal.SIGINT) is not _leave:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_watch, args=(reading,), name="ctrl-C", daemon=True).start()
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    sys.unraisablehook = _pass_on
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _open_what_is_closed() -> None:
    """Give streams that this process was started without a place where nothing is.

    Otherwise the next file to be opened would take their number, and what a library prints would end up in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


@contextlib.contextmanager
def last_word() -> Iterator[bool]:
    """Whether what this process says of its interrupt has yet to be said.

    The main thread may hear of a second ctrl-C while the thread that waits for one does: one of them speaks.
    """
    global _said
    # Not for ever: who speaks may be stuck in a terminal.
    held = _speaking.acquire(timeout=1.0)
    try:
        first, _said = not _said, True
        yield first
    finally:
        if held:
            _speaking.release()


def _leave(number: int = signal.SIGINT, frame: FrameType | None = None, sentence: str = "interrupted") -> NoReturn:
    """End the process, from whatever it is doing."""
    with last_word() as first, contextlib.suppress(OSError):
        if first:
            # A progress bar hides the cursor.
            shown = "\r\n\x1b[?25h" if os.isatty(2) else ""
            os.write(2, f"{shown}{_command}: {sentence}\n".encode())
    os._exit(128 + number)


def _watch(reading: int) -> None:
    """Waits for a second ctrl-C, which the main thread may be too deep in compiled code to hear of."""
    first: float | None = None
    while True:
        for number in os.read(reading, 64):
            if number != signal.SIGINT:
                continue
            if first is None:
                first = time.monotonic()
            elif time.monotonic() - first > TOGETHER:
                _leave(sentence="ended at once, by a second ctrl-C")


def _pass_on(unraisable: Any) -> None:
    """An interrupt that fell into a place that cannot raise, a destructor say, comes again a moment later."""
    if unraisable.exc_type is not None and issubclass(unraisable.exc_type, KeyboardInterrupt):
        _thread.interrupt_main()
    else:
        sys.__unraisablehook__(unraisable)
