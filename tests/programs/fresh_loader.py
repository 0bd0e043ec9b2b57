"""The loader in a process that has done nothing else: `python -m tests.programs.fresh_loader CASE[+CASE] ...`.

Nothing is imported before a case does it: the first import of all is part of what is looked at.
"""

# ffcv is an extra, which may be missing
# pyright: reportMissingImports=false

import os
import sys
from collections.abc import Callable


def beside_ffcvs_own(beton: str) -> None:
    """What was compiled before FFCV came is found again, and FFCV's own pipelines read the file as ever."""
    import warnings

    import numba
    import numpy as np

    from fastpmae_loaders import PairedViews, ViewSettings, draw_samples

    settings = ViewSettings(image_size=32, patch_size=8)
    shared, before = numba.uint8[::1], hash(numba.uint8[::1])
    draw_samples(0, 0, np.array([5]), np.array([30]), np.array([40]), settings)
    with PairedViews(beton, 4, "ffcv", settings=settings) as views:
        next(iter(views))
    assert numba.uint8[::1] is shared
    assert shared.mutable
    assert hash(shared) == before
    warnings.simplefilter("ignore")
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader

    pipelines = {"image": [CenterCropRGBImageDecoder((8, 8), 1)]}
    print(sum(len(batch[0]) for batch in Loader(beton, 2, num_workers=1, pipelines=pipelines)))


def thread_counts(beton: str, engine: str) -> None:
    import threading

    import numba
    import torch

    torch.set_num_threads(3)
    before = numba.get_num_threads()
    from fastpmae_loaders import PairedViews, ViewSettings

    settings = ViewSettings(image_size=32, patch_size=8)
    with PairedViews(beton, 4, engine, settings) as views:
        assert torch.get_num_threads() == 3
        for _ in views:
            assert torch.get_num_threads() == 3
    assert "ffcv" not in sys.modules  # its engine calls the library it brings, and none of its Python
    assert "triton" not in sys.modules
    assert torch.get_num_threads() == 3
    assert numba.get_num_threads() == before
    assert threading.active_count() == 1


def left_in_mid_epoch(beton: str, engine: str) -> None:
    from fastpmae_loaders import PairedViews, ViewSettings

    global taken
    views = PairedViews(beton, 2, engine, ViewSettings(image_size=32, patch_size=8), workers=3)
    taken = iter(views)
    next(taken)


def peak_of_memory(beton: str, engine: str) -> None:
    """Not ru_maxrss: a child inherits that from the process that starts it, here all of pytest."""
    from pathlib import Path

    from fastpmae_loaders import PairedViews

    with PairedViews(beton, 64, engine, workers=2) as views:
        for _ in views:
            pass
    status = Path("/proc/self/status").read_text().splitlines()
    print(*[line.split()[1] for line in status if line.startswith("VmHWM")])


def draw() -> None:
    import numpy as np

    from fastpmae_loaders import uniforms

    assert uniforms(0, 0, np.arange(3), 0, 2).shape == (3, 2)


def draw_without_a_folder() -> None:
    """The package's folder, the user's cache and NUMBA_CACHE_DIR all closed."""
    import numba.core.caching as caching

    def refuse(*_: object, **__: object) -> None:
        raise OSError("read-only")

    for module, name in (
        (caching.tempfile, "TemporaryFile"),
        (caching.tempfile, "NamedTemporaryFile"),
        (os, "makedirs"),
    ):
        setattr(module, name, refuse)
    draw()


CASES: tuple[Callable[..., None], ...] = (
    beside_ffcvs_own, thread_counts, left_in_mid_epoch, peak_of_memory, draw, draw_without_a_folder,
)  # fmt: skip

if __name__ == "__main__":
    for name in sys.argv[1].split("+"):
        {case.__name__: case for case in CASES}[name](*sys.argv[2:])
