"""Each loss on its own, with its gradient, held to the float64 reference."""

import pytest
import torch
from torch import Tensor

from fastpmae.model.head import PrototypeLogits
from fastpmae.pretraining import losses
from fastpmae_kernels import nearest_patch
from tests import reference


def tokens(seed: int, batch: int = 3, count: int = 7, dim: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, dim, generator=generator, dtype=torch.float64) * 2 + 0.5


def nested(values: Tensor) -> list[list[Tensor]]:
    return [list(image) for image in values]


def test_the_reconstruction_target_is_standardised() -> None:
    values = tokens(0)
    truth = torch.stack([torch.stack([reference.standardised(t) for t in image]) for image in values])
    torch.testing.assert_close(losses.reconstruction_target(values), truth, rtol=1e-12, atol=1e-12)
    low = losses.reconstruction_target(values.float())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), truth, rtol=1e-5, atol=1e-5)
    # the unbiased variance of n numbers makes their squares add up to n - 1
    torch.testing.assert_close((truth**2).sum(-1), torch.full((3, 7), 5.0).double(), rtol=1e-5, atol=0)


def test_a_constant_token_has_a_finite_target() -> None:
    assert not losses.reconstruction_target(torch.full((1, 2, 6), 3.0)).any()


@pytest.mark.parametrize("fold_sizes", [(), (7,), (3, 2, 2), (4, 3)], ids=lambda sizes: f"over tokens in {sizes}")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_reconstruction_loss(fold_sizes: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    predicted, target = tokens(1).requires_grad_(), tokens(2)
    if fold_sizes:
        truth = reference.released_loss(nested(predicted), nested(target), fold_sizes)
    else:
        truth = reference.reconstruction_loss(nested(predicted), nested(target))
    (true_gradient,) = torch.autograd.grad(truth, predicted)
    ours = predicted.detach().to(dtype).requires_grad_()
    value = losses.reconstruction_loss(ours, target.to(dtype), "token" if fold_sizes else "feature", fold_sizes)
    (gradient,) = torch.autograd.grad(value, ours)
    torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=0)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=tolerance, atol=tolerance * 1e-2)


def test_the_axes_differ_and_end_at_0_and_2() -> None:
    a, b = tokens(1), tokens(2)
    feature, token, folds = (
        float(losses.reconstruction_loss(a, b, "token" if sizes else "feature", sizes)) for sizes in ((), (7,), (3, 4))
    )
    assert min(abs(feature - token), abs(feature - folds), abs(token - folds)) > 1e-3
    assert float(losses.reconstruction_loss(a, 3 * a, "token", (3, 4))) == pytest.approx(0, abs=1e-12)
    assert float(losses.reconstruction_loss(a, -a, "token", (3, 4))) == pytest.approx(2, abs=1e-12)
    assert float(losses.reconstruction_loss(a, 3 * a)) == pytest.approx(0, abs=1e-12)
    assert float(losses.reconstruction_loss(a, -a)) == pytest.approx(2, abs=1e-12)


def test_folds_of_the_released_loss_are_rows_of_a_larger_batch() -> None:
    """As SdAE's code has it: [batch * folds, tokens of a fold, features], and torch's default axis."""
    a, b = tokens(1, 2, 6), tokens(2, 2, 6)
    one, other = (values.reshape(2 * 3, 2, 6) for values in (a, b))
    truth = 1 - torch.nn.functional.cosine_similarity(one, other).mean()
    torch.testing.assert_close(losses.reconstruction_loss(a, b, "token", (2, 2, 2)), truth, rtol=1e-14, atol=0)


@pytest.mark.parametrize("patch_size", [2, 4])
def test_pixel_target_is_maes(patch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 8, 8), generator=generator, dtype=torch.uint8)
    image[:, :patch_size, :patch_size] = torch.tensor([7, 200, 90], dtype=torch.uint8).view(3, 1, 1)
    ids = list(range((8 // patch_size) ** 2))
    truth = torch.stack([reference.pixel_target(image, i, patch_size) for i in ids])
    found = losses.pixel_target(image[None], torch.tensor([ids]), patch_size)[0]
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_pixel_loss(dtype: torch.dtype, tolerance: float) -> None:
    predicted, target = tokens(1).requires_grad_(), tokens(2)
    truth = reference.pixel_loss(nested(predicted), nested(target))
    (true_gradient,) = torch.autograd.grad(truth, predicted)
    ours = predicted.detach().to(dtype).requires_grad_()
    value = losses.pixel_loss(ours, target.to(dtype))
    (gradient,) = torch.autograd.grad(value, ours)
    torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=0)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=tolerance, atol=tolerance)


def scores(rows: int, prototypes: int, seed: int) -> Tensor:
    return (tokens(seed, 1, rows, prototypes)[0] / 8).clamp(-1, 1)


@pytest.mark.parametrize(("batch", "folds"), [(4, 3), (1, 3), (4, 1), (3, 5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_class_loss(batch: int, folds: int, dtype: torch.dtype, tolerance: float) -> None:
    """The loss against the mean label of the folds, and the same as the mean of the losses to each fold."""
    teacher, student = scores(batch * folds, 10, 1), scores(batch, 10, 2).requires_grad_()
    table = reference.sinkhorn(teacher, 0.05, 3).view(batch, folds, 10)
    truth = torch.stack([reference.cross_entropy(table[i].mean(0), student[i], 0.1) for i in range(batch)]).mean()
    each = torch.stack(
        [reference.cross_entropy(table[i, k], student[i], 0.1) for i in range(batch) for k in range(folds)]
    ).mean()
    torch.testing.assert_close(truth, each, rtol=1e-12, atol=0)
    (true_gradient,) = torch.autograd.grad(truth, student)
    ((labels,),) = losses.pseudo_labels([[PrototypeLogits(teacher.to(dtype))]], (0.05,), 3)
    ours = student.detach().to(dtype).requires_grad_()
    value = losses.class_loss(PrototypeLogits(ours), labels, folds, 0.1)
    (gradient,) = torch.autograd.grad(value, ours)
    torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=0)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize(("batch", "masked"), [(4, 6), (1, 12), (5, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_patch_loss(batch: int, masked: int, dtype: torch.dtype, tolerance: float) -> None:
    teacher, student = scores(batch * masked, 10, 1), scores(batch * masked, 10, 2).requires_grad_()
    match = torch.randint(0, masked, (batch, masked), generator=torch.Generator().manual_seed(0))
    table = reference.sinkhorn(teacher, 0.05, 3)
    terms = [
        reference.cross_entropy(table[i * masked + match[i, n]], student[i * masked + n], 0.1)
        for i in range(batch)
        for n in range(masked)
    ]
    truth = torch.stack(terms).mean()
    (true_gradient,) = torch.autograd.grad(truth, student)
    ((labels,),) = losses.pseudo_labels([[PrototypeLogits(teacher.to(dtype))]], (0.05,), 3)
    ours = student.detach().to(dtype).requires_grad_()
    value = losses.patch_loss(PrototypeLogits(ours), labels, match, 0.1)
    (gradient,) = torch.autograd.grad(value, ours)
    torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=0)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=tolerance, atol=tolerance * 1e-2)


def test_the_match_follows_no_gradient() -> None:
    student = tokens(1).requires_grad_()
    match = nearest_patch(student, tokens(2), "cosine", "image", (4, 3))
    assert not match.requires_grad
    assert [reference.nearest(list(a), list(b)) for a, b in zip(student, tokens(2), strict=True)] == match.tolist()
