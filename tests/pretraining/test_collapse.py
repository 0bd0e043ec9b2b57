"""The figures that should give a collapse away do, on features and labels that are made to collapse."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpmae.model.head import PrototypeLogits
from fastpmae.pretraining import collapse as collapse_module
from fastpmae.pretraining.collapse import FlatLabels, collapse_figures, collapse_metrics, label_entropy, token_std
from fastpmae.pretraining.losses import PseudoLabels, class_loss, patch_loss, pseudo_labels
from fastpmae.pretraining.match_geometry import geometry_figures, match_geometry
from fastpmae.pretraining.step import Targets
from fastpmae.run.device_metrics import to_host
from tests.devices import Waits
from tests.tiny import made_batch, tiny_config


def test_spread_of_features_that_point_anywhere():
    tokens = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)) * torch.rand(4000, 1)
    std, rank = token_std(tokens)
    assert std == pytest.approx(1, abs=0.02)
    assert rank == pytest.approx(16, abs=0.2)


def test_spread_of_collapsed_features():
    one = torch.ones(100, 16)
    assert token_std(one) == (pytest.approx(0, abs=1e-7), pytest.approx(1, abs=1e-6))
    line = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)).sign() * torch.randn(1, 16)
    std, rank = token_std(line)
    assert rank == pytest.approx(1, abs=1e-6)
    assert std > 0.5


def in_fp64(tokens: torch.Tensor) -> tuple[float, float]:
    """Both figures as they are defined, everything in double precision."""
    tokens = torch.nn.functional.normalize(tokens.double(), dim=1) * tokens.shape[1] ** 0.5
    share = torch.linalg.svdvals(tokens - tokens.mean(dim=0)) ** 2
    share /= share.sum()
    return tokens.std(dim=0, correction=0).mean().item(), math.exp(-torch.xlogy(share, share).sum().item())


def drawn(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1500, 48, generator=generator)
    one = torch.randn(48, generator=generator)
    spectrum = torch.logspace(0, -4, 48)
    return {
        "anywhere": noise,
        "of a few directions": noise * spectrum,
        "of one direction": noise[:, :1].sign() * one,
        "hardly apart": one + 1e-4 * noise,
        "hardly apart, of a few directions": one + 1e-3 * noise * spectrum,
        "nearly nothing": 1e-20 * noise,
        "nearly nothing, of a few directions": 1e-30 * noise * spectrum,
        "large": 1e15 * noise * spectrum,
        "two kinds": torch.where(noise[:, :1] > 0, one, -0.5 * one.flip(0)),
        "in bf16": (one + 0.1 * noise).bfloat16(),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "anywhere", "of a few directions", "of one direction", "hardly apart", "hardly apart, of a few directions",
        "nearly nothing", "nearly nothing, of a few directions", "large", "two kinds", "in bf16",
    ],
)  # fmt: skip
def test_spread_in_fp32_is_that_in_fp64(kind: str):
    tokens = drawn(kind)
    std, rank = in_fp64(tokens)
    assert token_std(tokens) == (pytest.approx(std, rel=1e-4), pytest.approx(rank, rel=1e-4))


def test_spread_of_nothing_at_all():
    assert token_std(torch.zeros(10, 4)) == (0, 1)


def entropies(logits: torch.Tensor, labels: PseudoLabels) -> torch.Tensor:
    """Of each label, row by row, in double precision."""
    share = torch.softmax(logits.double() / labels.epsilon + labels.logv.double(), dim=1)
    return torch.special.entr(share).sum(dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("at_once", [1, 70, 1 << 18])
def test_figures_do_not_depend_on_how_many_logits_are_looked_at_at_once(
    dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(collapse_module.AT_ONCE, "cpu", at_once)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(33, 24, generator=generator).to(dtype)
    features, prototypes = torch.randn(33, 6, generator=generator), torch.randn(24, 6, generator=generator)
    ((labels,),) = pseudo_labels([[PrototypeLogits(logits)]], (0.05,), 3)
    factors = PseudoLabels(PrototypeLogits(features=features, prototypes=prototypes, chunk=5), labels.logv, 0.05)
    tokens = torch.randn(3, 11, 6, generator=generator)
    figures = collapse_metrics(Targets(tokens, tokens, None, labels, factors))
    assert figures["class_prototypes_used"] == len(set(logits.argmax(dim=1).tolist()))
    assert figures["class_label_entropy"] == pytest.approx(entropies(logits, labels).mean().item(), rel=1e-5)
    product = features @ prototypes.T
    assert figures["patch_prototypes_used"] == len(set(product.argmax(dim=1).tolist()))
    assert figures["patch_label_entropy"] == pytest.approx(entropies(product, factors).mean().item(), rel=1e-5)
    assert set(figures) >= {"reconstruction_std", "reconstruction_rank", "entropy_limit"}
    assert "labelling_rank" not in figures


def test_all_figures_of_a_row_come_at_once():
    """One wait for the device, after everything is asked for; the eigenvalues are found later, on the host."""
    told: list[str] = []

    class Told(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            told.append(func._opname)
            return func(*args, **(kwargs or {}))

    tokens = torch.randn(3, 11, 6)
    ((labels,),) = pseudo_labels([[PrototypeLogits(torch.randn(33, 24))]], (0.05,), 3)
    batch, match = made_batch(0, 3), torch.zeros(3, 12, dtype=torch.int64)
    targets = Targets(tokens, tokens, tokens, labels, labels)
    with Waits(anywhere=True) as waits, Told():
        parts = [collapse_figures(targets), geometry_figures(batch, match, tiny_config(match_scope="fold"))]
        named = to_host(*parts)
    # `tolist` of a tensor on the CPU needs no operation; on a GPU it is one copy
    assert waits.found == []
    assert "_linalg_eigh" not in told
    assert named() == collapse_metrics(targets) | match_geometry(batch, match, tiny_config(match_scope="fold"))


def test_effective_rank_counts_equal_directions():
    tokens = torch.cat([torch.eye(16)[:5], -torch.eye(16)[:5]])
    assert token_std(tokens)[1] == pytest.approx(5)


def test_label_entropy_of_even_and_of_certain_labels():
    even = PseudoLabels(PrototypeLogits(torch.zeros(10, 8)), torch.zeros(8), 0.05)
    certain = PseudoLabels(PrototypeLogits(100 * torch.eye(8)), torch.zeros(8), 0.05)
    assert label_entropy(even) == pytest.approx(math.log(8))
    assert label_entropy(certain) == pytest.approx(0, abs=1e-6)


def test_sinkhorn_hides_a_collapse_that_raw_logits_show():
    """All rows alike: balanced labels look healthy, the count of prototypes in use does not."""
    logits = torch.linspace(-1, 1, 8).expand(64, 8)
    tokens = torch.ones(4, 16, 6)
    ((labels,),) = pseudo_labels([[PrototypeLogits(logits)]], (0.05,), 3)
    figures = collapse_metrics(Targets(tokens, tokens, tokens, labels, labels))
    assert figures["patch_label_entropy"] == pytest.approx(math.log(8), abs=1e-3)
    assert figures["patch_prototypes_used"] == 1
    assert figures["labelling_rank"] == pytest.approx(1)
    assert figures["entropy_limit"] == pytest.approx(math.log(8))


def test_a_divergence_is_the_loss_without_the_entropy_of_its_labels():
    """Of class labels, folds side by side, and of the labels of the matched patches: KL by hand in double precision."""
    generator = torch.Generator().manual_seed(4)
    batch, folds, masked, temperature = 3, 2, 5, 0.1
    student_class, student_patch = torch.randn(batch, 7, generator=generator), torch.randn(15, 7, generator=generator)
    teacher_class, teacher_patch = (torch.randn(rows, 7, generator=generator) for rows in (batch * folds, 15))
    ((of_class, of_patch),) = pseudo_labels(
        [[PrototypeLogits(teacher_class), PrototypeLogits(teacher_patch)]], (0.3, 0.5), 3
    )
    match = torch.randint(0, masked, (batch, masked), generator=generator)
    losses = (
        class_loss(PrototypeLogits(student_class), of_class, folds, temperature),
        patch_loss(PrototypeLogits(student_patch.clone()), of_patch, match, temperature),
    )
    tokens = torch.randn(batch, masked, 6, generator=generator)
    figures = collapse_metrics(Targets(tokens, tokens, tokens, of_class, of_patch), losses, match)

    def label_of(labels: PseudoLabels, teacher: torch.Tensor) -> torch.Tensor:
        return torch.softmax(teacher.double() / labels.epsilon + labels.logv.double(), dim=1)

    def divergence(label: torch.Tensor, student: torch.Tensor) -> float:
        said = torch.log_softmax(student.double() / temperature, dim=1)
        return (label * (label.log() - said)).sum(dim=1).mean().item()

    rows = (match + masked * torch.arange(batch)[:, None]).flatten()
    of_folds = label_of(of_class, teacher_class)
    of_image = of_folds.view(batch, folds, -1).mean(dim=1)
    assert figures["class_divergence"] == pytest.approx(divergence(of_image, student_class), rel=1e-5)
    assert figures["patch_divergence"] == pytest.approx(
        divergence(label_of(of_patch, teacher_patch[rows]), student_patch), rel=1e-5
    )
    apart = of_folds.log() - of_image.log().repeat_interleave(folds, 0)
    assert figures["class_fold_divergence"] == pytest.approx((of_folds * apart).sum(1).mean().item(), rel=1e-5)
    assert "class_divergence" not in collapse_metrics(Targets(tokens, tokens, tokens, of_class, of_patch))


def test_labels_that_stay_flat_are_told_once_and_those_that_form_never():
    told: list[str] = []
    watch = FlatLabels(100, told.append)
    for step in range(0, 200, 10):
        watch.look({"step": step, "class_divergence": 0.05})
    assert len(told) == 1
    assert "class_divergence 0.05 nats" in told[0]
    formed = FlatLabels(100, told.append)
    for step in range(0, 300, 10):
        formed.look({"step": step, "class_divergence": 0.3 if step == 120 else 0.05})
    FlatLabels(0, told.append).look({"step": 5})
    assert len(told) == 1
