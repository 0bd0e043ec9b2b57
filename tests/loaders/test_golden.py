"""The bits of views and masks, pinned: on another machine, library or thread count they must not move."""

import hashlib

import numpy as np
import pytest
import torch

from fastpmae_loaders import PairedViews, ViewSettings, epoch_order, uniforms
from tests.loaders.files import made_pixels, write_beton

GOLDEN = {
    "simple": "ca76743a201a660294416f6d",
    "complex": "c2b09c6b2772a477167ed962",
    "visible": "20ca908bc7305ab7e273697d",
    "folds": "4a4969e8daf140cfdcd73d33",
    "boxes": "9a32d958dce608b368db1f97",
    "order": "f19bfd45bede18cc4f258ca6",
    "uniforms": "ee923370b482cbd3b17a59d7",
}


def digest(*arrays: np.ndarray) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:24]


@pytest.fixture(scope="module")
def digests(tmp_path_factory):
    sizes = [(64, 64), (375, 500), (500, 333), (90, 40), (1, 7), (300, 1), (33, 90), (256, 256), (211, 307), (480, 96)]
    images = [made_pixels(number, *size) for number, size in enumerate(sizes)]
    file = write_beton(tmp_path_factory.mktemp("golden") / "golden.beton", images)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("simple", "complex", "visible", "folds", "boxes")}
    for settings in (ViewSettings(), ViewSettings(image_size=56, patch_size=8, folds=4, complex_recipe="t1")):
        with PairedViews(file, 10, settings=settings, seed=2**40 + 7) as views:
            for epoch in (0, 1, 299):
                views.set_epoch(epoch)
                (batch,) = views
                for name in ("simple", "complex", "visible", "folds"):
                    parts[name].append(getattr(batch, name).numpy())
                parts["boxes"] += [batch.simple_box.numpy(), batch.complex_box.numpy()]
                parts["boxes"] += [torch.stack([batch.simple_flip, batch.complex_flip]).numpy()]
    found = {name: digest(*arrays) for name, arrays in parts.items()}
    page_of = np.arange(1000) // 13
    found["order"] = digest(epoch_order(11, 5, 1000), epoch_order(11, 5, 1000, page_of, 8))
    found["uniforms"] = digest(uniforms(2**40 + 7, 12, np.arange(50), 3, 24))
    return found


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(digests, name):
    assert digests[name] == GOLDEN[name]
