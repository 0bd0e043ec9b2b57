"""Elementary functions whose bits do not depend on the machine's maths library.

Libraries differ in the last bit of `exp`, and one bit can move a crop by a pixel. These use nothing but
additions, multiplications and comparisons, which IEEE 754 fixes.
"""

import numpy as np

from fastpmae_loaders.jit.compiled import kernel

_LOG2_E = 1.4426950408889634
_LN2_HIGH = 0.693147180369123816490
_LN2_LOW = 1.90821492927058770002e-10


@kernel
def exponential(x):
    """e^x for |x| < 700 within two units in the last place."""
    n = np.floor(x * _LOG2_E + 0.5)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    total = 1.0
    for term in range(17, 0, -1):
        total = 1.0 + total * r / term
    scale = 1.0
    step = 2.0 if n > 0 else 0.5
    for _ in range(int(abs(n))):
        scale *= step
    return total * scale


@kernel
def round_half_even(x):
    """Python's `round` of a non-negative float to an integer."""
    low = np.floor(x)
    rest = x - low
    whole = np.int64(low)
    if rest > 0.5 or (rest == 0.5 and whole % 2 == 1):
        whole += 1
    return whole
