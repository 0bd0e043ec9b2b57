"""A program that has put functions of its own in the place of Python's, as codebases do, and then imports ours.

`python -m tests.programs.print_replaced CASE`. A function within a function, as in MAE, DINO, iBOT and DINOv2: its
module has no such name.
"""

import builtins
import sys
from collections.abc import Callable
from typing import Any


def replace() -> None:
    builtin_print, builtin_abs = builtins.print, builtins.abs

    def print(*args: object, **kwargs: Any) -> None:
        builtin_print("theirs:", *args, **kwargs)

    def abs(number: float) -> float:
        return builtin_abs(number)

    builtins.print, builtins.abs = print, abs


def before_all() -> None:
    replace()
    from fastpmae_loaders import PairedViews  # noqa: F401
    from fastpmae_loaders.adapters import MAELoader  # noqa: F401


def after_the_package() -> None:
    import fastpmae_loaders  # noqa: F401

    replace()
    from fastpmae_loaders.adapters import MAELoader  # noqa: F401


def after_a_name() -> None:
    from fastpmae_loaders import Beton  # noqa: F401

    replace()
    from fastpmae_loaders import draw_samples  # noqa: F401


def before_masks() -> None:
    replace()
    from fastpmae_loaders.blockwise import IBOTMasks  # noqa: F401


def before_kernels() -> None:
    replace()
    from fastpmae_kernels import sinkhorn  # noqa: F401


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case for case in (before_all, after_the_package, after_a_name, before_masks, before_kernels)
}

if __name__ == "__main__":
    CASES[sys.argv[1]]()
    print("numba" in sys.modules)
