"""The kernels' results on the CPU do not depend on where the memory allocator put their arrays, to the bit."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy import float32

from fastpmae_kernels import nearest_patch_similarity, prototype_cross_entropy, sinkhorn_bias
from fastpmae_kernels.cpu.prototype_loss import _cross_entropy_block, _expected
from fastpmae_kernels.cpu.sinkhorn import _exponentials, assigned_block, column_block

GAPS = (0, 4, 16, 60, 64, 128, 192, 252, 256, 320, 512, 1024)
"""Bytes between two arrays: by their distance LLVM chooses how a loop runs that reads one and writes the other."""

BUFFER = np.zeros(1 << 18, np.uint8)
ALIGNED = BUFFER[-BUFFER.ctypes.data % 4096 :]


def made(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32) * 2 - 1


def placed(arrays: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Copies of the arrays one behind the other, in every order and with every gap."""
    for gap, order in itertools.product(GAPS, itertools.permutations(range(len(arrays)))):
        copies, at = list(arrays), 64
        for number in order:
            array = arrays[number]
            copies[number] = ALIGNED[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
            copies[number][...] = array
            at += array.nbytes + gap
        yield copies


def exponentials(row: np.ndarray, bias: np.ndarray, values: np.ndarray) -> bytes:
    return float32(_exponentials(row, float32(20), bias, values)).tobytes() + values.tobytes()


def expected(label: np.ndarray, value: np.ndarray) -> bytes:
    return float32(_expected(label, value)).tobytes()


def columns(logits: np.ndarray, peak: np.ndarray, total: np.ndarray) -> bytes:
    column_block(logits, float32(20), peak, total)
    return peak.tobytes() + total.tobytes()


def assigned(logits: np.ndarray, bias: np.ndarray, sums: np.ndarray) -> bytes:
    assigned_block(logits, float32(20), bias, sums)
    return sums.tobytes()


def cross_entropy(student: np.ndarray, bias: np.ndarray, gradient: np.ndarray) -> bytes:
    loss = np.empty(len(student), np.float32)
    _cross_entropy_block(
        student, student[::-1].copy(), bias, np.arange(len(student)), float32(20), float32(10), float32(0.1), loss,
        gradient,
    )  # fmt: skip
    return loss.tobytes() + gradient.tobytes()


@pytest.mark.parametrize("prototypes", [8, 10, 16, 24, 33, 48, 64, 100])
@pytest.mark.parametrize("of", [exponentials, expected, columns, assigned, cross_entropy])
def test_a_sweeps_bits_do_not_depend_on_the_distance_of_its_arrays(of: Callable[..., bytes], prototypes: int):
    rows = 5
    arrays = {
        exponentials: [made(0, prototypes), made(1, prototypes) - 4, np.zeros(prototypes, np.float32)],
        expected: [made(0, prototypes), made(1, prototypes)],
        columns: [
            made(0, rows, prototypes),
            np.full(prototypes, -np.inf, np.float32),
            np.zeros(prototypes, np.float32),
        ],
        assigned: [made(0, rows, prototypes), made(1, prototypes), np.zeros(prototypes, np.float32)],
        cross_entropy: [made(0, rows, prototypes), made(1, prototypes), np.zeros((rows, prototypes), np.float32)],
    }[of]
    assert len({of(*copies) for copies in placed(arrays)}) == 1


@pytest.mark.slow
def test_an_operators_bits_do_not_depend_on_the_heap():
    """Each call finds the heap in another state: what it allocates itself lies elsewhere each time."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.rand(24, 16, generator=generator) * 2 - 1 for _ in range(2))
    tokens, others = (torch.randn(3, 20, 24, generator=generator) for _ in range(2))
    random, held, found = np.random.default_rng(0), [], set()
    for _ in range(300):
        held += [np.empty(int(random.choice([16, 8, 32, 3, 20, 100])), np.float32) for _ in range(random.integers(9))]
        while len(held) > 200:
            held.pop(int(random.integers(len(held))))
        logits = student.clone().requires_grad_()
        bias = sinkhorn_bias(teacher.clone(), 0.05, 3)
        loss = prototype_cross_entropy(logits, teacher, bias, torch.arange(24))
        loss.sum().backward()
        assert logits.grad is not None
        parts = [bias, loss, logits.grad, *nearest_patch_similarity(tokens.clone(), others)]
        found.add(b"".join(part.detach().numpy().tobytes() for part in parts))
    assert len(found) == 1
