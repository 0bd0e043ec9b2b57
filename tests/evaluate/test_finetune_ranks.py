"""Fine-tuning and the probe on two ranks are the training of one, up to the order of sums; one rank writes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from tests.made import REPOSITORY
from tests.test_train import environment

SETTINGS = {
    "epochs": 3, "batch_size": 16, "accumulate": 2, "warmup_epochs": 1.0, "blr": 0.02, "model_ema_decay": 0.9,
    "drop_path": 0.3, "reprob": 0.5, "clip_grad": 1.0,
}  # fmt: skip
PROBE = {"epochs": 3, "batch_size": 22, "warmup_epochs": 1.0, "blr": 0.1, "reprob": 0.5}
SCENARIOS: list[dict[str, Any]] = [
    {"name": "one", "ranks": 1, "settings": SETTINGS},
    {"name": "two", "ranks": 2, "settings": SETTINGS, "tensorboard": True},
    {"name": "moves", "ranks": 2, "settings": SETTINGS, "steps": 3},
    {"name": "moves", "ranks": 1, "settings": SETTINGS, "resume": True},
    {"name": "probe-one", "ranks": 1, "frozen": True, "settings": PROBE},
    {"name": "probe-two", "ranks": 2, "frozen": True, "settings": PROBE},
    {"name": "uneven", "ranks": 2, "settings": SETTINGS | {"batch_size": 20, "accumulate": 2}},
]


@pytest.fixture(scope="module")
def trained(small_beton: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of all scenarios, and what they said."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    torch.save(vit.state_dict(), folder / "vit.pth")
    program = REPOSITORY / "tests" / "programs" / "finetune_ranks.py"
    done = subprocess.run(
        [sys.executable, program, folder / "vit.pth", small_beton, folder, json.dumps(SCENARIOS)],
        env={**environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    ended = [json.loads(line)[1] for line in done.stdout.splitlines()]
    assert ended == [[0] * scenario["ranks"] for scenario in SCENARIOS[:-1]] + [[2, 2]], done.stderr
    return folder, done.stderr


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "other"), [("one", "two"), ("one", "moves"), ("probe-one", "probe-two")])
def test_two_ranks_train_what_one_trains(trained: tuple[Path, str], name: str, other: str):
    folder, _ = trained
    alone, together = rows_of(folder / name), rows_of(folder / other)
    assert [row["epoch"] for row in together] == [1, 2, 3]
    for one, two in zip(alone, together, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    ours, theirs = (load_file(folder / each / "classifier.safetensors") for each in (name, other))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        values, others = tensor, theirs[key]
        if key.endswith("qkv.bias"):
            # No loss depends on the keys' bias: its gradient is rounding alone, which AdamW scales up.
            values, others = (each.reshape(3, -1)[[0, 2]] for each in (values, others))
        torch.testing.assert_close(values, others, rtol=1e-4, atol=3e-6, msg=lambda words, key=key: f"{key}: {words}")


@pytest.mark.slow
def test_one_rank_speaks_and_writes(trained: tuple[Path, str]):
    folder, said = trained
    lines = (folder / "two" / "train.log").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert all(said.count(line) >= 1 for line in lines)
    assert said.count("epoch 3/3") == 5  # of as many trainings to the end
    assert len(list((folder / "two").glob("events.out.tfevents.*"))) == 1
    assert not list((folder / "one").glob("events*"))
    sentence = "--batch-size 20 does not share out evenly over 2 ranks x --accumulate 2, in pairs that mixup"
    assert said.count(sentence) == 1
    assert not (folder / "uneven").exists()
