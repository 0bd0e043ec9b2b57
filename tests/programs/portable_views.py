"""Views and colours from code without AVX2: `python -m tests.programs.portable_views NPZ`."""

import sys

import numpy as np

from fastpmae_loaders.jit import vectors
from tests.loaders.test_portable import made

if __name__ == "__main__":
    assert not vectors.AVX2
    np.savez(sys.argv[1], *made())
