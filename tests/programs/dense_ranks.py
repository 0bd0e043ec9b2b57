"""Trains segmenters and detectors on forked ranks: `python dense_ranks.py FOLDER SCENARIOS`.

Prints each scenario's name, and the ends of its ranks.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from fastpmae.distributed.ranks import join_ranks
from fastpmae.evaluate.dense.training import Setting
from fastpmae_loaders.cli.progress import Progress
from tests.evaluate.dense import made, small
from tests.programs.finetune_ranks import fork_ranks


def train(folder: Path, scenario: dict[str, Any]) -> None:
    """One rank's part of a scenario."""
    how: dict[str, Any] = {"resume": scenario.get("resume", False), "steps": scenario.get("steps")}
    with join_ranks("cpu") as ranks:
        setting = Setting(folder / scenario["name"], ranks.device, workers=1)
        backbone = made.start(folder / f"rank-{ranks.rank}")
        if scenario["kind"] == "segment":
            from fastpmae.evaluate.dense.segment import train_segmenter

            config = dataclasses.replace(small.SEGMENT, **scenario.get("settings", {}))
            images = made.segmentation(), made.segmentation(3, first=20)
            train_segmenter(*images, backbone, config, setting, ranks, progress=Progress(live=True), **how)
        else:
            from fastpmae.evaluate.dense.detect import train_detector

            config = dataclasses.replace(small.DETECT, **scenario.get("settings", {}))
            images = made.detection(outlines=True), made.detection(3, first=20, outlines=True)
            train_detector(*images, backbone, config, setting, ranks, progress=Progress(live=True), **how)


def main() -> None:
    """See the module."""
    folder, scenarios = Path(sys.argv[1]), json.loads(sys.argv[2])
    for rank in range(2):
        (folder / f"rank-{rank}").mkdir()
    for scenario in scenarios:
        ended = fork_ranks(scenario["ranks"], "dense", lambda scenario=scenario: train(folder, scenario))
        print(json.dumps([scenario["name"], ended]), flush=True)


if __name__ == "__main__":
    main()
