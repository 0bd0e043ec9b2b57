"""The reference operations: Sinkhorn, the nearest patch, the prototype cross-entropy."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fastpmae_kernels import nearest_patch_ref, prototype_cross_entropy_ref, sinkhorn_bias_ref, sinkhorn_ref
from fastpmae_kernels.match import Metric, Scope
from tests import reference


def scores(rows: int, prototypes: int, seed: int = 0, spread: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, prototypes, generator=generator, dtype=torch.float64) * spread).clamp(-1, 1)


SHAPES = [(24, 10), (3, 50), (50, 3), (1, 7), (7, 1), (1, 1), (97, 31)]


@pytest.mark.parametrize(("rows", "prototypes"), SHAPES)
@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_sinkhorn_is_the_textbooks(rows: int, prototypes: int, iterations: int) -> None:
    logits = scores(rows, prototypes)
    truth = reference.sinkhorn(logits, 0.05, iterations)
    torch.testing.assert_close(sinkhorn_ref(logits, 0.05, iterations), truth, rtol=1e-10, atol=1e-14)
    single = sinkhorn_ref(logits.float(), 0.05, iterations)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), truth, rtol=2e-4, atol=1e-8)


@pytest.mark.parametrize("epsilon", [0.02, 0.05, 0.5, 3.0])
def test_sinkhorns_epsilon(epsilon: float) -> None:
    logits = scores(24, 10)
    truth = reference.sinkhorn(logits, epsilon, 3)
    torch.testing.assert_close(sinkhorn_ref(logits, epsilon, 3), truth, rtol=1e-10, atol=1e-14)


def test_the_defaults_are_the_papers_companions() -> None:
    logits = scores(24, 10)
    torch.testing.assert_close(sinkhorn_ref(logits), reference.sinkhorn(logits, 0.05, 3), rtol=1e-10, atol=1e-14)


def test_labels_are_the_softmax_with_the_bias() -> None:
    logits = scores(24, 10)
    bias = sinkhorn_bias_ref(logits, 0.05, 3)
    assert bias.shape == (10,)
    assert bias.dtype == torch.float64
    assert sinkhorn_bias_ref(logits.float(), 0.05, 3).dtype == torch.float32
    assert sinkhorn_bias_ref(logits.half(), 0.05, 3).dtype == torch.float32
    labels = torch.stack([reference.softmax(row / 0.05 + bias) for row in logits])
    torch.testing.assert_close(sinkhorn_ref(logits, 0.05, 3), labels, rtol=1e-10, atol=1e-14)


def test_marginals() -> None:
    """Every row sums to 1 after any number of iterations; prototypes share the rows evenly after many."""
    logits = scores(60, 12, spread=0.1)
    for iterations in (1, 3, 300):
        labels = sinkhorn_ref(logits, 0.05, iterations)
        torch.testing.assert_close(labels.sum(1), torch.ones(60, dtype=torch.float64), rtol=1e-13, atol=0)
    assert not torch.allclose(sinkhorn_ref(logits, 0.05, 1).sum(0), torch.full((12,), 5.0).double(), rtol=1e-6)
    torch.testing.assert_close(labels.sum(0), torch.full((12,), 5.0).double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randint(0, 3, (40, 9), generator=generator) - 1).to(dtype) * 1e4
    for rows in (logits, torch.full((4, 9), 1e4, dtype=dtype), torch.full((4, 9), -1e4, dtype=dtype)):
        labels = sinkhorn_ref(rows, 0.05, 3)
        assert labels.isfinite().all()
        torch.testing.assert_close(labels.sum(1), torch.ones(len(rows), dtype=dtype), rtol=1e-5, atol=0)
    torch.testing.assert_close(labels, torch.full((4, 9), 1 / 9, dtype=dtype), rtol=1e-5, atol=0)


def test_a_dead_prototype_is_fed() -> None:
    """One prototype 1e4 below all others, as collapse leaves it: its column still gets its share of the rows."""
    logits = scores(40, 8, spread=0.05)
    logits[:, 3] -= 1e4
    labels = sinkhorn_ref(logits, 0.05, 100)
    assert float(labels[:, 3].sum()) == pytest.approx(5, rel=1e-4)


def test_shifts_change_nothing() -> None:
    """A number added to a whole prototype or to a whole row leaves the labels as they are."""
    logits = scores(24, 10)
    labels = sinkhorn_ref(logits, 0.05, 3)
    moved = logits + scores(1, 10, seed=1) * 3
    torch.testing.assert_close(sinkhorn_ref(moved, 0.05, 3), labels, rtol=1e-9, atol=1e-14)
    first = sinkhorn_ref(logits + 0.7, 0.05, 3)
    torch.testing.assert_close(first, labels, rtol=1e-9, atol=1e-14)


def test_one_row_and_one_prototype() -> None:
    torch.testing.assert_close(sinkhorn_ref(scores(1, 7)), torch.full((1, 7), 1 / 7).double(), rtol=1e-7, atol=0)
    torch.testing.assert_close(sinkhorn_ref(scores(7, 1)), torch.ones(7, 1).double(), rtol=0, atol=0)


def test_no_iteration_is_refused() -> None:
    with pytest.raises(ValueError, match="iteration"):
        sinkhorn_bias_ref(scores(3, 4), 0.05, 0)


def rank_with_its_rows(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    logits = torch.cat([scores(24, 10), scores(24, 10) + 300]) / 1.0
    own = logits[:7] if rank == 0 else logits[7:]
    labels = sinkhorn_ref(own, 0.05, 3, dist.group.WORLD)
    bias = sinkhorn_bias_ref(own, 0.05, 3, dist.group.WORLD)
    torch.save({"labels": labels, "bias": bias}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_uneven_rows_label_as_one(tmp_path: Path) -> None:
    mp.spawn(rank_with_its_rows, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    logits = torch.cat([scores(24, 10), scores(24, 10) + 300])
    assert torch.equal(parts[0]["bias"], parts[1]["bias"])
    labels = torch.cat([part["labels"] for part in parts])
    torch.testing.assert_close(labels, sinkhorn_ref(logits, 0.05, 3), rtol=1e-9, atol=1e-14)
    apart = torch.cat([sinkhorn_ref(part, 0.05, 3) for part in (logits[:7], logits[7:])])
    assert not torch.allclose(labels, apart, rtol=1e-3)


def tokens(seed: int, batch: int = 3, count: int = 9, dim: int = 6) -> Tensor:
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("scope", ["image", "fold"])
@pytest.mark.parametrize("fold_sizes", [(3, 3, 3), (4, 3, 2), (9,), (2, 2, 2, 2, 1)], ids=str)
def test_the_nearest_patch(metric: Metric, scope: Scope, fold_sizes: tuple[int, ...]) -> None:
    student, teacher = tokens(1), tokens(2) * torch.rand(3, 9, 1, generator=torch.Generator().manual_seed(3)) * 3
    found = nearest_patch_ref(student, teacher, metric, scope, fold_sizes)
    for i in range(3):
        truth = reference.nearest(list(student[i]), list(teacher[i]), metric, scope, fold_sizes)
        assert found[i].tolist() == truth
    assert nearest_patch_ref(student.float(), teacher.float(), metric, scope, fold_sizes).tolist() == found.tolist()


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_autocast_does_not_blur_the_match(metric: Metric) -> None:
    """A product in bf16 has 8 bits: near patches would tie, and ties go to the lowest index."""
    student, teacher = tokens(1, 2, 150, 64).float(), (tokens(2, 2, 150, 64) * 0.05 + tokens(3, 2, 1, 64)).float()
    truth = nearest_patch_ref(student, teacher, metric)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_patch_ref(student, teacher, metric), truth)


def test_cosine_and_l2_differ() -> None:
    student = torch.tensor([[[1.0, 0.0]]])
    teacher = torch.tensor([[[100.0, 1.0], [1.0, 1.0]]])
    assert nearest_patch_ref(student, teacher, "cosine").tolist() == [[0]]
    assert nearest_patch_ref(student, teacher, "l2").tolist() == [[1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_equally_near_patches_the_lowest(dtype: torch.dtype) -> None:
    """All numbers and lengths here are exact, so that ties are ties in any arithmetic."""
    student = torch.tensor([[[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 2, 0], [0, 0, 0, -4]]], dtype=dtype)
    teacher = torch.tensor(
        [
            [
                [0, 0, 0, 4],
                [0, 2, 0, 0],
                [1, 1, 1, 1],
                [2, 0, 0, 0],
                [4, 0, 0, 0],
                [0, 0, 2, 0],
                [0, 0, 8, 0],
                [2, 2, 2, 2],
            ]
        ],
        dtype=dtype,
    )
    # the last student patch is at a right angle to patches 1, 3, 4, 5 and 6, and points away from the others
    assert nearest_patch_ref(student, teacher, "cosine").tolist() == [[3, 2, 5, 1]]
    # squared distances: (17 5 3 1 9 5 65 13), (12 4 0 4 12 4 52 4), (20 8 4 8 20 0 36 8), (64 20 28 20 32 20 80 48)
    assert nearest_patch_ref(student, teacher, "l2").tolist() == [[3, 2, 5, 1]]
    folds = (2, 2)
    halves = teacher[:, [3, 4, 7, 2]]
    assert nearest_patch_ref(student, halves, "cosine", "fold", folds).tolist() == [[0, 0, 2, 2]]


def test_duplicates_go_to_the_first_of_them() -> None:
    student = tokens(1, 2, 12)
    teacher = tokens(2, 2, 3).repeat(1, 4, 1)
    for metric in ("cosine", "l2"):
        assert int(nearest_patch_ref(student, teacher, metric).max()) <= 2
        within = nearest_patch_ref(student, teacher, metric, "fold", (6, 6))
        assert int(within[:, :6].max()) <= 2
        assert set(within[:, 6:].flatten().tolist()) <= {6, 7, 8}


def test_all_patches_alike() -> None:
    same = torch.ones(1, 5, 4)
    for metric in ("cosine", "l2"):
        assert nearest_patch_ref(same, same, metric).tolist() == [[0] * 5]
        assert nearest_patch_ref(same, same, metric, "fold", (3, 2)).tolist() == [[0, 0, 0, 3, 3]]


@pytest.mark.parametrize(
    ("metric", "scope", "fold_sizes"), [("dot", "image", ()), ("cosine", "batch", ()), ("cosine", "fold", (4, 4))]
)
@pytest.mark.untyped
def test_a_match_that_cannot_be(metric: str, scope: str, fold_sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        nearest_patch_ref(tokens(1), tokens(2), metric, scope, fold_sizes)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("rows", "labels", "prototypes"), [(12, 8, 10), (1, 1, 1), (5, 9, 1), (3, 40, 33)])
@pytest.mark.parametrize(("epsilon", "temperature"), [(0.05, 0.1), (0.2, 1.0)])
def test_prototype_cross_entropy(rows: int, labels: int, prototypes: int, epsilon: float, temperature: float) -> None:
    teacher, student = scores(labels, prototypes, 1), scores(rows, prototypes, 2).requires_grad_()
    index = torch.randint(0, labels, (rows,), generator=torch.Generator().manual_seed(0))
    bias = sinkhorn_bias_ref(teacher, epsilon, 3)
    weights = torch.linspace(0.5, 2, rows, dtype=torch.float64)
    values = prototype_cross_entropy_ref(student, teacher, bias, index, epsilon, temperature)
    (gradient,) = torch.autograd.grad((values * weights).sum(), student)

    table = reference.sinkhorn(teacher, epsilon, 3)
    truth = torch.stack([reference.cross_entropy(table[index[r]], student[r], temperature) for r in range(rows)])
    (true_gradient,) = torch.autograd.grad((truth * weights).sum(), student)
    torch.testing.assert_close(values, truth, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-9, atol=1e-13)

    single = student.detach().float().requires_grad_()
    low = prototype_cross_entropy_ref(single, teacher.float(), bias.float(), index, epsilon, temperature)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), truth.detach(), rtol=1e-4, atol=1e-6)
    (low_gradient,) = torch.autograd.grad((low * weights.float()).sum(), single)
    torch.testing.assert_close(low_gradient.double(), true_gradient, rtol=1e-3, atol=1e-5)


def test_the_teachers_logits_get_no_gradient() -> None:
    teacher, student = scores(8, 10, 1).requires_grad_(), scores(12, 10, 2).requires_grad_()
    bias = sinkhorn_bias_ref(teacher.detach()).requires_grad_()
    values = prototype_cross_entropy_ref(student, teacher, bias, torch.zeros(12, dtype=torch.int64))
    values.sum().backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert bias.grad is None


def test_extreme_students_stay_finite() -> None:
    teacher = scores(8, 10, 1).float()
    student = (torch.randint(0, 2, (12, 10), generator=torch.Generator().manual_seed(0)) * 2e4 - 1e4).requires_grad_()
    values = prototype_cross_entropy_ref(student, teacher, sinkhorn_bias_ref(teacher), torch.arange(12) % 8)
    values.sum().backward()
    assert values.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_cross_entropy_with_itself_is_the_entropy() -> None:
    """Uniform labels against uniform logits: log P."""
    teacher = torch.zeros(4, 10, dtype=torch.float64)
    values = prototype_cross_entropy_ref(teacher, teacher, sinkhorn_bias_ref(teacher), torch.arange(4))
    torch.testing.assert_close(values, torch.full((4,), math.log(10), dtype=torch.float64), rtol=1e-12, atol=0)
