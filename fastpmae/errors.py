"""How a command ends when something is wrong: one sentence, no traceback."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from fastpmae_loaders.errors import BetonError, UserError
from fastpmae_loaders.printable import printable

__all__ = ["AlreadySaid", "BetonError", "Interrupted", "RunError", "UserError", "exit_with_sentence"]


class RunError(Exception):
    """A run that had to stop though nothing in its input was wrong (a loss that is not finite, say)."""


class Interrupted(RunError):
    """A run that a signal ended, after its checkpoint was written."""

    def __init__(self, number: int, step: int, last_step: int, folder: Path):
        super().__init__(
            f"{signal.Signals(number).name} after step {step} of {last_step}: the checkpoint is written; "
            f"go on with --resume --out {folder}"
        )
        self.number = number


class AlreadySaid(RunError):
    """The end of a rank after another has said why the run ends; `status` is the exit status that goes with it."""

    def __init__(self, status: int):
        super().__init__("another rank has said why this run ends")
        self.status = status


def shown(error: Exception) -> str:
    """An error's words for a terminal: whatever names from strangers' files are in them, they only are read there."""
    return "\n".join(printable(line) for line in str(error).split("\n"))


def exit_with_sentence(name: str, function: Callable[[], int | None]) -> int:
    """Run a command and return its exit status: 2 for bad input, 1 for a run that failed, 130 after ctrl-C."""
    try:
        return function() or 0
    except UserError as error:
        print(f"{name}: error: {shown(error)}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(f"{name}: {shown(stopped)}", file=sys.stderr)
        return 128 + stopped.number
    except AlreadySaid as ended:
        return ended.status
    except RunError as error:
        print(f"{name}: stopped: {shown(error)}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # whoever read our output (head, less) has seen enough; what is left in the buffer must go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # a disk that fills up, a folder that goes: the sentence is the system's own
        print(f"{name}: stopped: {shown(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
