"""Sources of images with weights behind them, as a mixture of several is named."""

import math
import os
import re

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable

_WEIGHT = re.compile(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.DOTALL)
_HOST = re.compile(r"https?://[^/]*")


def split_weight(source: str) -> tuple[str, float | None]:
    """A source and the weight behind it: `a.beton:0.7` is ("a.beton", 0.7); the weight is None without a `:NUMBER`.

    What lies at a path of that whole name is meant by it, and behind a host alone stands its port.

    Raises:
        UserError: for a weight that is not above 0 or not finite.
    """
    found = _WEIGHT.fullmatch(source)
    if found is None or os.path.lexists(source) or _HOST.fullmatch(source):
        return source, None
    weight = float(found[2])
    if not 0 < weight < math.inf:
        raise UserError(f"{printable(source)}: the weight {found[2]} must be above 0 and finite")
    return found[1], weight
