"""Progress of a long count: a bar with the rate in a terminal, now and then a line elsewhere, or silence."""

import contextlib
import time
from collections.abc import Iterator
from typing import IO, cast

from fastpmae_loaders.cli.terminal import say, stderr
from fastpmae_loaders.printable import printable_lines

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_UPDATES = 0.1


class Progress:
    """Counts things done. With `live` it shows them on stderr; without, it is silent."""

    def __init__(self, live: bool = False):
        self._live = live
        self._done = self._total = self._first = 0
        self._unit = "images"
        self._started = self._told = self._ended = 0.0
        self._bar = None
        self._task = None
        self._pause = _SECONDS_BETWEEN_LINES

    def phase(self, text: str) -> None:
        """Says what is being done, in a terminal: elsewhere the first line of progress is soon enough."""
        if self._live and stderr().isatty():
            say(f"{text} ...")

    def tell(self, sentence: str) -> None:
        """A line for the user that must not break the bar."""
        if not self._live:
            return
        if self._bar is not None:
            self._bar.console.print(printable_lines(sentence), markup=False, highlight=False)
        else:
            say(sentence)

    @contextlib.contextmanager
    def count(self, total: int, unit: str) -> Iterator[None]:
        """Within it, `advance` counts up to `total`."""
        self._done, self._first, self._total, self._unit = 0, 0, total, unit
        self._started = self._told = time.monotonic()
        try:
            with self._shown():
                yield
        finally:
            self._ended = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """One more is done, or `count` more."""
        if not self._done:  # the rate leaves out the time that worker processes take to start
            self._started = self._told = time.monotonic()
            self._first = count
        self._done += count
        if not self._live or time.monotonic() < self._told + self._pause:
            return
        self._told = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, rate=self.rate())
        else:
            say(f"{self._done:,} of {self._total:,} {self._unit}, {self.rate()}")

    def rate(self) -> str:
        """Done per second, since the first was; of what takes seconds, how many each takes."""
        end = self._ended if self._ended > self._started else time.monotonic()
        rate = max(self._done - self._first, 0) / max(end - self._started, 1e-9)
        return f"{1 / rate:,.1f} s each" if 0 < rate < 1 else f"{rate:,.0f} {self._unit}/s"

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        if not (self._live and stderr().isatty()):
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        with Progress(
            *columns, console=Console(file=cast(IO[str], stderr())), refresh_per_second=5, transient=True
        ) as bar:
            self._bar, self._task = bar, bar.add_task("", total=self._total, rate="")
            self._pause = _SECONDS_BETWEEN_UPDATES
            try:
                yield
            finally:
                self._bar = None
