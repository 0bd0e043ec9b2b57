"""Blocks that are computed anew in the backward pass: the same bits, and less kept."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpmae.plan.costs import step_costs
from fastpmae.pretraining.networks import make_networks
from fastpmae.pretraining.step import compute_targets, student_loss
from tests.tiny import disturb, drop_path_scale_of, made_batch, tiny_config

SIZES: dict[str, Any] = {"depth": 3, "decoder_depth": 2, "folds": 3}


def stepped(every: int, preset: str, bf16: bool) -> tuple[list[Tensor], dict[str, Tensor | None], int]:
    """Losses, gradients, and bytes that autograd keeps for the backward pass, in fp32 or under autocast."""
    config = tiny_config(preset, activation_checkpointing=every, **SIZES)
    student, teachers = make_networks(config, 10, torch.device("cpu"), None)
    disturb(student, 1)
    batch, drop_path_scale = made_batch(1, 2, (5, 4, 4)), None
    if config.network.drop_path:
        drop_path_scale = drop_path_scale_of(config, len(batch)).float()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        targets = compute_targets(teachers, batch, config)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = student_loss(student, batch, drop_path_scale, targets, config)
    losses.total.backward()
    return (
        list(losses[:4]),
        {name: parameter.grad for name, parameter in student.named_parameters()},
        sum(kept.values()),
    )


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("preset", ["paper", "mae"])
def test_the_same_bits_and_less_kept(preset: str, bf16: bool):
    losses, gradients, kept = stepped(0, preset, bf16)
    sizes = []
    for every in (2, 1):
        found, same, less = stepped(every, preset, bf16)
        assert all(torch.equal(a, b) for a, b in zip(found, losses, strict=True))
        assert same.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (gradient is None) == (same[name] is None)
            assert gradient is None or torch.equal(gradient, same[name]), name  # pyright: ignore
        sizes.append(less)
    assert sizes[1] < sizes[0] < kept


def test_teachers_and_frozen_encoders_are_left_alone():
    config = tiny_config(activation_checkpointing=1)
    student, _ = make_networks(config, 10, torch.device("cpu"), None)
    batch = made_batch()
    calls = []
    student.encoder.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        student(batch.simple, batch.visible, batch.folds)
    assert len(calls) == 1
    student(batch.simple, batch.visible, batch.folds)[0].sum().backward()
    # once forward and once more in the backward pass
    assert len(calls) == 3


@pytest.mark.slow
def test_the_plan_knows():
    """More products in the backward pass, by the blocks' own forward ones, and a lower peak."""
    sizes: dict[str, Any] = {"depth": 6, "width": 64}
    config = tiny_config(**SIZES | sizes)
    whole, half, every = (step_costs(config.using(activation_checkpointing=n), 64) for n in (0, 2, 1))
    assert whole.forward == half.forward == every.forward
    assert every.peak < half.peak < whole.peak
    assert whole.flops < half.flops < every.flops
    for part in ("student's encoder", "decoder"):
        anew = every.backward[part] - whole.backward[part]
        assert 0.7 * whole.forward[part] < anew <= whole.forward[part]
    assert every.backward["head"] == whole.backward["head"]
