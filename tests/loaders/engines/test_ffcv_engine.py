"""FFCV's own behaviour that the engine must hold off, and what it must take from FFCV."""

# ffcv is an extra, which may be missing
# pyright: reportMissingImports=false

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastpmae_loaders import PairedViews, UserError, ViewSettings
from tests.engines import FFCV, needs_ffcv
from tests.loaders.files import made_pixels, write_beton
from tests.made import REPOSITORY

ENGINES = ["native", FFCV]


def run_python(*words: str | Path, **environment: str) -> str:
    """What a program prints that runs with warnings as errors from the first import on."""
    paths = os.pathsep.join(str(REPOSITORY / part) for part in (".", "kernels", "loaders"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", *words],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fresh_loader(case: str, *words: str | Path, **environment: str) -> str:
    return run_python("tests.programs.fresh_loader", case, *words, **environment)


@pytest.mark.slow
def test_importing_the_loaders_imports_none_of_the_rest():
    names = "PairedViews,PlainViews,Batch,ViewSettings,Beton,draw_samples"
    loaded = json.loads(run_python("tests.programs.loaded", f"fastpmae_loaders:{names}"))
    assert {"fastpmae_loaders.paired", "torch"} <= set(loaded)
    unwanted = {"fastpmae", "fastpmae_kernels", "triton", "xformers", "ffcv", "torchvision", "jaxtyping"}
    assert unwanted & set(loaded) == set()


@needs_ffcv
@pytest.mark.slow
def test_ffcv_leaves_what_was_compiled_before_it_usable(mixed):
    """FFCV's Loader would change the hash of numba's uint8[::1], and with it lose every function compiled for one."""
    said = fresh_loader("beside_ffcvs_own", mixed)
    assert int(said) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_fresh_process_keeps_its_thread_counts_warns_of_nothing_and_ends_at_once(mixed, engine):
    """With warnings as errors from the first import on.

    Then left in the middle of an epoch: no thread may hold the interpreter back, nor crash it on the way out.
    """
    fresh_loader("thread_counts+left_in_mid_epoch", mixed, engine)


def test_without_ffcv_one_sentence(mixed, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(UserError, match=r"pip install 'fastpmae-loaders\[ffcv\]'") as caught:
        PairedViews(mixed, 4, "ffcv")
    assert "\n" not in str(caught.value)


def test_a_file_of_ffcvs_own_writer(tmp_path):
    """Other field names, two image fields, a float field: the first image and the first int count."""
    fields = pytest.importorskip("ffcv.fields")
    from ffcv.writer import DatasetWriter

    class Samples:
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return float(i), made_pixels(i, 40 + i, 50), made_pixels(i + 50, 8, 8), i * 3

    kinds = {
        "weight": fields.FloatField(),
        "picture": fields.RGBImageField(write_mode="raw"),
        "thumbnail": fields.RGBImageField(write_mode="raw"),
        "kind": fields.IntField(),
    }
    threads = torch.get_num_threads()
    DatasetWriter(str(tmp_path / "stock.beton"), kinds, num_workers=1).from_indexed_dataset(Samples())
    torch.set_num_threads(threads)
    ours = write_beton(tmp_path / "ours.beton", [made_pixels(i, 40 + i, 50) for i in range(6)])
    settings = ViewSettings(image_size=32, patch_size=8)
    for engine in ("ffcv", "native"):
        with (
            PairedViews(tmp_path / "stock.beton", 6, engine, settings) as a,
            PairedViews(ours, 6, engine, settings) as b,
        ):
            first, second = next(iter(a)), next(iter(b))
        assert torch.equal(first.simple, second.simple)
        assert torch.equal(first.complex, second.complex)
        assert (first.label == first.index * 3).all()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_one_huge_image_does_not_multiply_by_the_batch(tmp_path, engine):
    """Batches of 64 beside one image of 4000 x 3000: FFCV's own decoders would allocate gigabytes."""
    import io

    from PIL import Image

    from tests.made import made_image

    def jpeg(number: int, width: int, height: int) -> bytes:
        file = io.BytesIO()
        made_image(number, width, height).save(file, "jpeg", quality=80)
        return file.getvalue()

    small = [jpeg(number, 500, 375) for number in range(8)]
    huge = jpeg(9, 4000, 3000)
    assert Image.open(io.BytesIO(huge)).size == (4000, 3000)
    images, sizes = [huge] + [small[i % 8] for i in range(255)], [(4000, 3000)] + [(500, 375)] * 255
    file = write_beton(tmp_path / "huge.beton", images, sizes, page_size=1 << 23)
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of memory is read from /proc")
    peak = fresh_loader("peak_of_memory", file, engine)
    assert int(peak) * 1024 < 1.2e9


@pytest.mark.parametrize("engine", ENGINES)
def test_a_jpeg_larger_than_its_record_writes_nowhere(broken, engine):
    """Sample 7 of the file is 80 x 60 where its record, which sizes the buffer, says 40 x 30."""
    settings = ViewSettings(image_size=32, patch_size=8)
    with PairedViews(broken, 8, engine, settings=settings, shuffle=False) as views:
        assert next(iter(views)).failed == [5, 6, 7, 6, 7, 7]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_damaged_payloads_never_crash(tmp_path, engine):
    """Bytes changed, cut out and doubled all over JPEGs: each sample comes out as some picture or as failed."""
    import io

    from tests.made import made_image

    rng = np.random.default_rng(0)
    images = []
    for number in range(600):
        file = io.BytesIO()
        made_image(number % 7, 48, 40).save(file, "jpeg", progressive=number % 2 == 0)
        data = bytearray(file.getvalue())
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(2, len(data))] = rng.integers(0, 256)
        if number % 5 == 0:
            del data[rng.integers(2, len(data)) :]
        if number % 7 == 0:
            at = rng.integers(2, len(data))
            data[at:at] = data[2:at]
        images.append(bytes(data))
    file = write_beton(tmp_path / "damaged.beton", images, [(48, 40)] * 600)
    settings = ViewSettings(image_size=32, patch_size=8)
    with PairedViews(file, 50, engine, settings=settings, shuffle=False, bad_fraction=1.0, workers=3) as views:
        batches = list(views)
        assert 60 < len(views.failed) < 600
    assert sum(len(batch) for batch in batches) == 600


@pytest.mark.slow
def test_compiled_code_is_kept_where_the_user_says(tmp_path: Path):
    fresh_loader("draw", NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").rglob("*.nbi"))


@pytest.mark.slow
def test_without_a_folder_to_write_to_all_works(tmp_path: Path):
    """The package's folder, the user's cache and NUMBA_CACHE_DIR all closed: compiled anew, no error."""
    fresh_loader("draw_without_a_folder", NUMBA_CACHE_DIR=str(tmp_path / "none"))


def test_kept_code_is_bound_to_all_of_its_sources():
    """numba alone would go on using a kernel after a change of what it calls in another file."""
    from fastpmae_loaders.engines.views import draw_row
    from fastpmae_loaders.jit.compiled import _STAMP
    from fastpmae_loaders.pixels.resize import resize

    for function in (draw_row, resize):
        assert function._cache._cache_file._source_stamp == _STAMP
