"""The step that never holds the patch logits, against the step that holds them."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpmae.model.head import Head
from fastpmae.pretraining.collapse import collapse_metrics
from fastpmae.pretraining.losses import PseudoLabels, patch_loss
from fastpmae.pretraining.step import Losses, Targets, compute_targets, student_loss
from tests.tiny import drop_path_scale_of, made_batch, tiny_config, tiny_networks


def stepped(chunk: int, settings: dict[str, Any], bf16: bool = False, run: Any = None) -> tuple[Any, ...]:
    """Losses, gradients and targets of one step in fp32 with `chunk` rows of patch logits at a time."""
    settings = dict(settings)
    config = tiny_config(settings.pop("preset", "paper"), folds=3, prototypes_chunk=chunk, **settings)
    student, teachers = tiny_networks(config)
    batch = made_batch(1, 2, (5, 4, 4))
    for network in (student, *teachers.modules().values()):
        network.float()
    drop_path_scale = drop_path_scale_of(config, len(batch)).float() if config.network.drop_path else None

    def both() -> tuple[Losses, Targets]:
        targets = compute_targets(teachers, batch, config)
        return student_loss(student, batch, drop_path_scale, targets, config), targets

    with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        losses, targets = (run or (lambda function: function))(both)()
    losses.total.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return [loss.detach() for loss in losses[:4]], gradients, targets


def assert_same(found: tuple[Any, ...], expected: tuple[Any, ...], tolerance: float) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(
            found[1][name], gradient, rtol=0, atol=10 * tolerance * largest + 1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("chunk", [1, 5, 26, 1000])
@pytest.mark.parametrize(
    "settings",
    [{}, {"preset": "single-step"}, {"match_scope": "fold", "student_temperature": 0.07, "sinkhorn_iterations": 1}],
    ids=["dual", "single", "otherwise"],
)
def test_chunks_change_neither_losses_nor_gradients(chunk: int, settings: dict[str, Any]):
    found, whole = stepped(chunk, settings), stepped(0, settings)
    assert_same(found, whole, 1e-5)
    assert found[2].patch_labels.logits.matrix is None
    assert whole[2].patch_labels.logits.matrix is not None
    rows = torch.cat(list(found[2].patch_labels.logits.split(7)))
    torch.testing.assert_close(rows, whole[2].patch_labels.logits.matrix)
    figures, expected = collapse_metrics(found[2]), collapse_metrics(whole[2])
    assert figures == pytest.approx(expected, rel=1e-4)


def test_chunks_keep_the_precision_of_the_rest():
    """Under autocast products are in its precision, with chunks or without, and sums over prototypes in fp32."""
    found, whole = stepped(5, {}, bf16=True), stepped(0, {}, bf16=True)
    assert found[2].patch_labels.logits.features.dtype == whole[2].patch_labels.logits.matrix.dtype != torch.float32
    assert_same(found, whole, 2e-3)


def test_a_method_without_labels_takes_no_notice():
    assert_same(stepped(5, {"preset": "mae"}), stepped(0, {"preset": "mae"}), 0)


def test_nothing_of_the_size_of_the_hidden_layers_waits_for_the_backward_pass():
    """What is kept for a head that sees its tokens in chunks is as large as the tokens and the weights."""
    torch.manual_seed(0)
    head, rows, chunk = Head(8, 512, 8, 16), 64, 16
    with torch.no_grad():
        labels = PseudoLabels(head.patch_factors(torch.randn(rows, 8), chunk), torch.zeros(16), 0.1)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _, unseen = head(torch.randn(2, 8), torch.randn(rows, 8, requires_grad=True), chunk)
        patch_loss(unseen, labels, torch.arange(rows).view(1, rows), 0.1)
    assert kept
    assert (rows, 512) not in kept
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head.factors(torch.randn(rows, 8, requires_grad=True), head.patch_prototypes)
    assert (rows, 512) in kept
