"""Images and settings that every test may use."""

import os
import signal
from pathlib import Path

# Networks in the tests are so small that a second thread costs more than it brings, and tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what runs in the background deaf to Ctrl-C, and so would be every program that a test interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from fastpmae import PRESETS, Config, write_beton
from tests.made import write_tree


@pytest.fixture(scope="session")
def small_beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 images in 3 classes: at batch 8, five steps an epoch with four images left over."""
    folder = tmp_path_factory.mktemp("images")
    write_beton(write_tree(folder / "tree", 44), folder / "small.beton")
    return folder / "small.beton"


@pytest.fixture
def tiny(small_beton: Path, tmp_path: Path) -> Config:
    """Dual teachers on the small images: a step takes some tens of milliseconds. Uneven folds, stochastic depth on."""
    return PRESETS["demo"].using(
        beton=small_beton,
        out=tmp_path / "run",
        image_size=32,
        width=32,
        heads=2,
        depth=2,
        drop_path=0.3,
        decoder_width=32,
        decoder_depth=1,
        decoder_heads=2,
        head_hidden=32,
        head_bottleneck=16,
        prototypes=24,
        folds=5,
        epochs=3,
        batch_size=8,
        log_every=1,
        workers=1,
        device="cpu",
        tensorboard=False,
    )
