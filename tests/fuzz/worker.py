"""The process that cases run in: `python -m tests.fuzz.worker KIND SEED STREAM SKIP FOLDER MEMORY`.

It runs one case after another. Before each a line of JSON on standard output says which one it is, and after it what
became of it; whatever the case itself prints goes to `FOLDER/output.txt`. A case that fails is the process's last, and
so is the one after which `GROWN` of its memory is taken: what a case may take is its own.
"""

import faulthandler
import io
import json
import os
import re
import resource
import sys
import traceback
import warnings
from itertools import count, islice
from pathlib import Path
from typing import IO, Any

from fastpmae_loaders.printable import printable
from tests.fuzz.case import Case, stream_of

MEMORY = re.compile(
    r"memory|cannot allocate|bad_alloc|too large to allocate|resource temporarily unavailable", re.IGNORECASE
)
"""The last is what a thread gets that there is no room for."""
CONFINED = "cannot be read: it takes more memory than there is"
"""What is said of a table that asks for more than the process may have that reads it: there nothing was taken."""
GROWN = 2**30
"""Bytes of address space: the heaps of threads that have ended fill it over thousands of cases."""
LONGEST = 4000
"""Characters of a sentence."""


def outcome_of(case: Case, output: IO[bytes]) -> tuple[str, str]:
    """What became of a case: `ok`, `refused`, or how it failed; and in what words.

    `output` reads what this process prints.
    """
    before = output.seek(0, os.SEEK_END)
    try:
        case.run()
        outcome, words = "ok", ""
    except case.allowed as error:
        outcome, words = "refused", str(error)
        if not words.strip() or len(words) > LONGEST or any(printable(line) != line for line in words.splitlines()):
            outcome, words = "unprintable", repr(words[:LONGEST])
        elif MEMORY.search(words.replace(CONFINED, "")):
            outcome = "memory"
    except MemoryError:
        outcome, words = "memory", traceback.format_exc()
    except BaseException as error:
        outcome, words = "traceback", traceback.format_exc()
        if MEMORY.search(str(error)):
            outcome = "memory"
    sys.stdout.flush()
    sys.stderr.flush()
    output.seek(before)
    said = output.read()
    if outcome in ("ok", "refused"):
        if b"Traceback (most recent call last)" in said:
            outcome, words = "traceback", said.decode(errors="replace")
        elif any(byte < 32 and byte not in b"\n\r\t" for byte in said):
            outcome, words = "unprintable", repr(said[-LONGEST:])
    return outcome, words


def address_space() -> int:
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def limit_memory(allowed: int) -> None:
    """Let this process, as it stands, take `allowed` bytes of address space more."""
    most = address_space() + allowed
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """See the module."""
    kind, seed, first, skip, folder, memory = sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5]), int(sys.argv[6])
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    (folder / "output.txt").write_bytes(b"")
    with (folder / "output.txt").open("ab") as printed:
        for standard in (1, 2):
            os.dup2(printed.fileno(), standard)
    output = (folder / "output.txt").open("rb")
    faulthandler.enable()

    def tell(**words: Any) -> None:
        messages.write(json.dumps(words) + "\n")

    begun = 0
    for stream in count(first):
        started = skip if stream == first else 0
        for position, case in enumerate(stream_of(kind, seed, stream, folder)):
            if position < started:
                continue
            if not begun:  # after the imports and sound files of the first case
                begun = address_space()
                limit_memory(memory)
            tell(stream=stream, position=position, name=case.name, files=[str(path) for path in case.files])
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a warning is more than one sentence
                outcome, words = outcome_of(case, output)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            last = outcome not in ("ok", "refused") or address_space() - begun > GROWN
            tell(outcome=outcome, words=words, peak=peak, last=last)
            if last:
                return


def replay(kind: str, seed: int, stream: int, position: int, folder: Path) -> tuple[str, str]:
    """Run one case in this process; returns what became of it, and in what words."""
    case = next(islice(stream_of(kind, seed, stream, folder), position, None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return outcome_of(case, io.BytesIO())


if __name__ == "__main__":
    main()
