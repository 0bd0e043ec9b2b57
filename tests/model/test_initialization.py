"""Initial weights: their spreads and bounds, and the same for the same generator."""

import math

import pytest
import torch
from torch import nn

from fastpmae.model.head import Head
from fastpmae.model.initialization import initialise
from fastpmae.model.vit import Decoder, Encoder, Student


def test_starting_weights() -> None:
    """MAE's: xavier-uniform products (the patch embedding as a matrix), tokens of spread .02; DINO's head: .02."""
    student = Student(Encoder(32, 8, 192, 2, 3), Decoder(32, 8, 192, 192, 128, 2, 4), Head(192, 256, 64, 512))
    initialise(student, torch.Generator().manual_seed(0))
    for name, parameter in student.named_parameters():
        weight = parameter.detach()
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        elif "token" in name or name.startswith("head."):
            assert float(weight.std()) == pytest.approx(0.02, rel=0.2), name
        else:
            rows, columns = weight.flatten(1).shape
            bound = math.sqrt(6 / (rows + columns))
            assert float(weight.abs().max()) <= bound, name
            assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03), name
    other = Head(192, 256, 64, 512, uniform_prototypes=True)
    initialise(other, torch.Generator().manual_seed(0))
    for rows in (other.class_prototypes.detach(), other.patch_prototypes.detach()):
        assert float(rows.abs().max()) <= 1 / 8  # as torch's nn.Linear(64, 512) has it: a norm of 0.58
        assert float(rows.norm(dim=1).mean()) == pytest.approx(
            nn.Linear(64, 512).weight.norm(dim=1).mean().item(), 0.02
        )
        assert float(rows.norm(dim=1).mean()) == pytest.approx(0.577, rel=0.02)
    again = Student(Encoder(32, 8, 192, 2, 3), Decoder(32, 8, 192, 192, 128, 2, 4), Head(192, 256, 64, 512))
    initialise(again, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
