"""The DALI engine behind the loaders: the same draws as the others, any samples, broken images, threads and memory."""

import contextlib
import gc
import io
import sys
import tarfile
import threading
import types
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastpmae_loaders import (
    Beton,
    DaliSettings,
    PairedViews,
    PlainViews,
    UserError,
    ViewSettings,
    dino_global,
    dino_local,
    engines,
    mae_view,
    plain_view,
)
from fastpmae_loaders.engines.base import ATTEMPTS, Source, make_job
from fastpmae_loaders.folders import ImageFolder
from fastpmae_loaders.native.coefficients import pack_jpeg, unpack_pixels
from tests.loaders.conftest import jpeg
from tests.loaders.files import made_pixels, write_beton
from tests.loaders.native.jpegs import encoded
from tests.made import SHARED_DATA, made_image

pytest.importorskip("nvidia.nvimgcodec", reason="NVIDIA DALI is not installed (the extra dali-cuda130)")
pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (the extra dali-cuda130)")

from fastpmae_loaders.engines import dali_engine, dali_pipeline

SETTINGS = ViewSettings(image_size=32, patch_size=8, folds=5)
DRAWN = ("visible", "folds", "label", "index", "boxes", "flips", "factors", "choices", "source_size")
MANY = (mae_view(32), dino_global("t1", 48), dino_local(24), plain_view(40), mae_view(28, interpolation="bilinear"))


def loader(samples, batch_size=5, engine="dali", **options) -> PairedViews:
    options.setdefault("settings", SETTINGS)
    return PairedViews(samples, batch_size, engine=engine, **options)


def shown(samples, engine="dali", epoch=0, **options):
    """The whole of some samples in their order, as one row for each, and the samples that failed."""
    options = {"batch_size": 64, "shuffle": False, "drop_last": False, "bad_fraction": 1.0} | options
    with loader(samples, engine=engine, **options) as views:
        views.set_epoch(epoch)
        batches = list(views)
        count = len(batches[0].views)
        pictures = [torch.cat([batch.views[i] for batch in batches]) for i in range(count)]
        return pictures, {name: torch.cat([getattr(b, name) for b in batches]) for name in DRAWN}, views.failed


def assert_alike(ours, reference, mean=0.5) -> None:
    """The same draws, samples and failures; pictures that differ by the resize alone."""
    assert ours[2] == reference[2]
    for name in DRAWN:
        assert torch.equal(ours[1][name], reference[1][name]), name
    for a, b in zip(ours[0], reference[0], strict=True):
        assert a.shape == b.shape
        assert a.dtype == torch.uint8
        away = (a.int() - b.int()).abs().double()
        assert away.mean() < mean
        # picture by picture: none is another's
        assert (away.mean((1, 2, 3)) < 4).all()


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastpmae-loader")]


@pytest.mark.slow
def test_the_pair_is_that_of_the_other_engines(mixed):
    """JPEGs and raw pixels in one batch."""
    assert_alike(shown(mixed, seed=3, epoch=2), shown(mixed, "torch", seed=3, epoch=2))


def test_coefficients_are_the_pixels_that_they_stand_for(tmp_path):
    """Decoded by our own reader, they come to DALI as raw pixels do; one that is damaged fails."""
    width, height, codes = 61, 47, []
    for number in range(6):
        code = pack_jpeg(encoded(made_image(number, width, height), (0, 1, 2, "gray")[number % 4], 85), height, width)
        assert code is not None
        codes.append(code)
    pixels = [found for code in codes if (found := unpack_pixels(code, height, width)) is not None]
    codes[4] = codes[4][:-20]
    coded = write_beton(tmp_path / "coded.beton", codes, 6 * [(width, height)])
    pixels[4] = pixels[5]
    raw = write_beton(tmp_path / "raw.beton", pixels)
    ours, reference = shown(coded, batch_size=6), shown(raw, batch_size=6)
    assert ours[2] == [4]
    whole = [0, 1, 2, 3, 5]
    for a, b in zip(ours[0], reference[0], strict=True):
        assert torch.equal(a[whole], b[whole])


def test_any_list_of_views(mixed):
    assert_alike(shown(mixed, views=MANY), shown(mixed, "torch", views=MANY))


def test_colours_left_for_the_device(mixed):
    seen = []

    def note(images, factors, choices, threshold):
        seen.append(images.clone())
        return 255 - images

    ours = shown(mixed, augment_on="device", colour=note)
    assert torch.equal(ours[0][1], 255 - torch.cat(seen))
    geometry = shown(mixed, "torch", augment_on="device", colour=lambda images, *_: 255 - images)
    assert_alike(ours, geometry)


def test_the_same_bits_at_any_threads_and_batch_size(mixed):
    expected = shown(mixed, batch_size=23, workers=1)
    for batch_size, workers in ((23, 2), (7, 3), (1, 1)):
        again = shown(mixed, batch_size=batch_size, workers=workers, dali=DaliSettings(part=4))
        assert all(torch.equal(a, b) for a, b in zip(again[0], expected[0], strict=True))
        assert all(torch.equal(again[1][name], expected[1][name]) for name in DRAWN)


def test_a_position_is_taken_up_again(mixed):
    with loader(mixed, 4, seed=1) as views:
        whole = list(views)
        views.set_epoch(1)
        iteration = iter(views)
        for _ in range(2):
            next(iteration)
        rest = views.state_dict()
        expected = list(iteration)
    with loader(mixed, 4, seed=1) as views:
        views.load_state_dict(rest)
        found = list(views)
    assert len(whole) == 5
    assert [b.index.tolist() for b in found] == [b.index.tolist() for b in expected]
    assert all(torch.equal(a.complex, b.complex) for a, b in zip(found, expected, strict=True))


def test_broken_images_are_replaced_as_by_the_other_engines(broken, capfd):
    ours = shown(broken)
    assert ours[2] == [5, 6, 7, 399]
    assert_alike(ours, shown(broken, "torch"))
    assert ours[1]["index"][[4, 5, 6, 7, 8, 399]].tolist() == [4, 8, 8, 8, 8, 0]


def test_a_broken_image_that_only_decoding_finds(broken, monkeypatch, capfd):
    """Cut in its data: DALI gives up all that it was given with it, and what was under way is made again."""
    # as if its end were there
    for asked in ("_has_end", "segments_belong"):
        monkeypatch.setattr(dali_engine, asked, lambda payload: True)
    made = []
    make = dali_engine.DALIEngine._make_pipeline
    monkeypatch.setattr(dali_engine.DALIEngine, "_make_pipeline", lambda self: made.append(0) or make(self))
    beton = Beton(broken)
    with loader(beton, 16, shuffle=False, bad_fraction=1.0, dali=DaliSettings(part=4)) as views:
        for epoch in range(2):
            views.set_epoch(epoch)
            batch = next(iter(views))
            assert batch.index.tolist() == [0, 1, 2, 3, 4, 8, 8, 8, *range(8, 16)]
            # once known, a sample is never given to DALI again
            assert len(made) == 2
            with loader(beton, 16, "torch", shuffle=False, bad_fraction=1.0) as others:
                others.set_epoch(epoch)
                other = next(iter(others))
            assert torch.equal(batch.boxes, other.boxes)
            assert (batch.complex.int() - other.complex.int()).abs().double().mean() < 0.5


class Unwilling:
    """A pipeline that fails at its first batch of encoded images, without a reason that Pillow could find."""

    def __init__(self, pipeline):
        self._pipeline = pipeline

    def __getattr__(self, name):
        return getattr(self._pipeline, name)

    def feed_input(self, name, data):
        if name == "raw":
            self._encoded = not data.all()
        self._pipeline.feed_input(name, data)

    def share_outputs(self, **options):
        if self._encoded:
            raise RuntimeError("made up")
        return self._pipeline.share_outputs(**options)


def test_what_dali_refuses_and_pillow_takes_is_decoded_by_pillow(mixed, monkeypatch):
    expected = shown(mixed)
    make = dali_engine.DALIEngine._make_pipeline
    monkeypatch.setattr(dali_engine.DALIEngine, "_make_pipeline", lambda self: Unwilling(make(self)))
    found = shown(mixed)
    assert found[2] == []
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))


@pytest.mark.parametrize("part", [1, 4])
def test_what_pillow_refuses_is_bad_to_dali_too(tmp_path, part, capfd):
    """Markers where a scan's data should be, and junk in the header: DALI shows such a picture as far as it goes.

    One after the other, so that DALI fails at one part while the engine gives it the next.
    """
    rng = np.random.default_rng(4)
    images = []
    for number in range(60):
        file = io.BytesIO()
        made_image(number, 96, 80).save(file, "JPEG", progressive=number % 2 == 0)
        data = bytearray(file.getvalue())
        if number % 3:
            at = int(rng.integers(700, len(data) - 8))
            data[at : at + 2] = bytes((0xFF, int(rng.choice([0x63, 0x90, 0xC4, 0xC8, 0xD8, 0xDC, 0xEF, 0x02]))))
        if number % 7 == 3:  # between two segments of the header, where libjpeg passes over it
            data[2:2] = bytes((1, 2, 0xFF, 0x63, 3))
        images.append(bytes(data))
    file = write_beton(tmp_path / "markers.beton", images, [(96, 80)] * 60)
    *_, failed = shown(file, dali=DaliSettings(part=part))
    *_, expected = shown(file, "torch")
    capfd.readouterr()  # DALI's decoder complains there
    assert failed == expected
    assert 20 < len(set(expected)) < 60


def test_an_error_that_no_image_explains_reaches_the_caller(mixed, monkeypatch):
    def fail(self):
        raise RuntimeError("no memory")

    monkeypatch.setattr(dali_engine.DALIEngine, "_make_pipeline", fail)
    with loader(mixed) as views, pytest.raises(RuntimeError, match="no memory"):
        next(iter(views))
    assert loader_threads() == []


def test_too_many_broken_images_in_a_row_end_the_iteration(tmp_path):
    images = [jpeg(number, 40, 30)[:200] for number in range(ATTEMPTS + 10)] + [jpeg(1, 40, 30)]
    path = write_beton(tmp_path / "bad.beton", images, [(40, 30)] * len(images))
    with (
        loader(path, 2, shuffle=False, bad_fraction=1.0) as views,
        pytest.raises(UserError, match="64 samples in a row"),
    ):
        next(iter(views))


def test_a_size_that_lies_is_not_believed(tmp_path):
    """The record's size is not the JPEG's, in either direction: as broken as for the others."""
    images = [jpeg(number, 40, 30) for number in range(6)]
    sizes = [(40, 30), (400, 300), (40, 30), (4, 3), (30, 40), (40, 30)]
    path = write_beton(tmp_path / "lies.beton", images, sizes)
    ours = shown(path)
    assert ours[2] == [1, 3, 4]
    assert_alike(ours, shown(path, "torch"))


def test_a_folder_of_every_kind_of_file(tmp_path):
    image = made_image(0, 60, 44)
    for number, mode in enumerate(("RGB", "L", "CMYK")):
        image.convert(mode).save(tmp_path / f"{number}.jpg", quality=90)
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "3.jpg", exif=turned)
    image.save(tmp_path / "4.jpg", progressive=True)
    image.save(tmp_path / "5.jpg", keep_rgb=True)
    image.convert("RGBA").save(tmp_path / "6.png")
    image.convert("P").save(tmp_path / "7.png")
    image.save(tmp_path / "8.webp", lossless=True)
    (tmp_path / "9.jpg").write_bytes(jpeg(1, 60, 44)[:1500])
    ours = shown(tmp_path, views=MANY)
    assert ours[1]["source_size"][3].tolist() == [60, 44]
    assert ours[2] == [9]
    assert_alike(ours, shown(tmp_path, "torch", views=MANY))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Pillow's, about these files: as errors they would make a sample broken
def test_odd_images(tmp_path):
    """Nearly five hundred hard files, most of which DALI cannot be given as they are."""
    archive = SHARED_DATA / "odd_images.tar"
    if not archive.exists():
        pytest.skip(f"{archive} is not here")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    samples = ImageFolder(tmp_path, flat=True)
    assert_alike(shown(samples), shown(samples, "torch"))


def test_a_file_that_goes_away_is_passed_over(tmp_path):
    for number in range(4):
        made_image(number, 40, 30).save(tmp_path / f"{number}.jpg")
    samples = ImageFolder(tmp_path, flat=True)
    (tmp_path / "2.jpg").unlink()
    ours = shown(samples)
    assert ours[2] == [2]
    assert ours[1]["index"].tolist() == [0, 1, 3, 3]


def test_evaluation_views(mixed):
    found = {}
    for engine in ("dali", "torch"):
        with PlainViews(mixed, 8, image_size=40, engine=engine) as views:
            found[engine] = [torch.cat(parts) for parts in zip(*views, strict=True)]
    images, *rest = found["dali"]
    expected, *others = found["torch"]
    assert all(torch.equal(a, b) for a, b in zip(rest, others, strict=True))
    assert (images.int() - expected.int()).abs().double().mean() < 0.5


@pytest.mark.slow
def test_two_iterations_at_once_and_an_early_end(mixed):
    with loader(mixed, 4, seed=2) as views:
        expected = [batch.index.tolist() for batch in views]
        views.set_epoch(0)
        first = iter(views)
        second = iter(views)
        for _ in range(3):
            assert torch.equal(next(first).complex, next(second).complex)
        first.close()
        del second
        gc.collect()
        assert loader_threads() == []
        views.close()
        # a loader that was closed begins anew, and each iteration at the epoch's beginning
        assert [batch.index.tolist() for batch in views] == expected
    assert loader_threads() == []


def test_an_empty_batch(tmp_path):
    path = write_beton(tmp_path / "one.beton", [made_pixels(0, 20, 30)])
    with loader(path, 1, world_size=2, drop_last=False) as views:
        assert [len(batch) for batch in views] == [0]


def test_torch_keeps_its_threads(mixed):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with loader(mixed, workers=3) as views:
            next(iter(views))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("module", ["nvidia.nvimgcodec", "fastpmae_loaders.engines.dali_pipeline"])
def test_without_the_package_one_sentence_names_the_extra(mixed, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr(engines, "dali_pipeline", raising=False)
    with pytest.raises(UserError, match=r"pip install 'fastpmae-loaders\[dali-cuda130\]'"):
        loader(mixed)


def test_a_cut_image_is_not_given_to_dali(broken):
    """A decoder on a GPU may fill up what is missing and say nothing."""
    beton = Beton(broken)
    whole = {int(i) for i in range(len(beton)) if dali_engine._is_plain(beton.payload(i), 30, 40)}
    assert whole == set(range(400)) - {5, 6, 7, 399}
    padded = np.concatenate([beton.payload(0), np.zeros(40, np.uint8)])
    assert dali_engine._is_plain(padded, 30, 40)


def test_a_gpu_is_named_by_its_number():
    assert dali_engine._cuda_device(None) is None
    assert dali_engine._cuda_device(torch.device("cpu")) is None
    assert dali_engine._cuda_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.4, 1.0])
def test_samples_for_the_hardware_are_chosen_by_their_number(share):
    numbers = np.arange(-1, 5000)
    chosen = dali_engine.chosen_for_hardware(numbers, share)
    assert chosen.dtype == np.bool_
    order = np.random.default_rng(0).permutation(len(numbers))
    assert np.array_equal(dali_engine.chosen_for_hardware(numbers[order], share), chosen[order])
    # the share is kept within any stretch
    within = np.convolve(chosen, np.ones(100), "valid")
    assert abs(within - 100 * share).max() <= 2


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.4, 1.0])
def test_the_graph_that_shares_decoders_gives_every_sample_its_views(mixed, broken, monkeypatch, capfd, load):
    """On the CPU both decoders are one, so that all pixels must be those of the graph without."""
    expected, replaced = shown(mixed), shown(broken)
    settled = []
    start, settle = dali_engine.DALIEngine.__init__, dali_engine.DALIEngine._settle

    def started(engine, source):
        start(engine, source)
        engine._by_hardware = True

    def noted(engine, pipeline):
        settled.append(pipeline)
        settle(engine, pipeline)

    monkeypatch.setattr(dali_pipeline, "shares_decoders", lambda device, load: 0 < load < 1)
    monkeypatch.setattr(dali_engine.DALIEngine, "__init__", started)
    monkeypatch.setattr(dali_engine.DALIEngine, "_settle", noted)
    monkeypatch.setattr(dali_engine.DALIEngine, "_mark", lambda engine: types.SimpleNamespace(synchronize=lambda: None))
    for samples, reference in ((mixed, expected), (broken, replaced)):
        again = shown(samples, dali=DaliSettings(5, load))
        assert again[2] == reference[2]
        assert all(torch.equal(a, b) for a, b in zip(again[0], reference[0], strict=True))
    assert len(settled) == 2


class Recorded:
    """CUDA's streams and events, a DALI pipeline and its outputs, which note in which order they are asked for what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.log: list[tuple] = []
        self.at_once = 0
        self.fed: dict[str, Any] = {}
        self.waiting: list[int] = []
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking: RecordedEvent(self))
        monkeypatch.setattr(dali_engine, "_cuda_device", lambda device: torch.device("cpu"))
        monkeypatch.setattr(dali_engine.DALIEngine, "_make_pipeline", lambda engine: self)

    cuda_stream = 0

    def feed_input(self, name, values):
        self.fed[name] = values

    def schedule_run(self):
        self.waiting.append(len(self.fed["data"]))
        self.at_once = max(self.at_once, len(self.waiting))
        self.log.append(("run", len(self.fed["data"])))

    def share_outputs(self, cuda_stream):
        assert cuda_stream is self
        self.waiting.pop(0)
        return [self] * len(SETTINGS.views)

    def copy_to_external(self, target, stream, non_blocking):
        assert non_blocking
        self.log.append(("copy",))

    def release_outputs(self):
        self.log.append(("release",))


class RecordedEvent:
    def __init__(self, machine: Recorded):
        self.machine = machine
        self.number = sum(entry[0] == "record" for entry in machine.log)

    def record(self, stream):
        self.machine.log.append(("record", self.number))

    def synchronize(self):
        self.machine.log.append(("synchronize", self.number))


def filled(samples, counts: list[int], dali: DaliSettings) -> tuple[dali_engine.DALIEngine, list]:
    """An engine that has filled jobs of so many rows, and the jobs."""
    beton = Beton(samples)
    source = Source(beton, SETTINGS.views, 0, SETTINGS.patches, SETTINGS.visible, made_on_device=True, dali=dali)
    engine = dali_engine.DALIEngine(source)
    jobs = [make_job(np.arange(count) % len(beton), 0, source) for count in counts]
    for job, count in zip(jobs, counts, strict=True):
        assert engine.fill(job, source.scratch()) == count
    return engine, jobs


@pytest.mark.untyped
def test_on_a_gpu_two_parts_are_under_way_and_only_the_job_before_the_last_is_waited_for(mixed, monkeypatch):
    machine = Recorded(monkeypatch)
    _, jobs = filled(mixed, [20, 20, 20, 20], DaliSettings(part=7))
    assert machine.at_once == 2
    assert [entry for entry in machine.log if entry[0] == "run"] == [("run", 7), ("run", 7), ("run", 6)] * 4
    # a job's event comes behind its last copy, and of three jobs the first is waited for
    kinds = [entry for entry in machine.log if entry[0] in ("record", "synchronize")]
    assert kinds == [
        ("record", 0), ("record", 1), ("synchronize", 0), ("record", 2), ("synchronize", 1), ("record", 3),
    ]  # fmt: skip
    assert machine.log.index(("record", 0)) == 3 * 4
    assert [job.ready.number for job in jobs] == [0, 1, 2, 3]
    assert all([view.shape for view in job.views] == [(20, 3, 32, 32)] * 2 for job in jobs)
    assert "hardware" not in machine.fed


@pytest.mark.parametrize("load", [0.4, 1.0])
@pytest.mark.untyped
def test_with_decoders_in_hardware_a_part_begins_when_the_one_before_is_done(mixed, monkeypatch, load):
    machine = Recorded(monkeypatch)
    filled(mixed, [20, 9], DaliSettings(7, load))
    assert machine.at_once == 1
    runs = [entry for entry in machine.log if entry[0] in ("run", "synchronize")]
    # every part's own event, and nothing is left to wait for at the next job
    assert [entry[0] for entry in runs] == ["run", "synchronize"] * 5
    assert ("hardware" in machine.fed) == (load < 1)


def test_a_job_of_no_rows_is_made_nowhere(mixed, monkeypatch):
    machine = Recorded(monkeypatch)
    _, (job,) = filled(mixed, [0], DaliSettings())
    assert machine.log == []
    assert job.ready is None
    assert [view.shape for view in job.views] == [(0, 3, 32, 32)] * 2


@pytest.mark.untyped
def test_who_takes_a_job_lets_its_own_stream_wait(mixed, monkeypatch):
    Recorded(monkeypatch)
    _, (job,) = filled(mixed, [5], DaliSettings())
    waited, kept = [], []
    stream = types.SimpleNamespace(wait_event=waited.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda view, stream: kept.append((view, stream)))
    job.wait()
    assert waited == [job.ready]
    assert [view for view, _ in kept] == job.views
    assert all(by is stream for _, by in kept)


def test_host_memory_is_not_spent_on_views_that_are_made_on_the_device(mixed, monkeypatch):
    monkeypatch.setattr(dali_engine, "_cuda_device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for engine, device, there in (
        ("dali", "cuda", True),
        ("dali", "cpu", False),
        ("dali", None, False),
        ("torch", "cuda", False),
    ):
        with loader(mixed, engine=engine, device=device, pin_memory=False) as views:
            assert views._source.made_on_device == there
            assert len(make_job(np.arange(3), 0, views._source).views) == (0 if there else 2)


def test_a_forked_process_is_told_to_open_its_own_loader(mixed):
    """DALI's threads, and perhaps the lock in the hand of one of ours, stayed in the parent."""
    with loader(mixed) as views:
        next(iter(views))
        engine = views._runner._engine
        assert isinstance(engine, dali_engine.DALIEngine)
        with engine._lock:  # as a thread of the parent held it
            engine._process -= 1
            with pytest.raises(UserError, match="open a loader of its own"):
                next(iter(views))
            engine.close()
            engine._process += 1
