"""The nearest patch against distances written out, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpmae_kernels import nearest_patch, nearest_patch_ref, nearest_patch_similarity


def made(batch: int, count: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def similarity_of(student: Tensor, teacher: Tensor, metric: str) -> Tensor:
    student, teacher = student.double().unsqueeze(2), teacher.double().unsqueeze(1)
    if metric == "l2":
        return -(student - teacher).square().sum(dim=3)
    return torch.cosine_similarity(student, teacher, dim=3)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "masked", "patches", "dim"), [(1, 1, 1, 1), (2, 5, 7, 3), (9, 147, 147, 64), (17, 3, 40, 192)]
)
def test_the_nearest_is_chosen(batch: int, masked: int, patches: int, dim: int, dtype: torch.dtype, metric: str):
    student, teacher = made(batch, masked, dim, 0, dtype), made(batch, patches, dim, 1, dtype)
    index, similarity = nearest_patch_similarity(student, teacher, metric)  # pyright: ignore
    truth = similarity_of(student, teacher, metric)
    chosen = truth.gather(2, index.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(chosen, truth.amax(dim=2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(similarity.double(), chosen, rtol=1e-5, atol=1e-5)
    assert torch.equal(index, nearest_patch(student, teacher, metric))  # pyright: ignore


@pytest.mark.parametrize("folds", [(50, 49, 48), (147,), (100, 0, 47), (1,) * 147])
def test_within_folds(folds: tuple[int, ...]):
    student, teacher = made(3, 147, 32, 0), made(3, 147, 32, 1)
    truth = similarity_of(student, teacher, "cosine")
    start = 0
    for size in folds:
        among = truth[:, start : start + size, start : start + size]
        if size:
            expected = among.argmax(dim=2) + start
            got = nearest_patch(student, teacher, "cosine", "fold", folds)[:, start : start + size]
            assert torch.equal(got, expected)
        start += size
        if len(folds) > 3 and start > 5:
            break
    assert torch.equal(
        nearest_patch(student, teacher, "cosine", "fold", folds),
        nearest_patch_ref(student, teacher, "cosine", "fold", folds),
    )


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_of_equals_the_lowest(metric: str):
    student, teacher = made(2, 20, 16, 0), made(2, 30, 16, 1)
    teacher[:, 9] = teacher[:, 4] = teacher[:, 29] = student[:, 3]
    assert (nearest_patch(student, teacher, metric)[:, 3] == 4).all()  # pyright: ignore
    assert (nearest_patch(torch.zeros(1, 2, 4), torch.ones(1, 5, 4)) == 0).all()


def test_lengths_do_not_matter_to_the_cosine_and_a_common_scale_not_to_either():
    student, teacher = made(2, 30, 16, 0), made(2, 30, 16, 1)
    expected = nearest_patch(student, teacher)
    lengths = torch.logspace(-3, 3, 30)[None, :, None]
    assert torch.equal(nearest_patch(student * lengths, teacher * lengths.flip(1)), expected)
    assert torch.equal(nearest_patch(student * 1e-12, teacher * 1e12), expected)


def test_autocast_does_not_coarsen_the_match():
    student, teacher = made(4, 147, 64, 0), made(4, 147, 64, 1)
    expected = nearest_patch(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_patch(student, teacher), expected)


def test_no_gradient_flows_and_nothing_empty_fails():
    student, teacher = made(2, 5, 4, 0).requires_grad_(), made(2, 5, 4, 1).requires_grad_()
    index, similarity = nearest_patch_similarity(student, teacher)
    assert not similarity.requires_grad
    assert index.dtype == torch.int64
    assert nearest_patch(torch.ones(0, 5, 4), torch.ones(0, 5, 4)).shape == (0, 5)
    assert nearest_patch(torch.ones(2, 0, 4), torch.ones(2, 5, 4)).shape == (2, 0)
    assert nearest_patch(torch.ones(2, 0, 4), torch.ones(2, 0, 4)).shape == (2, 0)


def test_strides_do_not_matter():
    student, teacher = made(3, 20, 16, 0), made(3, 30, 16, 1)
    expected = nearest_patch(student, teacher)
    assert torch.equal(
        nearest_patch(student.mT.contiguous().mT, teacher.transpose(0, 1).contiguous().transpose(0, 1)), expected
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metric": "dot"}, "unknown match metric 'dot'"),
        ({"scope": "batch"}, "unknown match scope 'batch'"),
        ({"scope": "fold", "fold_sizes": (2, 2)}, "do not add up to 5 patches"),
        ({"teacher": torch.ones(2, 5, 3)}, "must both be"),
        ({"teacher": torch.ones(5, 4)}, "must both be"),
        ({"teacher": torch.ones(2, 0, 4)}, "no teacher patch"),
    ],
)
@pytest.mark.untyped
def test_what_does_not_fit_is_refused(change: dict, words: str):
    arguments: dict[str, Any] = {"student": torch.ones(2, 5, 4), "teacher": torch.ones(2, 5, 4)} | change
    for form in (nearest_patch, nearest_patch_ref):
        with pytest.raises(ValueError, match=words):
            form(**arguments)
