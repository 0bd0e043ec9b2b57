"""Plans of dense tasks: FLOPs and parameters are those of the real networks, memory and hours follow from them."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastpmae import UserError

pytest.importorskip("segmentation_models_pytorch", reason="pip install 'fastpmae[dense]'")

from fastpmae.evaluate.dense.recipe import DETECT_PRESETS, SEGMENT_PRESETS
from fastpmae.plan.dense import _read as read
from fastpmae.plan.dense import detect_costs, make_plan, run, segment_costs


@pytest.mark.slow
def test_a_segmentation_is_table_4s_network():
    config = dataclasses.replace(SEGMENT_PRESETS["paper"], relative_positions=True)
    costs = segment_costs("vit_base", config, 2, 150)
    assert round(sum(costs.parameters.values()) / 1e6, 1) == 163.9
    assert round(sum(costs.forward.values()) / 2 / 2 / 1e9, 1) == 606.8
    # each product of the forward pass has two in the backward pass, but for the image's own gradient
    assert costs.backward == pytest.approx(2 * sum(costs.forward.values()), rel=0.01)
    trained = 163.9e6 * 4
    # and the table of relative places, which the attention of each block keeps
    assert trained + 12 * 1025**2 * 8 < costs.memory["weights"] < 1.2 * trained
    assert costs.memory["optimizer"] == pytest.approx(2 * trained, rel=0.01)


@pytest.mark.slow
def test_a_detection_grows_with_its_boxes_and_masks():
    config = DETECT_PRESETS["paper"]
    small = dataclasses.replace(config, short_sides=(96, 128), long_side=192)
    one, two = (detect_costs("vit_tiny", small, count, 80) for count in (1, 2))
    assert two.flops == pytest.approx(2 * one.flops, rel=0.01)
    assert (one.height, one.width) == (128, 192)
    without = detect_costs("vit_tiny", small, 1, 80, masks=False)
    assert "masks" not in without.forward
    assert without.flops < one.flops
    assert without.peak < one.peak


@pytest.mark.slow
def test_one_image_a_gpu_is_normalised_over_the_gpus():
    """As SyncBatchNorm does it: each image costs the same, however many a GPU has."""
    config = dataclasses.replace(SEGMENT_PRESETS["paper"], crop_size=256, batch_size=4)
    one, two, three = (segment_costs("vit_tiny", config, count, 150) for count in (1, 2, 3))
    assert two.flops == 2 * one.flops
    assert three.peak - two.peak == pytest.approx(two.peak - one.peak, rel=0.1)
    words = ["segment", "--model", "vit_tiny", "--crop-size", "64", "--batch-size", "4", "--gpus", "4"]
    assert make_plan(read(words)).costs.images == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["segment", "detect"])
def test_gradients_wait_for_other_micro_batches_and_gpus(kind: str):
    small = ["--crop-size", "64", "--batch-size", "8", "--model", "vit_tiny"]
    alone, gpus, parts = (
        make_plan(read([kind, *small, *more])).costs
        for more in (["--batch-size", "2"], ["--gpus", "4"], ["--accumulate", "4"])
    )
    assert alone.images == gpus.images == parts.images == 2
    assert gpus.memory == parts.memory
    assert gpus.flops == parts.flops == alone.flops
    gradients = 4 * sum(alone.parameters.values())
    assert gpus.peak - alone.peak == pytest.approx(gradients, rel=0.01)


@pytest.mark.slow
def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = io.StringIO()
    words = ["segment", "--model", "vit_tiny", "--crop-size", "64", "--batch-size", "8", "--gpu", "a100-80"]
    run([*words, "--json", str(tmp_path / "plan.json")], Console(file=out, width=110))
    assert "segment, vit_tiny: 160,000 steps of 8 images of up to 64 x 64 pixels on 1 x A100" in out.getvalue()
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["steps"] == 160_000
    assert record["hours"] == pytest.approx(record["seconds"] * 160_000 / 3600)
    assert record["seconds"] == pytest.approx(record["flops"] / (312e12 * 0.35))
    assert record["largest_batch"] > 100
    assert torch.cuda.is_available() or record["peak"] > 0


@pytest.mark.parametrize(
    ("kind", "preset"),
    [*(("segment", preset) for preset in SEGMENT_PRESETS), *(("detect", preset) for preset in DETECT_PRESETS)],
)
def test_every_preset_has_a_plan(kind: str, preset: str):
    presets = SEGMENT_PRESETS if kind == "segment" else DETECT_PRESETS
    assert read([kind, "--preset", preset]).config == presets[preset]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["segment", "--model", "vit_odd"], "--model vit_odd: there is no such model"),
        (
            ["segment", "--preset", "vitdet"],
            "--preset vitdet: there is no such preset; choose one of paper, mae",
        ),
        (["detect", "--preset", "mae"], "--preset mae: there is no such preset; choose one of paper, vitdet"),
        (["detect", "--gpus", "5"], "--batch-size 32 does not share out over 5 GPUs"),
        (["segment", "--batch-size", "4", "--accumulate", "4"], "computes one image at a time, and UPerNet normalises"),
        (["segment", "--classes", "0"], "--classes 0: at least 1"),
        (["segment", "--gpu", "abacus"], "--gpu abacus: nothing is known of it"),
    ],
)
def test_what_makes_no_plan_is_a_sentence(words: list[str], sentence: str):
    with pytest.raises(UserError, match=sentence):
        make_plan(read(words))
