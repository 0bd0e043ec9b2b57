"""Errors that carry a sentence for the user instead of a traceback."""

import signal

from fastpmae_loaders.printable import printable_lines


class UserError(Exception):
    """What is wrong, where (file, sample index, flag), and what to do about it.

    Its words may hold names out of strangers' files; as text they are what any terminal takes.
    """

    def __str__(self) -> str:
        return printable_lines(super().__str__())


class BetonError(UserError):
    """A .beton file that cannot be used as it is."""


class RunError(Exception):
    """A run that had to stop though nothing in its input was wrong (a loss that is not finite, say)."""


class Interrupted(RunError):
    """A run that a signal ended, after its checkpoint was written."""

    is_main = True
    """Whether this is the main rank, which says so for all."""

    def __init__(self, number: int, step: int, last_step: int, folder: object):
        super().__init__(
            f"{signal.Signals(number).name} after step {step} of {last_step}: the checkpoint is written; "
            f"continue with --resume --out {folder}"
        )
        self.number = number


class AlreadySaid(RunError):
    """The end of a rank after another has said why the run ends; `status` is the exit status that goes with it."""

    def __init__(self, status: int):
        super().__init__("another rank has said why this run ends")
        self.status = status
