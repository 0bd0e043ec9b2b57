"""The figures that should give a collapse away do, on features and labels that are made to collapse."""

import math

import pytest
import torch

from fastpmae.health import health, label_entropy, spread
from fastpmae.losses import PseudoLabels, pseudo_labels
from fastpmae.step import Targets


def test_spread_of_features_that_point_anywhere():
    tokens = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)) * torch.rand(4000, 1)
    std, rank = spread(tokens)
    assert std == pytest.approx(1, abs=0.02)
    assert rank == pytest.approx(16, abs=0.2)


def test_spread_of_collapsed_features():
    one = torch.ones(100, 16)
    assert spread(one) == (pytest.approx(0, abs=1e-7), pytest.approx(1, abs=1e-6))
    line = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)).sign() * torch.randn(1, 16)
    std, rank = spread(line)
    assert rank == pytest.approx(1, abs=1e-6)
    assert std > 0.5


def test_effective_rank_counts_equal_directions():
    tokens = torch.cat([torch.eye(16)[:5], -torch.eye(16)[:5]])
    assert spread(tokens)[1] == pytest.approx(5)


def test_label_entropy_of_even_and_of_certain_labels():
    even = PseudoLabels(torch.zeros(10, 8), torch.zeros(8), 0.05)
    certain = PseudoLabels(100 * torch.eye(8), torch.zeros(8), 0.05)
    assert label_entropy(even) == pytest.approx(math.log(8))
    assert label_entropy(certain) == pytest.approx(0, abs=1e-6)


def test_sinkhorn_hides_a_collapse_that_raw_logits_show():
    """All rows alike: balanced labels look healthy, the count of prototypes in use does not."""
    logits = torch.linspace(-1, 1, 8).expand(64, 8)
    tokens = torch.ones(4, 16, 6)
    (labels,) = pseudo_labels([logits], 0.05, 3)
    figures = health(Targets(tokens, tokens, tokens, labels, labels))
    assert figures["patch_label_entropy"] == pytest.approx(math.log(8), abs=1e-3)
    assert figures["patch_prototypes_used"] == 1
    assert figures["labelling_rank"] == pytest.approx(1)
    assert figures["entropy_limit"] == pytest.approx(math.log(8))
