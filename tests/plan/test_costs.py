import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpmae import PRESETS
from fastpmae.plan.costs import flops_of_an_image, step_costs
from fastpmae.plan.shape_tensor import Counting
from tests.made import REPOSITORY
from tests.tiny import tiny_config


@pytest.mark.slow
def test_memory_is_counted_from_first_to_last_use():
    with Counting() as counting:
        counting.part, counting.kind = "one", "a"
        first = torch.zeros(1000)
        counting.part, counting.kind = "two", "b"
        view = first[10:].view(10, 99)
        second = torch.ones(500, dtype=torch.float64) * 2
        del first
        gc.collect()
        third = torch.empty(100)
        assert view.shape == (10, 99)
        del view, second, third
    kinds, moment = counting.peak()
    # ones and their double at once, beside the zeros that a view still holds
    assert kinds == {"a": 4000, "b": 8000}
    assert moment == "two"
    assert sum(nbytes for _, nbytes, _ in counting.events) == 0


def test_autograd_autocast_and_products():
    weight = None
    with Counting() as counting:
        weight = torch.nn.Parameter(torch.empty(30, 20))
        rows = torch.empty(7, 20)
        with torch.autocast("cpu", torch.bfloat16):
            product = torch.nn.functional.linear(rows, weight)
        assert product.dtype == torch.bfloat16
        counting.part = "backward"
        product.float().sum().backward()
        assert weight.grad is not None
        assert (weight.grad.shape, weight.grad.dtype) == ((30, 20), torch.float32)
    assert dict(counting.flops) == {"": 2 * 7 * 20 * 30, "backward": 2 * 7 * 20 * 30}


def blocks_flops(rows: int, tokens: int, width: int, depth: int, ratio: int = 4) -> int:
    """Products of `rows` sequences through so many transformer blocks, written down by hand."""
    linear = 2 * rows * tokens * width * width * (3 + 1 + 2 * ratio)
    attention = 2 * 2 * rows * tokens * tokens * width
    return depth * (linear + attention)


@pytest.mark.slow
def test_flops_of_the_forward_pass_are_those_of_the_paper():
    config = PRESETS["paper"].using(model="vit_small")
    images, width, prototypes = 4, 384, 4096
    costs = step_costs(config, images)
    masked, visible, pixels = 147, 49, 3 * 16 * 16
    teacher = 2 * images * masked * pixels * width + blocks_flops(3 * images, 50, width, 12)
    rows = {"head": images * (masked + 1), "labelling teacher's head": images * (masked + 3)}
    head = 2 * (width * 2048 + 2048 * 2048 + 2048 * 256 + 256 * prototypes)
    decoder = blocks_flops(images, 197, 512, 8) + 2 * images * (50 * width * 512 + (masked + 1) * 512 * width)
    # In the last block visible patches are only looked at: no query, no projection and no MLP of theirs.
    decoder -= images * visible * (2 * 512 * 512 * (1 + 2 * 4) + 2 * 2 * 197 * 512)
    assert costs.forward == {
        "reconstruction teacher's encoder": teacher,
        "labelling teacher's encoder": teacher,
        "student's encoder": 2 * images * visible * pixels * width + blocks_flops(images, 50, width, 12),
        "decoder": decoder,
        "losses": 2 * images * masked * masked * width,
        **{part: count * head for part, count in rows.items()},
    }
    # attention's backward pass computes its scores anew: five products for two
    assert 2 * costs.forward["decoder"] < costs.backward["decoder"] < 2.1 * costs.forward["decoder"]
    assert set(costs.backward) == {"head", "decoder", "student's encoder"}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"preset": "mae"}, {"preset": "sdae"}, {}, {"prototypes_chunk": 4}], ids=str)
def test_flops_grow_evenly_with_batch_and_blocks(settings: dict[str, Any]):
    settings = {"depth": 3, "decoder_depth": 2, **settings}
    config = tiny_config(settings.pop("preset", "paper"), **settings)
    few, many = step_costs(config, 2), step_costs(config, 6)
    assert many.flops == 3 * few.flops
    assert flops_of_an_image(config) == few.flops / 2
    assert few.peak < many.peak < 3 * few.peak


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["mae", "paper"])
def test_counts_do_not_depend_on_what_was_counted_before(preset: str):
    Counting._known.clear()
    first, second = (step_costs(tiny_config(preset), 8) for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_what_methods_cost():
    costs = {name: step_costs(tiny_config(name), 8) for name in ("mae", "sdae", "single-step", "paper")}
    assert costs["mae"].flops < costs["sdae"].flops < costs["paper"].flops
    assert costs["single-step"].flops == costs["paper"].flops
    assert "teachers" not in costs["mae"].memory
    assert costs["sdae"].memory.get("logits", 0) == 0 < costs["paper"].memory["logits"]
    assert costs["single-step"].memory["teachers"] < costs["paper"].memory["teachers"]
    assert costs["mae"].memory["images"] < costs["paper"].memory["images"]


@pytest.mark.slow
def test_what_is_held_between_parts_and_for_other_ranks():
    alone, ranks = (step_costs(tiny_config(), 8, ranks=ranks) for ranks in (1, 2))
    assert alone.memory.get("gradients", 0) < 4 * alone.trained
    assert ranks.memory["gradients"] == 4 * alone.trained
    parts = step_costs(tiny_config(accumulate=4), 32)
    assert parts.flops == 4 * alone.flops
    assert parts.peak == ranks.peak


@pytest.mark.slow
def test_labels_balanced_over_the_step_hold_the_targets_of_all_parts():
    config = tiny_config(prototypes=512)
    part, step, whole = (
        step_costs(config.using(accumulate=parts, sinkhorn_over=over), 64)
        for parts, over in ((4, "micro-batch"), (4, "step"), (1, "step"))
    )
    assert part.peak < step.peak < whole.peak
    # class and patch logits of three parts in fp32 or fp16, and the tokens
    rows = 48 * (3 + 12)
    assert step.memory["logits"] - part.memory["logits"] > rows * 512 * 2


@pytest.mark.slow
def test_shards_divide_what_is_always_held():
    config = tiny_config(precision="fp32", shard=True)
    whole, shards = (step_costs(config.using(shard=shard), 8, ranks=4) for shard in (False, True))
    for kind, count in (("weights", whole.trained), ("gradients", whole.trained), ("optimizer", 2 * whole.trained)):
        assert whole.memory[kind] - shards.memory[kind] == pytest.approx(3 * count, abs=4), kind
    assert shards.memory["teachers"] < 0.3 * whole.memory["teachers"]
    assert shards.memory["activations"] == whole.memory["activations"]
    assert 0 < shards.memory["gathered"] < 4 * 4 * whole.trained
    # alone there is nothing to share
    assert step_costs(config, 8) == step_costs(config.using(shard=False), 8)


@pytest.mark.slow
def test_chunks_of_logits_hold_less():
    config = tiny_config(prototypes=512)
    whole, chunks = (step_costs(config.using(prototypes_chunk=chunk), 64) for chunk in (0, 16))
    # the logits of class tokens stay whole
    assert chunks.memory.get("logits", 0) < 0.6 * whole.memory["logits"]
    assert chunks.peak < whole.peak


@pytest.mark.slow
def test_precision_follows_the_target():
    config = tiny_config(prototypes=512)
    on_gpu, on_cpu = (step_costs(config, 64, target=target) for target in ("cuda", "cpu"))
    assert on_cpu.memory["logits"] == pytest.approx(2 * on_gpu.memory["logits"], rel=0.1)
    low = step_costs(config.using(precision="bf16"), 64, target="cpu")
    assert low.memory["logits"] == on_gpu.memory["logits"]


SMALLER = {"decoder_depth": 2, "depth": 4, "decoder_width": 256, "decoder_heads": 8}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells a peak since a moment")
@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("paper", {"model": "vit_tiny", "batch_size": 12, **SMALLER}),
        ("paper", {"model": "vit_small", "batch_size": 6, **SMALLER}),
        (
            "paper",
            {
                "model": "vit_tiny",
                "batch_size": 12,
                "prototypes_chunk": 256,
                "folds": 5,
                "activation_checkpointing": 2,
                **SMALLER,
            },
        ),
        ("sdae", {"model": "vit_tiny", "batch_size": 16, **SMALLER}),
        ("mae", {"model": "vit_small", "batch_size": 8, **SMALLER}),
        ("single-step", {"model": "vit_base", "batch_size": 2, **SMALLER}),
        ("demo", {"batch_size": 96}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_memory_is_what_a_step_on_the_cpu_holds(preset: str, settings: dict[str, Any]):
    paths = os.pathsep.join(str(REPOSITORY / part) for part in (".", "kernels", "loaders"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.measured_step", json.dumps([preset, settings])],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    costs = step_costs(PRESETS[preset].using(**settings), settings["batch_size"], target="cpu")
    print(preset, settings, costs.peak, measured)
    assert costs.peak == pytest.approx(measured["allocated"], rel=0.1)
    assert costs.peak == pytest.approx(measured["resident"], rel=0.1)
