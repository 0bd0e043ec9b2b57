"""A command that ends by no single ctrl-C: `fastpmae-made BEGUN HOW`.

A copy under that name is one of our commands, since what a process is called is read at the first import. It makes
the file BEGUN, and is then "compiled" code for ever, "sleeping", or once interrupted "ending" for ever.
"""

import ctypes
import sys
import time
from pathlib import Path

import fastpmae  # noqa: F401
from fastpmae_loaders.cli.exits import exit_with_sentence


def command() -> None:
    Path(sys.argv[1]).touch()
    if sys.argv[2] == "compiled":
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):  # for ever: no bytecode runs here, so Python's handler does not
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    try:
        time.sleep(600)
    finally:
        if sys.argv[2] == "ending":
            time.sleep(600)


if __name__ == "__main__":
    sys.exit(exit_with_sentence("fastpmae-made", command))
