"""How a command ends when something is wrong: one sentence, no traceback."""

from collections.abc import Callable

from fastpmae_loaders.cli.process import last_word, working
from fastpmae_loaders.cli.terminal import reason_lost, say, speaking
from fastpmae_loaders.errors import AlreadySaid, Interrupted, RunError, UserError


def exit_with_sentence(name: str, function: Callable[[], int | None]) -> int:
    """Run a command and return its exit status: 2 for bad input, 1 for a run that failed, 130 after ctrl-C.

    It is 0 only when the work is done and what it prints is where it was sent, as far as anybody still reads it. That
    something cannot be printed is told at the end: no work is broken off for it.
    """
    with working(), speaking() as printed:
        try:
            status = _status_of(name, function)
        except SystemExit as ended:  # of a command line that is wrong, or asks for help
            if ended.code:
                raise
            status = 0
        printed.flush()
        lost = reason_lost(printed)
        if status == 0 and lost is not None:
            say(f"{name}: error: the work is done, but what it prints cannot be written: {lost}")
            return 1
        return status


def _status_of(name: str, function: Callable[[], int | None]) -> int:
    try:
        return function() or 0
    except UserError as error:
        say(f"{name}: error: {error}")
        return 2
    except Interrupted as stopped:
        if stopped.is_main:
            say(f"{name}: {stopped}")
        return 128 + stopped.number
    except AlreadySaid as ended:
        return ended.status
    except RunError as error:
        say(f"{name}: stopped: {error}")
        return 1
    except OSError as error:
        # a disk that fills up, a folder that goes: the sentence is the system's own
        say(f"{name}: stopped: {error}")
        return 1
    except KeyboardInterrupt:
        with last_word() as first:
            if first:
                say(f"{name}: interrupted")
        return 130
