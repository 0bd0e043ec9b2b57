"""The prototype loss and its gradients against float64, in all its forms."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpmae_kernels import (
    backend,
    prototype_cross_entropy,
    prototype_cross_entropy_from_features,
    prototype_cross_entropy_of_product,
    sinkhorn_bias,
    sinkhorn_bias_from_features,
)

SHAPES = [(1, 1, 1), (1, 3, 300), (5, 2, 7), (100, 80, 257), (300, 300, 4096), (0, 4, 8)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def made(rows: int, labels: int, prototypes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + prototypes)
    student, teacher = (torch.rand(n, prototypes, generator=generator) * 2 - 1 for n in (rows, labels))
    logv = torch.randn(prototypes, generator=generator)
    index = torch.randint(labels, (rows,), generator=generator)
    return student.to(dtype), teacher.to(dtype), logv, index


def exact(student: Tensor, teacher: Tensor, logv: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, the gradient by its formula."""
    label = torch.softmax(teacher.double() / 0.05 + logv.double(), dim=1)[index]
    score = torch.log_softmax(student.double() / 0.1, dim=1)
    return -(label * score).sum(dim=1), (score.exp() - label) / 0.1 * weight.double().unsqueeze(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "labels", "prototypes"), SHAPES)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("expected_gradient", [1.0, 0.25])
def test_loss_and_gradient(
    rows: int, labels: int, prototypes: int, dtype: torch.dtype, overwrite: bool, expected_gradient: float
):
    student, teacher, logv, index = made(rows, labels, prototypes, dtype)
    weight = torch.linspace(0.25, 1, rows)

    def run(**options: object) -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        loss = prototype_cross_entropy(leaf * 1, teacher, logv, index, **options)  # pyright: ignore
        (loss * weight).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        return loss.detach(), leaf.grad

    with backend.use("ref"):
        plain = run()
    got = run(overwrite=overwrite, expected_gradient=expected_gradient)
    floors = (2e-6, {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype])
    for ours, theirs, truth, floor in zip(
        got, plain, exact(student, teacher, logv, index, weight), floors, strict=True
    ):
        if rows:
            allowed = 2 * (theirs - truth).abs().max().item() + floor
            assert (ours - truth).abs().max().item() <= allowed
        assert ours.shape == truth.shape


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_foreseen_gradient_needs_no_second_pass(overwrite: bool, monkeypatch: pytest.MonkeyPatch):
    student, teacher, logv, index = made(8, 8, 40, torch.float32)
    leaf = student.requires_grad_()
    loss = prototype_cross_entropy(
        leaf * 1, teacher, logv, index, overwrite=overwrite, expected_gradient=1 / 8
    ).mean()  # fmt: skip
    monkeypatch.setattr(Tensor, "mul_", None)
    (gradient,) = torch.autograd.grad(loss, leaf)
    truth = exact(leaf.detach(), teacher, logv, index, torch.full((8,), 1 / 8))[1]
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-5, atol=1e-6)


def test_the_gradient_lies_where_the_logits_were():
    student, teacher, logv, index = made(6, 6, 40, torch.float32)
    leaf = student.clone().requires_grad_()
    logits = leaf * 1
    prototype_cross_entropy(logits, teacher, logv, index, overwrite=True, expected_gradient=1.0)
    truth = exact(student, teacher, logv, index, torch.ones(6))[1]
    torch.testing.assert_close(logits.detach().double(), truth, rtol=1e-5, atol=1e-5)


def test_overwritten_logits_cannot_be_used_unnoticed():
    student, teacher, logv, index = made(6, 6, 40, torch.float32)
    leaf = student.requires_grad_()
    loss = prototype_cross_entropy(leaf * 1, teacher, logv, index, overwrite=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = leaf * 1
    other = logits.exp().sum() + logits.square().sum()
    loss = prototype_cross_entropy(logits, teacher, logv, index, overwrite=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()
    with pytest.raises(ValueError, match="a leaf's own values"):
        prototype_cross_entropy(leaf, teacher, logv, index, overwrite=True)


def test_gradient_by_finite_differences():
    student, teacher, logv, index = (t.double() if t.is_floating_point() else t for t in made(3, 3, 5, torch.float32))
    assert torch.autograd.gradcheck(
        lambda logits: prototype_cross_entropy(logits, teacher, logv, index), student.requires_grad_()
    )


def test_extreme_logits_and_nan():
    student, teacher, logv, _ = made(4, 4, 50, torch.float32)
    student, teacher = student * 1e5, teacher * 1e5
    teacher[0, :10] = -math.inf
    student[1, 2] = -math.inf
    teacher[2, 5] = math.nan
    loss = prototype_cross_entropy(student, teacher, logv, torch.arange(4))
    assert loss.isfinite().tolist() == [True, True, False, True]
    truth = exact(student, teacher, logv, torch.arange(4), torch.ones(4))[0]
    torch.testing.assert_close(loss[[0, 3]].double(), truth[[0, 3]], rtol=1e-5, atol=1e-3)
    student[3, 4] = math.nan
    assert prototype_cross_entropy(student, teacher, logv, torch.arange(4))[3].isnan()


def test_strides_do_not_matter():
    student, teacher, logv, index = made(70, 70, 40, torch.float32)
    expected = prototype_cross_entropy(student, teacher, logv, index)
    spread = torch.full((70, 90), math.nan)
    spread[:, 5:85:2] = student
    assert torch.equal(prototype_cross_entropy(spread[:, 5:85:2], teacher.T.contiguous().T, logv, index), expected)
    leaf = spread.requires_grad_()
    loss = prototype_cross_entropy((leaf * 1)[:, 5:85:2], teacher, logv, index, overwrite=True, expected_gradient=1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    truth = exact(student, teacher, logv, index, torch.ones(70))[1]
    torch.testing.assert_close(gradient[:, 5:85:2].double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"index": torch.tensor([0, 1, 6])}, IndexError, "0 to 6, there are 6 labels"),
        ({"index": torch.tensor([0, -1, 2])}, IndexError, "-1 to 2"),
        ({"index": torch.tensor([0, 1])}, ValueError, "one integer a student row"),
        ({"index": torch.tensor([0.0, 1.0, 2.0])}, ValueError, "one integer a student row"),
        ({"logv": torch.zeros(9)}, ValueError, "agree on the prototypes"),
        ({"teacher_logits": torch.zeros(6, 9)}, ValueError, "agree on the prototypes"),
        ({"temperature": 0.0}, ValueError, "must be positive"),
        ({"epsilon": -1.0}, ValueError, "must be positive"),
    ],
)
@pytest.mark.untyped
def test_what_does_not_fit_is_refused(change: dict, error: type[Exception], words: str):
    student, teacher, logv, index = made(3, 6, 40, torch.float32)
    arguments: dict[str, Any] = {"student_logits": student, "teacher_logits": teacher, "logv": logv, "index": index}
    with pytest.raises(error, match=words):
        prototype_cross_entropy(**arguments | change)


@pytest.mark.parametrize("chunk", [1, 17, 60, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_features(chunk: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    teacher, student, theirs, ours = (
        F.normalize(torch.randn(n, 16, generator=generator)).to(dtype) for n in (100, 60, 40, 40)
    )  # fmt: skip
    index = torch.randint(100, (60,), generator=generator)
    logv = sinkhorn_bias_from_features(teacher, theirs, prototypes_chunk=chunk)
    torch.testing.assert_close(logv, sinkhorn_bias(teacher @ theirs.T), rtol=1e-4, atol=1e-4)

    def run(tensors: list[Tensor], plain: bool) -> list[Tensor]:
        a, b, c, d = (tensor.clone().requires_grad_() for tensor in tensors)
        if plain:
            loss = prototype_cross_entropy(a @ b.T, (c @ d.T).detach(), logv.to(a.dtype), index).mean()
        else:
            loss = prototype_cross_entropy_from_features(a, b, c, d, logv, index, prototypes_chunk=chunk)
            assert torch.autograd.grad(loss, (c, d), retain_graph=True, allow_unused=True) == (None, None)
        return [loss.detach(), *torch.autograd.grad(loss * 3, (a, b))]

    given = [student, ours, teacher, theirs]
    truth = run([tensor.double() for tensor in given], plain=True)
    with backend.use("ref"):
        plain = run(given, plain=True)
    for got, usual, right in zip(run(given, plain=False), plain, truth, strict=True):
        assert got.dtype == usual.dtype
        allowed = 2 * (usual - right).abs().max().item() + 1e-6
        assert (got - right).abs().max().item() <= allowed


@pytest.mark.parametrize("foreseen", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_product(dtype: torch.dtype, foreseen: bool):
    """Where the gradient was foreseen it has the bits of the loss of logits; else it is as near as the usual code's."""
    generator = torch.Generator().manual_seed(0)
    student, ours = (F.normalize(torch.randn(n, 16, generator=generator)).to(dtype) for n in (60, 257))
    _, teacher, logv, index = made(60, 80, 257, dtype)
    weight = torch.full((60,), 1 / 64) if foreseen else torch.linspace(0.25, 1, 60) / 64

    def run(features: Tensor, prototypes: Tensor, product: bool) -> list[Tensor]:
        a, b = (tensor.clone().requires_grad_() for tensor in (features, prototypes))
        labels, bias = teacher.to(a.dtype), logv.to(torch.promote_types(a.dtype, torch.float32))
        if product:
            rows = prototype_cross_entropy_of_product(a, b, labels, bias, index, expected_gradient=1 / 64)
        else:
            rows = prototype_cross_entropy(a @ b.T, labels, bias, index, overwrite=True, expected_gradient=1 / 64)
        return [rows.detach(), *torch.autograd.grad((rows * weight).sum(), (a, b))]

    got, logits = run(student, ours, True), run(student, ours, False)
    assert torch.equal(got[0], logits[0])
    assert [each.dtype for each in got] == [each.dtype for each in logits]
    if foreseen:
        assert all(map(torch.equal, got, logits))
    with backend.use("ref"):
        plain = run(student, ours, True)
    for found, usual, right in zip(got, plain, run(student.double(), ours.double(), True), strict=True):
        allowed = 2 * (usual.double() - right).abs().max().item() + torch.finfo(dtype).eps * right.abs().max().item()
        assert (found - right).abs().max().item() <= allowed


def test_of_product_gives_each_side_its_gradient_alone():
    a, b = torch.rand(6, 4), torch.rand(10, 4)
    rest = torch.rand(6, 10), torch.zeros(10), torch.arange(6)
    first, second = (tensor.clone().requires_grad_() for tensor in (a, b))
    both = torch.autograd.grad(prototype_cross_entropy_of_product(first, second, *rest).sum(), (first, second))
    alone = torch.autograd.grad(prototype_cross_entropy_of_product(first, b, *rest).sum(), first)
    alone += torch.autograd.grad(prototype_cross_entropy_of_product(a, second, *rest).sum(), second)
    assert all(map(torch.equal, both, alone))
    assert torch.equal(
        prototype_cross_entropy_of_product(a, b, *rest), prototype_cross_entropy_of_product(first, b, *rest).detach()
    )


@pytest.mark.untyped
def test_of_product_refuses_what_does_not_fit():
    a, b, index, logv = torch.ones(4, 8), torch.ones(6, 8), torch.arange(4), torch.zeros(6)
    with pytest.raises(ValueError, match="do not fit"):
        prototype_cross_entropy_of_product(a, b[:, :7], torch.ones(4, 6), logv, index)
    with pytest.raises(ValueError, match="agree on the prototypes"):
        prototype_cross_entropy_of_product(a, b, torch.ones(4, 7), logv, index)
    with pytest.raises(ValueError, match="must be positive"):
        prototype_cross_entropy_of_product(a, b, torch.ones(4, 6), logv, index, temperature=0.0)
    with pytest.raises(IndexError, match="there are 3 labels"):
        prototype_cross_entropy_of_product(a, b, torch.ones(3, 6), logv, index)


@pytest.mark.untyped
def test_from_features_refuses_what_does_not_fit():
    a, b = torch.ones(4, 8), torch.ones(6, 8)
    index, logv = torch.arange(4), torch.zeros(6)
    with pytest.raises(ValueError, match="at least one row"):
        prototype_cross_entropy_from_features(a, b, a, b, logv, index, prototypes_chunk=0)
    with pytest.raises(ValueError, match="do not fit"):
        prototype_cross_entropy_from_features(a, b[:, :7], a, b, logv, index)
    with pytest.raises(ValueError, match="no rows"):
        prototype_cross_entropy_from_features(a[:0], b, a, b, logv, index[:0])
    with pytest.raises(ValueError, match="at least one iteration"):
        sinkhorn_bias_from_features(a, b, iterations=0)
