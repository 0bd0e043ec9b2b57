"""Bad samples: each is counted once, and so is each that was tried, by any supported NumPy."""

import numpy as np
import pytest
from PIL import Image

from fastpmae_loaders import ImageFolder, mae_view
from fastpmae_loaders.bad_samples import FEW, BadSamples
from fastpmae_loaders.engines.base import Source, make_job
from fastpmae_loaders.errors import UserError

COUNT = 200


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageFolder:
    folder = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        Image.new("RGB", (4, 4)).save(folder / f"{number:03}.png")
    return ImageFolder(folder)


@pytest.mark.parametrize("fraction", [0.05, 0.14, 1.0])
def test_the_share_is_that_of_different_samples(images, fraction, monkeypatch):
    monkeypatch.delattr(np, "bitwise_count", raising=False)  # NumPy 1.26 has none
    rng, source = np.random.default_rng(3), Source(images, (mae_view(16),), 0)
    broken = set(rng.choice(COUNT, 30, replace=False).tolist())
    bad = BadSamples(images, COUNT, fraction, source.after)
    tried, failed = set(), set()
    for _ in range(60):
        job = make_job(rng.integers(0, COUNT, 16), 0, source)
        tried.update(job.indices.tolist())
        for row, index in enumerate(job.indices.tolist()):
            while index in broken:
                failed.add(index)
                index = (index + 1) % COUNT
            job.rows.index[row] = index
            tried.add(index)
        tried |= failed
        if len(failed) >= FEW and len(failed) > fraction * len(tried):
            with pytest.raises(UserError, match=f"{len(failed)} of {len(tried)} samples do not decode"):
                bad.account(job)
            return
        bad.account(job)
        assert set(bad.failed) == failed
    assert fraction == 1.0
