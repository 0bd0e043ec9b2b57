"""Runs on several ranks, forked from one process, since starting torch anew for each would take most of the time.

`python -m tests.programs.forked_ranks CONFIG FOLDER SCENARIOS`. The scenarios are a list in JSON of objects with `name`
(of the run's folder), `ranks`, `settings`, and as wanted `of_first` (settings of the first rank alone),
`rank_1_refuses`, `disk_is_full`, `rank_1_cannot_read` (its shards, once they are written), and `apart`: each rank is on
a machine of its own, where the folder has the same name and lies in `machine-RANK`. For each a line is printed: its
name, and how its ranks have ended.
"""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed.fsdp

import fastpmae.pretraining.collapse
import fastpmae.run.checkpoint
import fastpmae.run.shards
import fastpmae.train
from fastpmae import Config, UserError, pretrain, read_config
from fastpmae.distributed.ranks import Ranks
from fastpmae.pretraining.data import make_loader
from fastpmae.run.images import open_images
from fastpmae_loaders.cli.exits import exit_with_sentence


def refuse(*_: object) -> NoReturn:
    raise UserError("rank 1 does not like its images")


def full(*_: object) -> NoReturn:
    raise OSError(28, os.strerror(28))


def run(config: Config, folder: Path, scenario: dict[str, Any], rank: int, port: int) -> int:
    size = scenario["ranks"]
    if size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if scenario.get("apart"):
        (folder / f"machine-{rank}").mkdir(exist_ok=True)
        os.chdir(folder / f"machine-{rank}")
        os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        folder = Path()
    settings = scenario["settings"] | (scenario.get("of_first", {}) if rank == 0 else {})
    if scenario.get("rank_1_refuses") and rank == 1:
        fastpmae.train.student_loss = refuse
    if scenario.get("rank_1_cannot_read") and rank == 1:
        fastpmae.run.shards._identity = full
    if scenario.get("disk_is_full"):
        fastpmae.run.checkpoint.save_file = full

    def start() -> None:
        pretrain(config.using(out=folder / scenario["name"], **settings))

    return exit_with_sentence("fastpmae-train", start)


def main(config: Config, folder: Path, scenarios: list[dict[str, Any]]) -> None:
    # what the loader compiles is compiled once, for all ranks
    with make_loader(open_images(config), config, Ranks(0, 1, 1, torch.device("cpu"), None)) as loader:
        next(iter(loader))
    for scenario in scenarios:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(scenario["ranks"]):
            children.append(os.fork())
            if children[-1] == 0:
                status = 1
                try:
                    status = run(config, folder, scenario, rank, port)
                finally:
                    sys.stderr.flush()
                    os._exit(status)
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps([scenario["name"], ended]), flush=True)


if __name__ == "__main__":
    main(read_config(Path(sys.argv[1])), Path(sys.argv[2]), json.loads(sys.argv[3]))
