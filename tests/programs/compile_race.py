"""Compiles one function for one type, while other processes do it for others: `compile_race.py PACKAGE DTYPE`."""

import sys
from typing import Any

import numpy as np

from fastpmae_kernels.cpu.compiled import compiled
from fastpmae_loaders.jit.compiled import kernel

DECORATORS: dict[str, Any] = {"loaders": kernel, "kernels": compiled()}


@DECORATORS[sys.argv[1]]
def total(values: Any) -> Any:
    return values.sum()


if __name__ == "__main__":
    assert total(np.ones(5, np.dtype(sys.argv[2]))) == 5
