"""What every operation is allowed: twice the error of plain torch, and no matrix beside the logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastpmae_kernels import (
    backend,
    nearest_patch_similarity,
    patch_tokens,
    patch_tokens_ref,
    photometric,
    photometric_ref,
    prototype_cross_entropy,
    prototype_cross_entropy_from_features,
    sinkhorn,
    sinkhorn_bias,
    sinkhorn_bias_from_features,
    sinkhorn_ref,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GENERATOR = torch.Generator().manual_seed(0)


def assert_within_twice(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """A unit of the result's last place is beyond anybody's reach."""
    unit = torch.finfo(got.dtype).eps * exact.abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item() + unit
    assert (got.double() - exact).abs().max().item() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_labels(dtype: torch.dtype):
    logits = (torch.rand(130, 300, generator=GENERATOR) * 2 - 1).to(dtype)
    assert_within_twice(sinkhorn(logits), sinkhorn_ref(logits), sinkhorn_ref(logits.double()))


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_similarity(dtype: torch.dtype, metric: str):
    student, teacher = (torch.randn(3, 147, 192, generator=GENERATOR).to(dtype) for _ in range(2))
    index, similarity = nearest_patch_similarity(student, teacher, metric)  # pyright: ignore
    with backend.use("ref"):
        plain = nearest_patch_similarity(student, teacher, metric)[1]  # pyright: ignore
    ours = student.double()
    theirs = teacher.double().gather(1, index.unsqueeze(2).expand(-1, -1, 192))
    exact = torch.cosine_similarity(ours, theirs, dim=2) if metric == "cosine" else -(ours - theirs).square().sum(dim=2)
    assert_within_twice(similarity, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pixels(dtype: torch.dtype):
    images = torch.randint(256, (3, 3, 32, 48), generator=GENERATOR, dtype=torch.uint8)
    ids = torch.randint(6, (3, 4), generator=GENERATOR)
    exact = patch_tokens_ref(images, ids, 16, torch.float64)
    assert_within_twice(patch_tokens(images, ids, 16, dtype), patch_tokens_ref(images, ids, 16, dtype), exact)
    factors = torch.tensor([[0.7, 1.3, 0.9, 0.1, 1.0]] * 3, dtype=torch.float64)
    choices = torch.tensor([[3, 1, 0, 2, 1, 0, 1, 1, 0], [0, 1, 2, 3, 1, 1, 0, 0, 0], [0] * 9], dtype=torch.uint8)
    choices[2, :4] = torch.arange(4)
    exact = photometric_ref(images, factors, choices, dtype=torch.float64)
    plain = photometric_ref(images, factors, choices, dtype=dtype)
    assert_within_twice(photometric(images, factors, choices, dtype=dtype), plain, exact)


class Sizes(TorchDispatchMode):
    """How many numbers each newly made tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        results = func(*args, **(kwargs or {}))
        for each in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in known:
                self.made.append(each.numel())
        return results


def test_no_matrix_but_the_logits_and_with_chunks_not_even_those():
    rows, prototypes, width = 900, 500, 8
    student, teacher, ours, theirs = (
        F.normalize(torch.randn(count, width, generator=GENERATOR)) for count in (rows, rows, prototypes, prototypes)
    )
    index = torch.arange(rows).flip(0)
    student.requires_grad_()
    ours.requires_grad_()
    with Sizes() as with_logits:
        labels = teacher @ theirs.T
        logv = sinkhorn_bias(labels)
        loss = prototype_cross_entropy(
            student @ ours.T, labels, logv, index, overwrite=True, expected_gradient=1 / rows
        ).mean()  # fmt: skip
        whole = torch.autograd.grad(loss, (student, ours))
    assert sum(size >= rows * prototypes for size in with_logits.made) == 2
    with Sizes() as in_chunks:
        logv = sinkhorn_bias_from_features(teacher, theirs, prototypes_chunk=100)
        loss = prototype_cross_entropy_from_features(
            student, ours, teacher, theirs, logv, index, prototypes_chunk=100
        )  # fmt: skip
        parts = torch.autograd.grad(loss, (student, ours))
    assert max(in_chunks.made) == 100 * prototypes
    torch.testing.assert_close(parts, whole)
