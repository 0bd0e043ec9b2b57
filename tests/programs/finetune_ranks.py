"""Trains classifiers on forked ranks: `python finetune_ranks.py WEIGHTS IMAGES FOLDER SCENARIOS`.

Prints each scenario's name, and the ends of its ranks.
"""

import dataclasses
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastpmae.distributed.ranks import join_ranks
from fastpmae.evaluate.backbone import find_backbone
from fastpmae.evaluate.datasets import open_labelled
from fastpmae.evaluate.finetune import train_classifier
from fastpmae.evaluate.finetune_state import Setting
from fastpmae.evaluate.recipe import PROBE, FinetuneConfig
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.cli.progress import Progress


def train(weights: str, images: Path, folder: Path, scenario: dict[str, Any]) -> None:
    """One rank's part of a scenario."""
    frozen = scenario.get("frozen", False)
    config = dataclasses.replace(PROBE if frozen else FinetuneConfig(), **scenario["settings"])
    with join_ranks("cpu") as ranks:
        labelled, _ = open_labelled(images, None)
        setting = Setting(
            find_backbone(weights, heads=2), labelled, labelled, folder / scenario["name"], ranks.device, workers=1,
            crop_ratio=1.0, feature_batch=10, frozen=frozen, tensorboard=scenario.get("tensorboard", False),
        )  # fmt: skip
        train_classifier(
            setting,
            config,
            resume=scenario.get("resume", False),
            steps=scenario.get("steps"),
            progress=Progress(live=True),
            ranks=ranks,
        )


def fork_ranks(size: int, name: str, work: Callable[[], None]) -> list[int]:
    """Fork so many ranks, each of which does the work, and return how they ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
                os.environ.update({name: str(value) for name, value in here.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                status = exit_with_sentence(name, work)
            finally:
                sys.stderr.flush()
                os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    """See the module."""
    weights, images, folder, scenarios = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
    for scenario in scenarios:
        ended = fork_ranks(
            scenario["ranks"], "finetune", lambda scenario=scenario: train(weights, images, folder, scenario)
        )
        print(json.dumps([scenario["name"], ended]), flush=True)


if __name__ == "__main__":
    main()
