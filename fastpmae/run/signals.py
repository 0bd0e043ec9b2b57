"""Stopping a run in good order: a signal is noted, the step finishes, a checkpoint is written."""

import signal
import threading
from types import FrameType, TracebackType

from fastpmae_loaders.cli.process import is_command


class Stop:
    """Within it, SIGTERM, SIGINT, SIGUSR1 and SIGHUP are noted in `signal`; a second ctrl-C interrupts at once.

    SIGHUP is what a process gets whose terminal is closed. One that was started with nohup does not hear it.
    """

    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self.signal = 0
        self.before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        # Python lets only the main thread set handlers; called from another, the run is simply not watched.
        if threading.current_thread() is threading.main_thread():
            deaf = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            watched = [number for number in self.watched if number != signal.SIGHUP or not deaf]
            self.before = {number: signal.signal(number, self._note) for number in watched}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A command's process has its own way to end at once, whatever it is in the middle of.
        if number == signal.SIGINT and self.signal == signal.SIGINT and not is_command():
            raise KeyboardInterrupt
        self.signal = number
