"""Compiles a function of each package for one type, while other processes do it for others: `compile_race.py DTYPE`."""

import sys
from typing import Any

import numpy as np

from fastpmae_kernels.cpu.compiled import compiled
from fastpmae_loaders.jit.compiled import kernel


@kernel
def loaders_total(values: Any) -> Any:
    return values.sum()


@compiled()
def kernels_total(values: Any) -> Any:
    return values.sum()


if __name__ == "__main__":
    for total in (loaders_total, kernels_total):
        assert total(np.ones(5, np.dtype(sys.argv[1]))) == 5
