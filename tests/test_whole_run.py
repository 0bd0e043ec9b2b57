"""A real run, read back from the checkpoint of every step: the teachers, the schedule and AdamW by the reference."""

import json
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from fastpmae import Config, pretrain
from fastpmae.distributed.ranks import Ranks
from fastpmae.pretraining.data import make_loader, stochastic_depth
from fastpmae.run.checkpoint import checkpoint_path, read_checkpoint
from fastpmae.run.images import open_images
from tests import reference

EPOCHS, PER_EPOCH = 3, 5
STEPS = EPOCHS * PER_EPOCH


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dual", "single-epoch", "random"])
def test_every_step_of_a_run(method: str, tiny: Config) -> None:
    settings = {
        "dual": {},
        "single-epoch": {
            "teachers": "single",
            "labelling_cadence": "epoch",
            "labelling_momentum": (0.5, 0.9),
        },
        "random": {"teacher_init": "random", "reconstruction_cadence": "step", "reconstruction_momentum": (0.5, 0.9)},
    }[method]
    config = tiny.using(save_steps=1, keep=100, warmup_epochs=1.0, blr=0.01, weight_decay=0.5, **settings)
    folder = pretrain(config)
    states = {step: read_checkpoint(checkpoint_path(folder, step)).tensors for step in range(1, STEPS + 1)}
    rows = {row["step"]: row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    for step in range(2, STEPS + 1):
        before, after, row = states[step - 1], states[step], rows[step]
        epoch = (step - 1) // PER_EPOCH
        rate = reference.learning_rate(0.01 * 8 / 256, (step - 1) / PER_EPOCH, 1.0, EPOCHS)
        assert row["lr"] == pytest.approx(rate, rel=1e-9)
        parts = sum(row[name] for name in ("loss_m", "loss_c", "loss_p"))
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
        check_adamw(before, after, step, rate)

        follows = {"labelling": ("step", (0.996, 1.0)), "reconstruction": ("epoch", (0.96, 0.99))}
        if method == "single-epoch":
            follows = {"labelling": ("epoch", (0.5, 0.9))}
        if method == "random":
            follows["reconstruction"] = ("step", (0.5, 0.9))
        for role, (cadence, ends) in follows.items():
            t, total = (step - 1, STEPS) if cadence == "step" else (epoch, EPOCHS)
            momentum = reference.momentum(*ends, t, total)
            assert row[f"{role}_momentum"] == pytest.approx(momentum, abs=1e-12)
            if cadence == "epoch" and step % PER_EPOCH:
                momentum = 1.0
            check_following(before, after, f"{role}_teacher.", momentum)
        if method == "single-epoch":
            assert not any(name.startswith("reconstruction_teacher.") for name in after)


def check_adamw(before: Mapping[str, Tensor], after: Mapping[str, Tensor], step: int, rate: float) -> None:
    """The student's weights from the ones before and the moments after."""
    names = [name.removesuffix(".exp_avg").removeprefix("optimizer.") for name in after if name.endswith(".exp_avg")]
    assert len(names) > 50
    for name in names:
        weight, first, second = (t.double() for t in (before[f"student.{name}"], *moments(after, name)))
        assert float(after[f"optimizer.{name}.step"]) == step
        bare = name.endswith("bias") or "norm" in name or "token" in name
        change = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        truth = weight - rate * (change + (0.0 if bare else 0.5) * weight)
        torch.testing.assert_close(after[f"student.{name}"].double(), truth, rtol=1e-6, atol=1e-7)
        # both moments took in the same gradient
        gradient = (first - 0.9 * before[f"optimizer.{name}.exp_avg"].double()) / 0.1
        truth = 0.95 * before[f"optimizer.{name}.exp_avg_sq"].double() + 0.05 * gradient**2
        torch.testing.assert_close(second, truth, rtol=1e-3, atol=1e-10)


def moments(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return state[f"optimizer.{name}.exp_avg"], state[f"optimizer.{name}.exp_avg_sq"]


def check_following(before: Mapping[str, Tensor], after: Mapping[str, Tensor], role: str, momentum: float) -> None:
    names = [name.removeprefix(role) for name in after if name.startswith(role) and "pos_embed" not in name]
    assert len(names) > 20
    for name in names:
        truth = momentum * before[role + name].double() + (1 - momentum) * after[f"student.{name}"].double()
        torch.testing.assert_close(after[role + name].double(), truth, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_logged_losses_and_gradients_are_the_references(tiny: Config) -> None:
    """Batches of the real loader through the reference, with the weights that the run had before the step."""
    config = tiny.using(save_steps=1, keep=100)
    folder = pretrain(config)
    rows = {row["step"]: row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    alone = Ranks(0, 1, 1, torch.device("cpu"), None)
    with make_loader(open_images(config), config, alone) as loader:
        for step in (2, PER_EPOCH + 4):
            epoch, place = divmod(step - 1, PER_EPOCH)
            loader.set_epoch(epoch)
            batch = next(batch for number, batch in enumerate(loader) if number == place)
            drop_path_scale = stochastic_depth(config, epoch, batch.samples)
            assert drop_path_scale is not None
            before, after = (read_checkpoint(checkpoint_path(folder, number)) for number in (step - 1, step))
            parts = ("student", "reconstruction_teacher", "labelling_teacher")
            weights = [{name: tensor.double() for name, tensor in before.part(part).items()} for part in parts]
            for tensor in weights[0].values():
                tensor.requires_grad_()
            truth = reference.step(weights[0], weights[1], weights[2], batch, config, drop_path_scale)
            truth.total.backward()
            logged = [rows[step][name] for name in ("loss", "loss_m", "loss_c", "loss_p")]
            assert logged == pytest.approx([float(part.detach()) for part in truth], rel=1e-5)
            for name, weight in weights[0].items():
                if "pos_embed" in name:
                    continue
                moments_now, moments_then = moments(after.tensors, name)[0], moments(before.tensors, name)[0]
                gradient = (moments_now.double() - 0.9 * moments_then.double()) / 0.1
                assert weight.grad is not None
                scale = float(weight.grad.abs().max())
                torch.testing.assert_close(gradient, weight.grad, rtol=1e-3, atol=1e-3 * scale + 1e-7)
