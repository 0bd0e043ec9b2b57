"""Cases whose end is known: what the fuzzer itself is tried on."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastpmae_loaders.errors import RunError, UserError
from tests.fuzz.case import Case


def cases(rng: np.random.Generator, folder: Path) -> Iterator[Case]:
    """One of each end, with sound ones before, between and after them."""
    number = int(rng.integers(2**31))

    def sound() -> None:
        print("all is well")

    def refuses() -> None:
        raise UserError("the file is no file: name another")

    def crashes() -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def hangs() -> None:
        time.sleep(3600)

    def raises() -> None:
        raise KeyError("a key")

    def escapes() -> None:
        raise RunError("no tensor \x1b[31mred")  # a UserError's words are printable by themselves

    def prints() -> None:
        print("a class called \x1b]0;name\x07")

    def takes() -> None:
        bytearray(1 << 40)

    def warns() -> None:
        import warnings

        warnings.warn("odd", stacklevel=1)

    def documented() -> None:
        raise ValueError("the shape is odd")

    for run in (sound, refuses, crashes, sound, hangs, raises, escapes, prints, takes, warns):
        path = folder / f"{run.__name__}.txt"
        path.write_text(str(number))
        yield Case(run.__name__, run, (path,))
    yield Case("documented", documented, (), (UserError, ValueError))
    yield Case("sound", sound)
