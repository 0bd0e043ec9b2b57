"""How far work has come: a bar in a terminal, lines elsewhere, or silence."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

from fastpmae_loaders.cli.terminal import say, stderr
from fastpmae_loaders.printable import printable_lines

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_UPDATES = 0.1


class Bar:
    """A bar on stderr, where that is a terminal: what is done, how much of it, a note, and how long it takes.

    Elsewhere nothing is drawn. A context manager; it can be told of things before and after as well.

    Args:
        total: what `done` counts up to.
        words: what is being done, in front of the bar.
        done: how much of it has been done already.
        stays: the bar is left where it is at the end.
        shown: whether anything is to be drawn at all.
    """

    def __init__(self, total: int, words: str = "", *, done: int = 0, stays: bool = False, shown: bool = True):
        self._bar: Any = None
        if not (shown and stderr().isatty()):
            return
        # elsewhere nobody needs it
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            *([progress.TextColumn("{task.description}", style="bold", markup=False)] if words else []),
            progress.BarColumn(bar_width=None if stays else 40),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[note]}", markup=False),
            *([progress.TimeElapsedColumn()] if stays else []),
            progress.TimeRemainingColumn(),
            console=Console(file=cast(IO[str], stderr())),
            transient=not stays,
        )
        self._task = self._bar.add_task(words, total=total, completed=done, note="")

    @property
    def live(self) -> bool:
        """Whether there is a bar that somebody looks at."""
        return self._bar is not None

    def __enter__(self) -> "Bar":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Nothing moves any more; a second time changes nothing."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int | None = None, *, words: str | None = None, note: str | None = None) -> None:
        """Move the bar, change what stands before it, or behind it; None leaves each as it is."""
        if self._bar is not None:
            fields = {} if note is None else {"note": note}
            self._bar.update(self._task, completed=done, description=words, **fields)

    def tell(self, sentence: str) -> None:
        """A line for the user, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(printable_lines(sentence), markup=False, highlight=False)
        else:
            say(sentence)


@dataclass
class _Count:
    """What is counted: `done` of `total`, of which `first` were done when the rate begins."""

    total: int
    unit: str
    bar: Bar
    started: float
    told: float
    done: int = 0
    first: int = 0
    ended: float = 0.0


class Progress:
    """Counts things done. With `live` it shows them on stderr; without, it is silent."""

    def __init__(self, live: bool = False):
        self._live = live
        self._count = _Count(0, "images", Bar(0, shown=False), 0.0, 0.0)
        """The count that is going on, or was the last."""

    def phase(self, text: str) -> None:
        """Says what is being done, in a terminal: elsewhere the first line of progress is soon enough."""
        if self._live and stderr().isatty():
            say(f"{text} ...")

    def tell(self, sentence: str) -> None:
        """A line for the user that must not break the bar."""
        if self._live:
            self._count.bar.tell(sentence)

    @contextlib.contextmanager
    def count(self, total: int, unit: str) -> Iterator[None]:
        """Within it, `advance` counts up to `total`.

        A count within a count, such as a test in the midst of a training, is shown alone meanwhile, and its time is
        none of the other's.
        """
        outer, now = self._count, time.monotonic()
        going_on = outer.total > 0 and not outer.ended
        if going_on:
            outer.bar.stop()
        self._count = count = _Count(total, unit, Bar(total, shown=self._live), now, now)
        try:
            with count.bar:
                yield
        finally:
            count.ended = time.monotonic()
            count.bar = Bar(0, shown=False)
            if going_on:
                outer.started += count.ended - now
                outer.told = count.ended
                self._count = outer
                outer.bar.__enter__()

    def advance(self, count: int = 1) -> None:
        """One more is done, or `count` more."""
        counted, now = self._count, time.monotonic()
        if not counted.done:  # the rate leaves out the time that worker processes take to start
            counted.started = counted.told = now
            counted.first = count
        counted.done += count
        pause = _SECONDS_BETWEEN_UPDATES if counted.bar.live else _SECONDS_BETWEEN_LINES
        if not self._live or now < counted.told + pause:
            return
        counted.told = now
        if counted.bar.live:
            counted.bar.update(counted.done, note=self.rate())
        else:
            say(f"{self.so_far()}, {self.rate()}")

    def so_far(self) -> str:
        """How many are done of how many."""
        return f"{self._count.done:,} of {self._count.total:,} {self._count.unit}"

    def rate(self) -> str:
        """Done per second, since the first was; of what takes seconds, how many each takes."""
        counted = self._count
        end = counted.ended or time.monotonic()
        rate = max(counted.done - counted.first, 0) / max(end - counted.started, 1e-9)
        return f"{1 / rate:,.1f} s each" if 0 < rate < 1 else f"{rate:,.0f} {counted.unit}/s"
