"""What a kind of input is to the fuzzer: a generator of cases, each of which either works or is refused in a sentence.

A module `tests.fuzz.KIND` has one function

    def cases(rng: np.random.Generator, folder: Path) -> Iterator[Case]

which makes hostile input in `folder` and yields a case for each, without end or until it has no more. All that is drawn
is drawn from `rng` and nothing from what an earlier case did, so that the same seed makes the same case again although
those before it do not run. Sound files that cases start from may stay in `folder`, which is the same for all streams
of a process; they are made without `rng`.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from fastpmae_loaders.errors import RunError, UserError

KINDS = ("beton", "sets", "tables", "weights", "checkpoints", "shards", "decoder")
ENVIRONMENT = {"decoder": {"NUMBA_BOUNDSCHECK": "1"}}
"""What a kind's worker has in its environment beside ours; what numba compiles for it is then kept apart."""
STREAM = 50
"""Cases of one generator: a later one takes its place, so that any case is found again soon."""


@dataclass(frozen=True)
class Case:
    """One hostile input and what is done with it.

    Attributes:
        name: what was done to the input, in a few words.
        run: called in the worker process; returns, or raises one of `allowed`.
        files: the input, kept where the case fails.
        allowed: errors that are sentences; a public function that documents others adds them.
    """

    name: str
    run: Callable[[], object]
    files: tuple[Path, ...] = ()
    allowed: tuple[type[Exception], ...] = (UserError, RunError)


def stream_of(kind: str, seed: int, stream: int, folder: Path) -> Iterator[Case]:
    """The cases of one stream of a kind."""
    module = importlib.import_module(f"tests.fuzz.{kind}")
    return islice(module.cases(np.random.default_rng([seed, stream]), folder), STREAM)
