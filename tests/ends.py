"""Ends of ranks, counted: `python -m tests.ends`.

A rank that aborts after its work was done is a failed job to torchrun. Two programs are ended again and again, on two
and on three ranks: one that only calls the kernels, and `fastpmae-train`. Every rank is a process forked from one with
torch, and ends as an interpreter does: with its exit functions, its modules and its threads.
"""

import argparse
import collections
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

import fastpmae.pretraining.collapse  # noqa: F401  (imported by a run only when it needs it; here once for all)
from fastpmae.distributed.ranks import join_ranks
from fastpmae.train import main as train
from fastpmae_kernels import sinkhorn_bias
from fastpmae_loaders.write.write import write_beton
from tests.made import tiny_settings, write_tree
from tests.test_train import flags_of


def kernels(folder: Path, number: int) -> int:
    """Labels over all ranks in messages of gloo's, the last of them just before the end."""
    with join_ranks("cpu") as ranks:
        generator = torch.Generator().manual_seed(ranks.rank)
        for _ in range(5):
            sinkhorn_bias(torch.rand(20, 30, generator=generator), group=ranks.group)
        # The program's own variable, which lives as long as the interpreter.
        globals()["group"] = dist.group.WORLD if number % 2 else None
    return 0


def training(folder: Path, number: int) -> int:
    """Two steps of a tiny run."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    config = tiny_settings(folder / "small.beton").using(steps=2, batch_size=6, out=folder / f"run-{number}")
    sys.argv = ["fastpmae-train", *flags_of(config)]
    return train()


PROGRAMS: tuple[Callable[[Path, int], int], ...] = (kernels, training)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ends", description="Ends of ranks, counted.")
    parser.add_argument("--ends", type=int, default=300, help="of each program, on two and three ranks (300)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="fastpmae-ends-"))
    write_beton(write_tree(folder / "tree", 44), folder / "small.beton")
    failed = 0
    for program in PROGRAMS:
        seen: collections.Counter[tuple[int, int]] = collections.Counter()
        number = 0
        while seen.total() < options.ends:
            size, number = 2 + number % 2, number + 1
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            processes = []
            for rank in range(size):
                sys.stdout.flush()
                process = os.fork()
                if process == 0:
                    os.environ.update(
                        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
                        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                    )  # fmt: skip
                    # Back to where the interpreter ends, past nothing that would clean up after the parent.
                    return program(folder, number)
                processes.append(process)
            seen.update((size, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])) for process in processes)
            shutil.rmtree(folder / f"run-{number}", ignore_errors=True)
        for (size, status), count in sorted(seen.items()):
            print(f"{program.__name__}, {size} ranks: {count} ended with status {status}")
            failed += count * (status != 0)
    print(f"{failed} ends failed, {time.monotonic() - began:.0f} s")
    shutil.rmtree(folder)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
