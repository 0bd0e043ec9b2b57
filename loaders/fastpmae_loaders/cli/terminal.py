"""What is said to a terminal, a pipe or a file: it may go away at any moment, and no work ends by that."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, cast

from fastpmae_loaders.printable import printable_lines


class Outlet:
    """A stream that drops what cannot be written, and remembers the first reason in `lost`.

    Anything that the stream itself has and this has not (`fileno`, `encoding`, ...) is the stream's. Without a stream,
    as Python has it where the process was started with a closed one, everything is dropped.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.lost: Exception | None = None

    def write(self, text: str) -> int:
        """Write, or drop. What the stream's encoding has no sign for is written as its number."""
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except (OSError, ValueError, AttributeError) as error:
            self._lose(error)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each, or drop it."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Pass on what the stream holds back, or drop it."""
        try:
            self._stream.flush()
        except (OSError, ValueError, AttributeError) as error:
            self._lose(error)

    def isatty(self) -> bool:
        """Whether somebody is looking; false of a stream that is gone."""
        try:
            return self._stream.isatty()
        except (OSError, ValueError, AttributeError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: Exception) -> None:
        # A stream that is not there was closed on purpose, by whoever started the process.
        if self.lost is None and self._stream is not None:
            self.lost = error

    def end(self) -> None:
        """Flush for the last time. What Python itself would try once more at the process's end goes nowhere."""
        self.flush()
        if self.lost is not None:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


def say(sentence: str) -> None:
    """A line on stderr, in one piece among those of other ranks.

    Names from strangers' files may be in it: here and in `tell` they only are read by the terminal, and not obeyed.
    """
    outlet = Outlet(sys.stderr)
    outlet.write(printable_lines(sentence) + "\n")
    outlet.flush()


def tell(sentence: str) -> None:
    """A line on stdout: what a command was asked for. It is there at once, where a pipe is read meanwhile too."""
    print(printable_lines(sentence), flush=True)


def stderr() -> Outlet:
    """The error stream as it is now, for what writes there itself (a progress bar)."""
    return sys.stderr if isinstance(sys.stderr, Outlet) else Outlet(sys.stderr)


@contextlib.contextmanager
def speaking() -> Iterator[Outlet]:
    """Within it `sys.stdout`, which it yields, and `sys.stderr` drop what cannot be written."""
    before = sys.stdout, sys.stderr
    outlets = Outlet(sys.stdout), Outlet(sys.stderr)
    sys.stdout, sys.stderr = cast(Any, outlets)
    try:
        yield outlets[0]
    finally:
        sys.stdout, sys.stderr = before
        for outlet in outlets:
            outlet.end()


def reason_lost(outlet: Outlet) -> str | None:
    """Why output is missing that somebody waits for: not where whoever read it (head, less) has seen enough."""
    error = outlet.lost
    if error is None or (isinstance(error, OSError) and error.errno == errno.EPIPE):
        return None
    return getattr(error, "strerror", None) or str(error)
