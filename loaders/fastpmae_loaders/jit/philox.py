"""Counter-based random numbers: philox4x32-10.

Every draw is a pure function of (seed, epoch, sample index, purpose, block), so no draw depends on which
thread, rank or engine asks for it, nor on what was drawn before it.

Source of the generator: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011). The tests hold it to the authors' published known-answer vectors.
"""

from typing import Final

import numpy as np

from fastpmae_loaders.jit.compiled import helper, kernel

# Numba turns a mix of signed and unsigned 64-bit integers into floats, so every constant here is uint64.
_WORD: Final = np.uint64(0xFFFFFFFF)
_HALF: Final = np.uint64(32)
_MULTIPLIER_0: Final = np.uint64(0xD2511F53)
_MULTIPLIER_1: Final = np.uint64(0xCD9E8D57)
_WEYL_0: Final = np.uint64(0x9E3779B9)
_WEYL_1: Final = np.uint64(0xBB67AE85)
_ELEVEN: Final = np.uint64(11)
_ULP: Final = 2.0**-53


@kernel
def philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds of philox4x32 on a counter of four words and a key of two (uint64s below 2^32): four words."""
    for _ in range(10):
        p0 = _MULTIPLIER_0 * c0
        p1 = _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _WORD, (p0 >> _HALF) ^ c3 ^ k1, p0 & _WORD
        k0 = (k0 + _WEYL_0) & _WORD
        k1 = (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


@helper
def words(seed, epoch, index, purpose, block):
    """Four 32-bit words (as uint64) of one block of one purpose of one sample in one epoch."""
    key = np.uint64(seed)
    return philox(
        np.uint64(block) & _WORD,
        np.uint64(purpose) & _WORD,
        np.uint64(index) & _WORD,
        np.uint64(epoch) & _WORD,
        key & _WORD,
        key >> _HALF,
    )


@helper
def uniform_pair(seed, epoch, index, purpose, block):
    """Two independent float64 numbers in [0, 1), 53 random bits each."""
    w0, w1, w2, w3 = words(seed, epoch, index, purpose, block)
    first = np.float64(((w0 << _HALF) | w1) >> _ELEVEN) * _ULP
    second = np.float64(((w2 << _HALF) | w3) >> _ELEVEN) * _ULP
    return first, second


@kernel
def fill_uniforms(seed, epoch, index, purpose, out):
    """Fill `out` float32 [B, count] with numbers in [0, 1), row i for sample `index[i]`."""
    for row in range(out.shape[0]):
        for block in range((out.shape[1] + 3) // 4):
            drawn = words(seed, epoch, index[row], purpose, block)
            for lane in range(4):
                column = 4 * block + lane
                if column < out.shape[1]:
                    # 24 bits: every such number is a float32, so none rounds up to 1
                    out[row, column] = np.float32(drawn[lane] >> np.uint64(8)) * np.float32(2.0**-24)
