"""The operators as torch sees them: registered soundly, compiled whole, and chosen by device or by a test."""

import hashlib
import inspect
import threading
from pathlib import Path

import pytest
import torch
from torch._inductor.utils import run_fw_bw_and_get_code

import fastpmae_kernels
from fastpmae_kernels import (
    backend,
    label_bias,
    nearest_patch,
    nearest_patch_similarity,
    patch_tokens,
    photometric,
    photometric_numbers,
    prototype_cross_entropy,
    prototype_cross_entropy_from_features,
    prototype_cross_entropy_of_product,
    prototype_cross_entropy_ref,
    sinkhorn,
    sinkhorn_bias,
    sinkhorn_bias_from_features,
    sinkhorn_biases,
)
from fastpmae_kernels.cpu import match, prototype_loss, rows, tiles
from fastpmae_kernels.cpu import patch_tokens as cpu_patch_tokens
from fastpmae_kernels.cpu import photometric as cpu_photometric
from fastpmae_kernels.cpu import sinkhorn as cpu_sinkhorn

ops = torch.ops.fastpmae
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(10, 12, generator=GENERATOR)
BIAS = torch.zeros(12)
INDEX = torch.arange(10).flip(0)
TOKENS = torch.randn(2, 6, 8, generator=GENERATOR)
IMAGES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
FACTORS = torch.tensor([[1.2, 0.8, 1.1, 0.1, 1.0]] * 2)
CHOICES = torch.tensor([[3, 1, 0, 2, 1, 0, 1, 1, 0]] * 2, dtype=torch.uint8)
CALLS = {
    "column_logsumexp": (LOGITS, 0.05),
    "assigned_sums": (LOGITS, BIAS, 0.05),
    "prototype_loss": (LOGITS, LOGITS, BIAS, INDEX, 0.05, 0.1),
    "prototype_loss_gradient": (LOGITS, LOGITS, BIAS, INDEX, 0.05, 0.1, 1.0),
    "prototype_loss_over": (LOGITS.clone(), LOGITS, BIAS, INDEX, 0.05, 0.1, 1.0),
    "scale_rows": (LOGITS.clone(), torch.linspace(0, 1, 10)),
    "nearest_patch": (TOKENS, TOKENS.flip(1), True, [4, 2]),
    "patch_tokens": (IMAGES, torch.tensor([[0, 3], [1, 2]]), 4, torch.bfloat16, [0.5] * 3, [0.5] * 3),
    "photometric": (IMAGES, FACTORS, CHOICES, 128, torch.uint8, [0.5] * 3, [0.5] * 3),
}


@pytest.mark.parametrize("name", CALLS)
def test_operator_keeps_torchs_rules(name: str):
    torch.library.opcheck(
        getattr(ops, name).default,
        CALLS[name],
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def step(student: torch.Tensor, teacher: torch.Tensor, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    logv = sinkhorn_bias(teacher)
    match = nearest_patch(student.unsqueeze(0), teacher.unsqueeze(0))[0]
    loss = prototype_cross_entropy(student * 1, teacher, logv, match, overwrite=True, expected_gradient=0.1).mean()
    return loss + patch_tokens(photometric(images, FACTORS, CHOICES), ids, 4).mean()


@pytest.mark.slow
@pytest.mark.untyped
def test_the_whole_compiles_without_a_break_and_computes_the_same():
    def run(function) -> tuple[torch.Tensor, torch.Tensor]:
        student = LOGITS.flip(1).clone().requires_grad_()
        loss = function(student, LOGITS, IMAGES, torch.tensor([[0, 3], [1, 2]]))
        loss.backward()
        assert student.grad is not None
        return loss.detach(), student.grad

    for got, expected in zip(run(torch.compile(step, fullgraph=True)), run(step), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.slow
@pytest.mark.untyped
def test_compiled_logits_are_one_matrix_that_their_gradient_is_written_over():
    """Of inductor's code: allocations of the logits' shape, and what reads them in the backward pass."""
    rows, prototypes = 300, 130
    leaves = [torch.rand(count, 24, requires_grad=True) for count in (rows, prototypes)]
    labels, bias = torch.rand(rows, prototypes), torch.zeros(prototypes)

    def loss(student: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
        student, index = torch.nn.functional.normalize(student, dim=1), torch.arange(rows)
        return prototype_cross_entropy_of_product(student, ours, labels, bias, index).mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    _, (forward, backward) = run_fw_bw_and_get_code(lambda: compiled(*leaves))
    matrix = f"(({rows}, {prototypes})"
    assert len([line for line in forward.splitlines() if "= empty_strided" in line and matrix in line]) == 1
    body = [line for line in backward.splitlines() if line.startswith("        ") and "getitem" in line]
    assert [line for line in body if "empty_strided" in line or "cpp_fused" in line or "reuse" in line] == []
    assert len([line for line in body if "extern_kernels.mm" in line]) == 2


FEATURES, PROTOTYPES = torch.randn(10, 4, generator=GENERATOR), torch.randn(12, 4, generator=GENERATOR)
PUBLIC = {
    "sinkhorn_bias": lambda x: sinkhorn_bias(x),
    "sinkhorn_biases": lambda x: sinkhorn_biases([x, x[:3]])[1],
    "sinkhorn": lambda x: sinkhorn(x),
    "label_bias": lambda x: label_bias(x, "center", center=BIAS),
    "sinkhorn_bias_from_features": lambda x: sinkhorn_bias_from_features(x[:, :4], PROTOTYPES, prototypes_chunk=3),
    "nearest_patch": lambda x: nearest_patch(x[None], LOGITS[None]),
    "nearest_patch_similarity": lambda x: nearest_patch_similarity(x[None], LOGITS[None], "l2", "fold", (6, 4))[1],
    "prototype_cross_entropy": lambda x: prototype_cross_entropy(x, x, BIAS, INDEX),
    "prototype_cross_entropy_from_features": lambda x: prototype_cross_entropy_from_features(
        x[:, :4], PROTOTYPES, FEATURES, PROTOTYPES, BIAS, INDEX, prototypes_chunk=3
    ),
    "prototype_cross_entropy_of_product": lambda x: prototype_cross_entropy_of_product(
        x[:, :4], PROTOTYPES, LOGITS, BIAS, INDEX
    ),
    "patch_tokens": lambda x: patch_tokens(IMAGES, torch.tensor([[0, 3], [1, 2]]), 4) + x.mean(),
    "photometric": lambda x: photometric(IMAGES, FACTORS, CHOICES, dtype=torch.float32) + x.mean(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.untyped
def test_each_public_function_is_traced_without_a_break(name: str):
    """As torch.compile takes it, forward and backward, without the time that its code generator needs."""
    found = []
    torch._dynamo.reset()
    for function in (torch.compile(PUBLIC[name], fullgraph=True, backend="aot_eager"), PUBLIC[name]):
        leaf = LOGITS.flip(1).clone().requires_grad_()
        BIAS.zero_()
        result = function(leaf)
        slope = torch.autograd.grad(result.sum(), leaf)[0] if result.requires_grad else leaf.new_zeros(())
        found.append((result.detach(), slope))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_every_public_function_is_traced():
    plain = {name for name in fastpmae_kernels.__all__ if name.endswith("_ref") or name == "backend"}
    assert set(PUBLIC) == set(fastpmae_kernels.__all__) - plain


@pytest.mark.parametrize("name", PUBLIC)
def test_one_switch_turns_off_all_that_a_cpu_alone_runs(name: str, monkeypatch: pytest.MonkeyPatch):
    """Nothing in `cpu/` is reached, so neither numba's code nor threads of torch's own; the numbers are the same."""
    with torch.no_grad():
        BIAS.zero_()
        expected = PUBLIC[name](LOGITS)

        def refuse(*_: object) -> None:
            raise AssertionError("a form of the CPU's own")

        for module in (match, cpu_patch_tokens, cpu_photometric, prototype_loss, cpu_sinkhorn):
            monkeypatch.setattr(module, "share_out", refuse)
        BIAS.zero_()
        with backend.use("ref"):
            torch.testing.assert_close(PUBLIC[name](LOGITS), expected)
        if name != "label_bias":  # the running mean is torch's in either form
            with pytest.raises(AssertionError, match="of the CPU's own"):
                PUBLIC[name](LOGITS)


def test_a_test_can_ask_for_the_plain_form(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastpmae_kernels.cpu.prototype_loss.cross_entropy", None)
    expected = prototype_cross_entropy_ref(LOGITS, LOGITS, BIAS, INDEX)
    with backend.use("ref"):
        assert torch.equal(prototype_cross_entropy(LOGITS, LOGITS, BIAS, INDEX), expected)
        with backend.use("device"), pytest.raises(TypeError):
            prototype_cross_entropy(LOGITS, LOGITS, BIAS, INDEX)
        assert torch.equal(prototype_cross_entropy(LOGITS, LOGITS, BIAS, INDEX), expected)
    with pytest.raises(TypeError):
        prototype_cross_entropy(LOGITS, LOGITS, BIAS, INDEX)


def test_exponential_is_right_to_two_units_in_the_last_place():
    x = torch.linspace(-86.9, 0.5, 100_001)
    got = torch.tensor([rows.exponential(value) for value in x.numpy()], dtype=torch.float64)
    assert ((got - x.double().exp()).abs() / x.double().exp()).max() < 2 * 2**-23
    assert rows.exponential(torch.tensor(-88.0).numpy()[()]) == 0
    assert rows.exponential(torch.tensor(-torch.inf).numpy()[()]) == 0
    assert rows.exponential(torch.tensor(torch.nan).numpy()[()]) != 0


@pytest.mark.parametrize("team", [True, False])
def test_a_failure_in_a_thread_reaches_the_caller_and_leaves_no_thread(team, monkeypatch):
    if not team:
        monkeypatch.setattr(rows, "_team", lambda: None)

    def work(block: int, start: int, stop: int) -> None:
        if start >= 128:
            raise MemoryError("no room")

    before = set(threading.enumerate())
    with pytest.raises(MemoryError, match="no room"):
        rows.share_out(rows.row_blocks(1000), work)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("team", [True, False])
def test_blocks_are_shared_out_once_each_over_as_many_threads_as_torch_uses(team, monkeypatch):
    """And on torch's own threads where they can be: the main thread's and one that torch then uses too."""
    if not team:
        monkeypatch.setattr(rows, "_team", lambda: None)
    before, done, threads = torch.get_num_threads(), [], set()
    both = threading.Barrier(2)

    def work(block: int, start: int, stop: int) -> None:
        if block < 2:
            both.wait(timeout=60)
        done.append((block, start, stop))
        threads.add(threading.get_ident())

    torch.set_num_threads(2)
    try:
        rows.share_out(rows.row_blocks(1000), work)
    finally:
        torch.set_num_threads(before)
    assert sorted(done) == [(i, *block) for i, block in enumerate(rows.row_blocks(1000))]
    assert len(threads) == 2


def test_kept_machine_code_goes_stale_with_any_of_its_files():
    """A block's code contains the exponential's, which stands in another file than the block."""
    files = sorted(Path(inspect.getfile(fastpmae_kernels)).parent.rglob("*.py"))
    assert {Path(inspect.getfile(module)) for module in (rows, tiles, photometric_numbers)} <= set(files)
    whole = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert prototype_loss._cross_entropy_block._cache._cache_file._source_stamp == whole
