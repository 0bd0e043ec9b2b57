"""AdamW, its schedule, and steps that must not happen."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpmae import Config
from fastpmae.distributed.ranks import Ranks
from fastpmae.model.vit import Student
from fastpmae.pretraining.optimizer import learning_rate, make_optimizer, update
from tests import reference
from tests.tiny import tiny_config, tiny_networks

ALONE = Ranks(0, 1, 1, torch.device("cpu"), None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "settings", "peak", "warmup", "epochs"),
    [
        ("paper", {}, 2.666e-4 * 3, 60, 300),
        ("paper-800", {}, 2.666e-4 * 3, 60, 800),
        ("ablation", {}, 2.666e-4 * 3, 20, 100),
        ("mae", {}, 1.5e-4 * 16, 40, 1600),
        ("paper", {"batch_size": 32, "epochs": 10, "warmup_epochs": 0.0}, 2.666e-4 / 8, 0, 10),
        ("paper", {"batch_size": 256, "epochs": 7, "warmup_epochs": 2.5}, 2.666e-4, 2.5, 7),
        ("ablation", {"epochs": 3}, 2.666e-4 * 3, 0.6, 3),
        ("paper", {"batch_size": 32, "lr": 5e-3, "epochs": 10, "warmup_epochs": 1.0}, 5e-3, 1, 10),
    ],
)
def test_learning_rate(preset: str, settings: dict[str, Any], peak: float, warmup: float, epochs: int) -> None:
    config, per_epoch = tiny_config(preset, **settings), 13
    rates = [learning_rate(config, step, per_epoch) for step in range(epochs * per_epoch)]
    truth = [reference.learning_rate(peak, step / per_epoch, warmup, epochs) for step in range(epochs * per_epoch)]
    assert rates == pytest.approx(truth, rel=1e-12, abs=1e-18)
    assert max(rates) == pytest.approx(peak, rel=1e-2)
    top = math.ceil(warmup * per_epoch)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < peak * 1e-2


def test_the_papers_two_rates_agree() -> None:
    """8e-4 at batch 768 (appendix A) is 2.666e-4 for 256 images (section 4)."""
    assert learning_rate(tiny_config("paper"), 60 * 100, 100) == pytest.approx(8e-4, rel=1e-3)


def student_of(**settings: Any) -> tuple[Config, Student]:
    config = tiny_config(**settings)
    return config, tiny_networks(config)[0]


@pytest.mark.parametrize("tokens", [False, True])
def test_what_is_decayed(tokens: bool) -> None:
    config, student = student_of(weight_decay=0.04, decay_tokens=tokens)
    optimizer = make_optimizer(student, config)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(student.parameters()))
    for name, parameter in student.named_parameters():
        bare = name.endswith("bias") or "norm" in name or ("token" in name and not tokens)
        assert decay[id(parameter)] == (0.0 if bare else 0.04), name
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-8}


def set_gradients(student: Student, seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for parameter in student.parameters():
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)
        gradients.append(parameter.grad.clone())
    return gradients


def norm_of(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("clip", [0.0, 3.0, 1e6])
def test_updates_are_adamw(dtype: torch.dtype, tolerance: float, clip: float) -> None:
    config, student = student_of()
    student.to(dtype)
    optimizer = make_optimizer(student, config)
    start = [parameter.detach().clone() for parameter in student.parameters()]
    rates = [1e-3, 5e-3, 0.0, 2e-3, 1e-2, 1e-4]
    used: list[list[Tensor]] = []
    for step, rate in enumerate(rates):
        gradients = set_gradients(student, step)
        norm, skipped = update(optimizer, torch.ones((), dtype=dtype), rate, clip, ALONE)
        length = norm_of(gradients)
        assert float(norm) == pytest.approx(length, rel=1e-5)
        assert float(skipped) == 0
        used.append([g.double() * (min(1.0, clip / length) if clip else 1.0) for g in gradients])
    for number, (name, parameter) in enumerate(student.named_parameters()):
        bare = name.endswith("bias") or "norm" in name or "token" in name
        truth = reference.adamw(start[number], [step[number] for step in used], rates, 0.0 if bare else 0.05)
        # clipping divides by the norm plus 1e-6
        slack = 1e-6 if clip == 3.0 else tolerance
        torch.testing.assert_close(parameter.detach().double(), truth, rtol=slack, atol=slack)


def state_of(optimizer: torch.optim.Optimizer, student: Student) -> list[Tensor]:
    kept = [parameter.detach().clone() for parameter in student.parameters()]
    for parameter in student.parameters():
        state = optimizer.state[parameter]
        kept += [torch.as_tensor(state[key]).clone() for key in ("step", "exp_avg", "exp_avg_sq")]
    return kept


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "first gradient", "last gradient"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_that_is_not_finite_leaves_no_trace(bad: float, where: str, clip: float) -> None:
    config, student = student_of()
    student.float()
    optimizer = make_optimizer(student, config)
    for step in range(2):
        set_gradients(student, step)
        update(optimizer, torch.ones(()), 1e-3, clip, ALONE)
    before = state_of(optimizer, student)
    set_gradients(student, 2)
    parameters = list(student.parameters())
    loss = torch.ones(())
    if where == "loss":
        loss = torch.tensor(bad)
    else:
        gradient = parameters[0 if where.startswith("first") else -1].grad
        assert gradient is not None
        gradient.view(-1)[0] = bad
    _, skipped = update(optimizer, loss, 1e-3, clip, ALONE)
    assert float(skipped) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(optimizer, student), strict=True))

    # and the next one goes on as if nothing had been
    gradients = set_gradients(student, 3)
    _, skipped = update(optimizer, torch.ones(()), 1e-3, 0.0, ALONE)
    assert float(skipped) == 0
    assert float(optimizer.state[parameters[0]]["step"]) == 3
    first, second = before[len(parameters) + 1], before[len(parameters) + 2]
    state = optimizer.state[parameters[0]]
    torch.testing.assert_close(state["exp_avg"], 0.9 * first + 0.1 * gradients[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(state["exp_avg_sq"], 0.95 * second + 0.05 * gradients[0] ** 2, rtol=1e-5, atol=1e-7)


def test_the_very_first_step_may_be_skipped() -> None:
    config, student = student_of()
    optimizer = make_optimizer(student, config)
    start = [parameter.detach().clone() for parameter in student.parameters()]
    set_gradients(student, 0)
    update(optimizer, torch.tensor(math.nan), 1e-3, 0.0, ALONE)
    assert all(torch.equal(a, b) for a, b in zip(start, student.parameters(), strict=True))
    gradients = set_gradients(student, 1)
    update(optimizer, torch.ones(()), 1e-3, 0.0, ALONE)
    for number, (name, parameter) in enumerate(student.named_parameters()):
        bare = name.endswith("bias") or "norm" in name or "token" in name
        truth = reference.adamw(start[number], [gradients[number]], [1e-3], 0.0 if bare else 0.05)
        torch.testing.assert_close(parameter.detach(), truth, rtol=1e-12, atol=1e-12)
