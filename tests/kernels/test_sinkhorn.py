"""The Sinkhorn bias against the iterations written out on the matrix, in float64."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastpmae_kernels import backend, label_bias, sinkhorn, sinkhorn_bias, sinkhorn_bias_ref, sinkhorn_biases
from tests.made import REPOSITORY

SHAPES = [(1, 1), (1, 300), (3, 5), (64, 1000), (65, 257), (700, 33), (1000, 4096)]


def made_logits(rows: int, prototypes: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, prototypes, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def assignment(logits: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Columns, then rows, divided by their sums in turn: the definition, in float64."""
    table = (logits.double() / epsilon).exp()
    for _ in range(iterations):
        table = table / table.sum(dim=0)
        table = table / table.sum(dim=1, keepdim=True)
    return table


@pytest.mark.parametrize(("rows", "prototypes"), SHAPES)
@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.1, 1), (0.2, 5)])
def test_labels_are_those_of_the_iterations(rows: int, prototypes: int, epsilon: float, iterations: int):
    logits = made_logits(rows, prototypes)
    expected = assignment(logits, epsilon, iterations)
    torch.testing.assert_close(sinkhorn(logits, epsilon, iterations).double(), expected, rtol=1e-4, atol=1e-7)
    logv = sinkhorn_bias(logits, epsilon, iterations)
    assert logv.dtype == torch.float32
    labels = torch.softmax(logits.double() / epsilon + logv.double(), dim=1)
    torch.testing.assert_close(labels, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "prototypes"), SHAPES)
def test_error_is_within_twice_that_of_plain_torch(rows: int, prototypes: int, dtype: torch.dtype):
    logits = made_logits(rows, prototypes, 1).to(dtype)
    exact = sinkhorn_bias_ref(logits.double())
    with backend.use("ref"):
        plain = sinkhorn_bias(logits)
    allowed = 2 * (plain - exact).abs().max().item() + 1e-6
    assert (sinkhorn_bias(logits) - exact).abs().max().item() <= allowed


def test_any_finite_logits_are_safe():
    logits = made_logits(50, 64) * 1e6
    logits[7] = -3e6  # a row far below the others
    bias = sinkhorn_bias(logits)
    assert bias.isfinite().all()
    torch.testing.assert_close(bias.double(), sinkhorn_bias_ref(logits.double()), rtol=1e-6, atol=20.0)


@pytest.mark.parametrize("form", [sinkhorn_bias, sinkhorn_bias_ref])
def test_a_prototype_at_minus_infinity_is_nobodys(form):
    logits = made_logits(50, 20)
    logits[:, 3] = -math.inf
    bias = form(logits)
    assert bias[3] == 0
    rest = [j for j in range(20) if j != 3]
    torch.testing.assert_close(bias[rest], form(logits[:, rest]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [sinkhorn_bias, sinkhorn_bias_ref])
def test_no_rows_give_a_bias_of_nothing(form):
    assert torch.equal(form(torch.empty(0, 7)), torch.zeros(7))


def test_nan_is_not_hidden():
    logits = made_logits(50, 20)
    logits[3, 4] = math.nan
    assert sinkhorn_bias(logits).isnan().all()


def test_strides_do_not_matter():
    logits = made_logits(130, 40)
    expected = sinkhorn_bias(logits)
    around = torch.full((133, 90), math.nan)
    around[1:131, 5:85:2] = logits
    assert torch.equal(sinkhorn_bias(around[1:131, 5:85:2]), expected)
    assert torch.equal(sinkhorn_bias(logits.T.contiguous().T), expected)


def test_the_same_bits_on_any_number_of_threads():
    logits = made_logits(1000, 300)
    threads = torch.get_num_threads()
    try:
        biases = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            biases.append(sinkhorn_bias(logits))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(biases[0], bias) for bias in biases)


def test_several_matrices_are_balanced_apart():
    some = [made_logits(40, 30), made_logits(7, 50), made_logits(200, 1)]
    for together, alone in zip(sinkhorn_biases(some), map(sinkhorn_bias, some), strict=True):
        assert torch.equal(together, alone)


def test_each_matrix_may_have_its_own_epsilon():
    some, epsilons = [made_logits(40, 30), made_logits(7, 50)], [0.05, 0.02]
    for together, matrix, epsilon in zip(sinkhorn_biases(some, epsilons), some, epsilons, strict=True):
        assert torch.equal(together, sinkhorn_bias(matrix, epsilon))
    with pytest.raises(ValueError, match="3 values of epsilon for 2 matrices"):
        sinkhorn_biases(some, [0.05] * 3)
    with pytest.raises(ValueError, match="must be positive, not 0"):
        sinkhorn_biases(some, [0.05, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_blocks_of_rows_are_one_matrix(dtype: torch.dtype):
    first, second = made_logits(90, 30).to(dtype), made_logits(41, 20).to(dtype)
    blocks = [list(first.split([50, 0, 37, 3])), second]
    for got, whole in zip(sinkhorn_biases(blocks), sinkhorn_biases([first, second]), strict=True):
        torch.testing.assert_close(got, whole, rtol=1e-5, atol=2e-5)


def test_softmax_and_centred_labels():
    logits = made_logits(40, 30)
    assert torch.equal(label_bias(logits, "softmax"), torch.zeros(30))
    center = torch.linspace(-1, 1, 30)
    before = center.clone()
    labels = torch.softmax(logits / 0.05 + label_bias(logits, "center", center=center, momentum=0.9), dim=1)
    torch.testing.assert_close(labels, torch.softmax((logits - before) / 0.05, dim=1), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(center, 0.9 * before + 0.1 * logits.mean(dim=0))
    assert torch.equal(label_bias(logits), sinkhorn_bias(logits))
    with pytest.raises(ValueError, match="running mean"):
        label_bias(logits, "center")


@pytest.mark.untyped
def test_an_unknown_kind_of_labels_is_refused():
    with pytest.raises(ValueError, match="unknown pseudo labels"):
        label_bias(made_logits(40, 30), "sharpen")  # pyright: ignore


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(3, 4), 0.05, 0), "at least one iteration"),
        ((torch.ones(3, 4), 0.0, 3), "must be positive"),
        ((torch.ones(3, 4), math.nan, 3), "must be positive"),
        ((torch.ones(3), 0.05, 3), "must be a matrix"),
    ],
)
@pytest.mark.untyped
def test_what_makes_no_sense_is_refused(arguments, words: str):
    for form in (sinkhorn_bias, sinkhorn_bias_ref):
        with pytest.raises(ValueError, match=words):
            form(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_uneven_rows_compute_what_one_process_computes(ranks: int, tmp_path: Path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.programs.sinkhorn_ranks", str(rank), str(ranks), str(tmp_path / "store")],
            cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(errors)
