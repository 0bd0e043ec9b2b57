"""Segmentation and detection on two ranks are the training of one, up to the order of sums; one rank writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastpmae.distributed.batch_norm import over_ranks
from tests.made import REPOSITORY
from tests.test_train import environment

pytest.importorskip("segmentation_models_pytorch", reason="pip install 'fastpmae[dense]'")

KINDS = {"segment": "segmenter.safetensors", "detect": "detector.safetensors"}
SCENARIOS: list[dict[str, Any]] = [
    scenario | {"name": f"{kind}-{scenario['name']}", "kind": kind}
    for kind in KINDS
    for scenario in (
        {"name": "one", "ranks": 1},
        {"name": "two", "ranks": 2},
        # two micro-batches are normalised each on its own: one rank computes what two do
        {"name": "moves", "ranks": 2, "steps": 3},
        {"name": "moves", "ranks": 1, "resume": True},
    )
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of all scenarios, and what they said."""
    folder = tmp_path_factory.mktemp("dense-ranks")
    paths = [str(REPOSITORY), *filter(None, [environment().get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, REPOSITORY / "tests" / "programs" / "dense_ranks.py", folder, json.dumps(SCENARIOS)],
        env={**environment(), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    ended = [json.loads(line)[1] for line in done.stdout.splitlines()]
    assert ended == [[0] * scenario["ranks"] for scenario in SCENARIOS], done.stderr
    return folder, done.stderr


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", ["two", "moves"])
def test_two_ranks_train_what_one_trains(trained: tuple[Path, str], kind: str, other: str):
    folder, said = trained
    alone, together = rows_of(folder / f"{kind}-one"), rows_of(folder / f"{kind}-{other}")
    assert len(alone) >= 3
    for one, two in zip(alone, together, strict=True):
        assert one == pytest.approx(two, rel=2e-4), said
    ours, theirs = (load_file(folder / f"{kind}-{each}" / KINDS[kind]) for each in ("one", other))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        if key.endswith("qkv.bias") or ("feature_norms" in key and key.endswith("bias")) or "running_mean" in key:
            # No loss depends on the keys' bias, and BatchNorm takes away what a norm before it adds: such a gradient is
            # rounding alone, which AdamW scales up, and the means that the BatchNorm keeps move with it. What both make
            # of a test image stands in the rows.
            continue
        torch.testing.assert_close(
            tensor, theirs[key], rtol=1e-3, atol=2e-4, msg=lambda words, key=key: f"{key}: {words}"
        )


def test_one_rank_keeps_torchs_norm():
    norm = nn.BatchNorm2d(4)
    over_ranks(nn.Sequential(nn.Conv2d(3, 4, 1), norm), None, torch.device("cpu"))
    assert type(norm) is nn.BatchNorm2d
