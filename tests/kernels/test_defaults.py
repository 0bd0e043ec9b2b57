"""The kernels in a program that has given torch another default type and device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastpmae_kernels import nearest_patch, patch_tokens, photometric, prototype_cross_entropy, sinkhorn_bias


@contextmanager
def defaults() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_the_programs_defaults_change_nothing():
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 16, generator=draw), torch.randn(2, 6, 16, generator=draw)
    logits = torch.randn(12, 32, generator=draw)
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=draw, dtype=torch.uint8)
    ids = torch.tensor([[0, 3], [2, 1]])
    index = torch.arange(12)
    factors = torch.tensor([[1.2, 0.8, 1.1, 0.05, 1.0]] * 2, dtype=torch.float64)
    choices = torch.tensor([[0, 1, 2, 3, 1, 0, 1, 1, 0]] * 2, dtype=torch.uint8)

    def results() -> list[Tensor]:
        logv = sinkhorn_bias(logits)
        leaf = logits.clone().requires_grad_()
        loss = prototype_cross_entropy(leaf, logits, logv, index)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        changed = photometric(images, factors, choices)
        floats = photometric(images, factors, choices, dtype=torch.float32)
        return [nearest_patch(student, teacher), logv, loss, gradient, changed, floats, patch_tokens(images, ids, 8)]

    expected = results()
    with defaults():
        found = results()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
