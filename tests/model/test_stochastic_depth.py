"""Stochastic depth: how often, how much, and that it follows the sample alone."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpmae.pretraining.data import stochastic_depth
from tests.tiny import tiny_config


def drawn(samples: np.ndarray, epoch: int = 0, drop_path: float = 0.6, depth: int = 4, seed: int = 0) -> Tensor:
    drop_path_scale = stochastic_depth(tiny_config(drop_path=drop_path, depth=depth, seed=seed), epoch, samples)
    assert drop_path_scale is not None
    return drop_path_scale


def test_rates_grow_evenly_from_0() -> None:
    drop_path_scale = drawn(np.arange(20_000))
    assert drop_path_scale.shape == (20_000, 4, 2)
    for block, rate in enumerate((0.0, 0.2, 0.4, 0.6)):
        for branch in range(2):
            values = drop_path_scale[:, block, branch]
            kept = values[values > 0]
            torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
            assert float((values == 0).double().mean()) == pytest.approx(rate, abs=0.015)
            assert float(values.double().mean()) == pytest.approx(1, abs=0.04)


def test_branches_blocks_and_samples_are_independent() -> None:
    dropped = (drawn(np.arange(20_000), depth=5, drop_path=0.8)[:, 1:] == 0).double().flatten(1)
    assert float((torch.corrcoef(dropped.T) - torch.eye(8)).abs().max()) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([dropped[1:, 5], dropped[:-1, 5]]))[0, 1])) < 0.03


def test_only_seed_epoch_and_sample_matter() -> None:
    samples = np.arange(50)
    drop_path_scale = drawn(samples)
    assert torch.equal(drawn(samples[[7, 3]]), drop_path_scale[[7, 3]])
    assert torch.equal(drawn(samples), drop_path_scale)
    assert not torch.equal(drawn(samples, epoch=1), drop_path_scale)
    assert not torch.equal(drawn(samples, seed=1), drop_path_scale)


def test_none_where_nothing_is_dropped() -> None:
    config = tiny_config(drop_path=0.0)
    assert stochastic_depth(config, 0, np.arange(3)) is None
