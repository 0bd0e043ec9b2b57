"""A run that is killed a dozen times, anywhere in its start, in a step and in the writing of a checkpoint, and goes on.

`python -m tests.programs.killed_often OUT CONFIG ERROR` prints how many kills left a checkpoint half written; why a run
ended by itself would stand in the file ERROR. Each run is forked from one process that has imported everything.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fastpmae.pretraining.collapse  # noqa: F401 - imported by a run when it needs it, here once for all
from fastpmae import Config, pretrain, read_config

TURNS = 12


def forked(config: Config, error: Path) -> int:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            pretrain(config)
        except BaseException as reason:
            error.write_text(repr(reason))
        os._exit(1)
    return child


def wait_until(happened: Callable[[], bool], child: int, error: Path) -> None:
    limit = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < limit
        time.sleep(2e-4)  # a checkpoint takes longer, and the run needs the core
        if os.waitpid(child, os.WNOHANG)[0]:
            sys.exit("the run ended by itself: " + (error.read_text() if error.exists() else "done"))


def main(out: Path, config: Config, error: Path) -> None:
    moments, torn = random.Random(7), 0

    def checkpoints() -> list[Path]:
        return sorted(out.glob("checkpoints/step-*"))

    def half_written() -> bool:
        return any(out.glob("checkpoints/.partial-*"))

    for turn in range(TURNS):
        child = forked(config.using(out=out, resume="auto", steps=None, save_steps=5), error)
        before = checkpoints()
        if turn % 4 == 0:  # anywhere in its start
            time.sleep(moments.uniform(0, 0.6))
        else:
            wait_until(lambda before=before: checkpoints() != before, child, error)
            if turn % 4 == 1:  # anywhere in a step
                time.sleep(moments.uniform(0, 0.1))
            else:
                wait_until(half_written, child, error)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torn += half_written()
    print(torn)


if __name__ == "__main__":
    main(Path(sys.argv[1]), read_config(Path(sys.argv[2])), Path(sys.argv[3]))
