"""The whole step, teach and learn, held to the float64 reference and to finite differences."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastpmae import Config
from fastpmae.config import Loss
from fastpmae.model.head import PrototypeLogits, centred
from fastpmae.pretraining.step import Losses, compute_targets, epsilons, student_loss
from tests import reference
from tests.tiny import drop_path_scale_of, made_batch, tiny_config, tiny_networks

CASES: dict[str, dict[str, Any]] = {
    "dual": {},
    "dual, folds of 5, 4 and 4": {"fold_sizes": (5, 4, 4)},
    "dual, folds of 3, 3, 2, 2, 2": {"fold_sizes": (3, 3, 2, 2, 2)},
    "dual, one fold": {"fold_sizes": (12,)},
    "dual, one image": {"size": 1},
    "labels from the simple view": {"labelling_view": "simple"},
    "tokens from the complex view": {"reconstruction_view": "complex"},
    "views the other way round": {"reconstruction_view": "complex", "labelling_view": "simple"},
    "single, both views": {"preset": "single-step"},
    "single, one view": {"preset": "single-step", "labelling_view": "simple"},
    "dual, teachers from random": {"teacher_init": "random"},
    "SdAE": {"preset": "sdae"},
    "SdAE as released": {"preset": "sdae-code"},
    "SdAE as released, folds of 5, 4 and 4": {"preset": "sdae-code", "fold_sizes": (5, 4, 4)},
    "MAE": {"preset": "mae"},
    "MAE, uneven": {"preset": "mae", "fold_sizes": (5, 4, 4)},
    "L2 match": {"match_metric": "l2"},
    "match within folds": {"match_scope": "fold", "fold_sizes": (5, 4, 4)},
    "L2 match within folds": {"match_scope": "fold", "match_metric": "l2"},
    "cosine over tokens": {"cosine_axis": "token"},
    "lambda 1 0 0": {"lambda_c": 0.0, "lambda_p": 0.0},
    "lambda 1 1 0": {"lambda_p": 0.0},
    "lambda 1 0 1": {"lambda_c": 0.0},
    "lambda 0 1 1": {"lambda_m": 0.0},
    "lambda 0.3 2 0.7": {"lambda_m": 0.3, "lambda_c": 2.0, "lambda_p": 0.7},
    "class epsilon": {"class_epsilon": 0.02},
    "centred bottleneck": {"center_bottleneck": True, "class_epsilon": 0.1},
    "centred bottleneck, single": {"preset": "single-step", "center_bottleneck": True},
    "prototypes in chunks, centred": {"prototypes_chunk": 5, "center_bottleneck": True},
    "temperatures": {"student_temperature": 0.07, "epsilon": 0.2, "sinkhorn_iterations": 5},
}


def set_up(case: dict[str, Any]) -> tuple[Config, Any, Any, Any]:
    case = dict(case)
    fold_sizes, size = case.pop("fold_sizes", (4, 4, 4)), case.pop("size", 2)
    config = tiny_config(case.pop("preset", "paper"), folds=len(fold_sizes), **case)
    student, teachers = tiny_networks(config)
    return config, student, teachers, made_batch(1, size, fold_sizes)


def expected(
    config: Config, student: Any, teachers: Any, batch: Any, drop_path_scale: Tensor | None
) -> tuple[Any, Any]:
    """The reference's losses, and its gradients by parameter name."""
    weights = reference.weights_of(student, grad=True)
    reconstruction, labelling = (
        None if teacher is None else reference.weights_of(teacher)
        for teacher in (teachers.reconstruction, teachers.labelling)
    )
    if config.loss.lambda_c == config.loss.lambda_p == 0:
        labelling = None
    result = reference.step(weights, reconstruction, labelling, batch, config, drop_path_scale)
    result.total.backward()
    zeros = {name: torch.zeros_like(w) for name, w in weights.items()}
    return result, {name: zeros[name] if w.grad is None else w.grad for name, w in weights.items()}


def computed(
    config: Config, student: Any, teachers: Any, batch: Any, drop_path_scale: Tensor | None
) -> tuple[Losses, Any]:
    student.zero_grad()
    losses = student_loss(student, batch, drop_path_scale, compute_targets(teachers, batch, config), config)
    losses.total.backward()
    return losses, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in student.named_parameters()}


FAST = ("dual, folds of 5, 4 and 4", "single, both views", "SdAE as released", "MAE")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_losses_and_gradients_in_float64(name: str) -> None:
    config, student, teachers, batch = set_up(CASES[name])
    drop_path_scale = drop_path_scale_of(config, len(batch)) if config.network.drop_path else None
    losses, gradients = computed(config, student, teachers, batch, drop_path_scale)
    truth, true_gradients = expected(config, student, teachers, batch, drop_path_scale)
    # the target pixels are fp32 whatever the weights are
    exact, close = (1e-6, 1e-5) if config.loss.target == "pixels" else (1e-9, 1e-7)
    weights = {"reconstruction": config.loss.lambda_m, "class_label": config.loss.lambda_c}
    weights["patch_label"] = config.loss.lambda_p
    for part in ("total", "reconstruction", "class_label", "patch_label"):
        if weights.get(part, 1) > 0:
            torch.testing.assert_close(getattr(losses, part).double(), getattr(truth, part), rtol=exact, atol=1e-12)
    for parameter, gradient in gradients.items():
        scale = float(true_gradients[parameter].abs().max()) + 1e-6
        torch.testing.assert_close(
            gradient,
            true_gradients[parameter],
            rtol=close,
            atol=0.01 * close * scale,
            msg=lambda m, p=parameter: f"{p}: {m}",
        )


@pytest.mark.parametrize("name", FAST)
def test_losses_and_gradients_in_fp32(name: str) -> None:
    """The same weights rounded to fp32: losses within 1e-5, and each gradient within 1e-3 of its largest entry."""
    config, student, teachers, batch = set_up(CASES[name])
    for network in (student, *teachers.modules().values()):
        network.float().double()
    truth, true_gradients = expected(config, student, teachers, batch, None)
    for network in (student, *teachers.modules().values()):
        network.float()
    losses, gradients = computed(config, student, teachers, batch, None)
    assert losses.total.dtype == torch.float32
    torch.testing.assert_close(losses.total.double(), truth.total, rtol=1e-5, atol=0)
    largest = max(float(g.abs().max()) for g in true_gradients.values())
    for parameter, gradient in gradients.items():
        scale = float(true_gradients[parameter].abs().max()) + 1e-4 * largest
        error = float((gradient.double() - true_gradients[parameter]).abs().max())
        assert error <= 1e-3 * scale, f"{parameter}: {error / scale:.1e} of its largest entry"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dual", "single, both views", "SdAE as released", "MAE", "match within folds"])
def test_gradients_are_finite_differences(name: str) -> None:
    """(loss(w + hd) - loss(w - hd)) / 2h in random directions d, for each part of the student on its own."""
    config, student, teachers, batch = set_up(CASES[name])
    drop_path_scale = drop_path_scale_of(config, len(batch)) if config.network.drop_path else None
    _, gradients = computed(config, student, teachers, batch, drop_path_scale)
    targets = compute_targets(teachers, batch, config)
    parameters = dict(student.named_parameters())
    groups = ["encoder.cls_token", "encoder.patch_embed", "encoder.blocks.0", "encoder.blocks.1", "encoder.norm"]
    groups += ["decoder.mask_token", "decoder.embed", "decoder.blocks", "decoder.norm", "decoder.output", ""]
    groups += [part for part in ("head.fc", "head.class_prototypes", "head.patch_prototypes") if student.head]
    generator = torch.Generator().manual_seed(3)

    @torch.no_grad()
    def loss_at(direction: dict[str, Tensor], far: float) -> float:
        for parameter, change in direction.items():
            parameters[parameter] += far * change
        value = float(student_loss(student, batch, drop_path_scale, targets, config).total)
        for parameter, change in direction.items():
            parameters[parameter] -= far * change
        return value

    for group in groups:
        names = [parameter for parameter in parameters if parameter.startswith(group)]
        assert names
        for _ in range(3):
            direction = {p: torch.randn(parameters[p].shape, generator=generator).double() for p in names}
            slope = sum(float((gradients[p] * direction[p]).sum()) for p in names)
            h = 1e-5
            measured = (loss_at(direction, h) - loss_at(direction, -h)) / (2 * h)
            assert measured == pytest.approx(slope, rel=1e-5, abs=1e-7), group or "all"


def test_every_parameter_learns() -> None:
    config, student, teachers, batch = set_up(CASES["dual"])
    _, gradients = computed(config, student, teachers, batch, None)
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []


@pytest.mark.parametrize("name", ["dual", "single, both views", "SdAE"])
def test_no_gradient_reaches_a_teacher(name: str) -> None:
    config, student, teachers, batch = set_up(CASES[name])
    before = {role: reference.weights_of(teacher) for role, teacher in teachers.modules().items()}
    targets = compute_targets(teachers, batch, config)
    assert not targets.reconstruction.requires_grad
    computed(config, student, teachers, batch, None)
    for role, teacher in teachers.modules().items():
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert all(torch.equal(tensor, before[role][name]) for name, tensor in teacher.state_dict().items())


class Products(TorchDispatchMode):
    """The types of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._opname in ("mm", "addmm", "bmm"):
            self.types.add(result.dtype)
        return result


@pytest.mark.parametrize("name", ["dual, folds of 5, 4 and 4", "single, both views", "SdAE", "MAE"])
def test_teachers_compute_in_the_runs_precision_and_keep_nothing(name: str) -> None:
    """All of a teacher's products are in bf16, the head's, whose logits are labels, in fp16."""
    config, student, teachers, batch = set_up(CASES[name])
    for network in (student, *teachers.modules().values()):
        network.float()

    def kept(tensor: Tensor) -> Tensor:
        raise AssertionError(f"{tuple(tensor.shape)} is kept for a backward pass")

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(kept, kept),
        Products() as products,
    ):
        compute_targets(teachers, batch, config)
    encoder = {torch.bfloat16} if teachers.reconstruction else set()
    assert products.types == encoder | ({torch.float16} if teachers.labelling else set())


def test_a_weight_of_0_leaves_no_gradient_of_that_loss() -> None:
    config, student, teachers, batch = set_up(CASES["lambda 1 0 0"])
    _, gradients = computed(config, student, teachers, batch, None)
    assert [name for name, gradient in gradients.items() if name.startswith("head.") and gradient.any()] == []


def test_the_order_of_the_visible_patches_does_not_matter() -> None:
    config, student, teachers, batch = set_up(CASES["dual"])
    losses, gradients = computed(config, student, teachers, batch, None)
    batch.visible = batch.visible.flip(1).contiguous()
    again, same_gradients = computed(config, student, teachers, batch, None)
    torch.testing.assert_close(again.total, losses.total, rtol=1e-12, atol=0)
    torch.testing.assert_close(same_gradients, gradients, rtol=1e-8, atol=1e-12)


def test_temperatures_warm_up_as_dinos_do() -> None:
    """np.linspace(0.04, 0.07, 30), then 0.07: main_dino.py's --warmup_teacher_temp; class labels in proportion."""
    loss = Loss(epsilon=0.07, warmup_epsilon=0.04, warmup_epsilon_epochs=30, class_epsilon=0.14)
    truth = [*np.linspace(0.04, 0.07, 30), 0.07, 0.07]
    assert [epsilons(loss, epoch)[1] for epoch in range(32)] == pytest.approx(truth, rel=1e-12)
    assert [epsilons(loss, epoch)[0] for epoch in range(32)] == pytest.approx([2 * each for each in truth], rel=1e-12)
    assert epsilons(Loss(epsilon=0.07, warmup_epsilon=0.04, warmup_epsilon_epochs=1), 0)[1] == pytest.approx(0.04)
    assert epsilons(Loss(epsilon=0.07), 5) == (0.07, 0.07)


def test_features_are_centred_over_all_micro_batches() -> None:
    """Of blocks of rows by the mean of all of them; as factors as well as multiplied out."""
    features, prototypes = torch.randn(7, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    features, prototypes = features.float() + 3, torch.nn.functional.normalize(prototypes.float(), dim=1)
    truth = reference.cosines
    rows = [truth(prototypes.double(), feature - features.double().mean(0)) for feature in features.double()]
    for sizes in ((7,), (1, 6), (3, 4)):
        blocks = [PrototypeLogits(features=part, prototypes=prototypes) for part in features.split(list(sizes))]
        for found in (centred(blocks), centred(blocks, chunk=2)):
            parts = [matrix for block in found for matrix in block.split(100)]
            torch.testing.assert_close(torch.cat(parts).double(), torch.stack(rows), rtol=1e-5, atol=1e-6)
