"""A rank that says at its very end which threads of gloo's are left.

`python -m tests.programs.gloo_threads RANK PORT KIND FLAGS`: `fastpmae-train` with these flags, or, as KIND "held" or
"error", a program that keeps names of its own for the group, and for "error" ends by one. A thread that has yet to let
go of a tensor while the interpreter ends aborts the process.
"""

import atexit
import os
import sys
from pathlib import Path

names = Path("/proc/self/task").glob("*/comm")  # what is asked last, at the exit, needs no module that may be gone
kept: list[object] = []


def tell() -> None:
    print("threads left:", sum(name.read_text().startswith("pt_gloo_runloop") for name in names))


def held(rank: int, fails: bool) -> int:
    from fastpmae.distributed.ranks import join_ranks
    from fastpmae_loaders.cli.exits import exit_with_sentence
    from fastpmae_loaders.errors import UserError

    def run() -> None:
        with join_ranks("cpu") as ranks:
            assert ranks.max_over_ranks(rank) == (1,)
            kept.extend([ranks, kept])  # a cycle, and a name of the program's own
            if fails:
                raise UserError("no")

    return exit_with_sentence("held", run)


def train(flags: list[str]) -> int:
    from fastpmae.train import main

    sys.argv[1:] = flags
    return main()


if __name__ == "__main__":
    atexit.register(tell)  # before anything is imported that registers an end of its own, so that it comes after that
    rank, port, kind, *flags = sys.argv[1:]
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    sys.exit(held(int(rank), kind == "error") if kind in ("held", "error") else train(flags))
