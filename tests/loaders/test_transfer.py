"""The order of copies, events and streams on the way to a GPU that is not there."""

import gc
import weakref
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpmae_loaders import Batch, PairedViews, PlainViews, UserError, ViewSettings, mae_view
from fastpmae_loaders.transfer import Transfer
from tests.loaders.files import write_beton
from tests.timeline import GPU, TimedStream

COPY, COLOUR, STEP = 5.0, 2.0, 100.0
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> GPU:
    """Batches that are moved to "cuda" are copied in the host's memory, and take 5 ms of the current stream."""
    gpu = GPU()
    whole: Any = Batch.to
    part: Any = Tensor.to

    def moved(load: Any, device: Any, non_blocking: bool = False) -> Any:
        if torch.device(device).type != "cuda":
            return (whole if isinstance(load, Batch) else part)(load, device)
        assert non_blocking
        gpu.current.do(COPY)
        gpu.told.append(("copy", gpu.current.name))
        if isinstance(load, Tensor):
            return load.clone()
        copies = {f.name: value.clone() for f in fields(load) if isinstance(value := getattr(load, f.name), Tensor)}
        return Batch(**{**vars(load), **copies, "views": tuple(view.clone() for view in load.views)})

    def record(tensor: Tensor, stream: TimedStream) -> None:
        gpu.told.append(("used by", stream.name))
        used.add(tensor.data_ptr())

    used: set[int] = set()
    monkeypatch.setattr(gpu, "used", used, raising=False)
    monkeypatch.setattr(Batch, "to", moved)
    monkeypatch.setattr(Tensor, "to", moved)
    monkeypatch.setattr(Tensor, "record_stream", record)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: gpu.told.append(("pin", "host")) or tensor)
    return gpu


def test_a_tensor_is_copied_beside_and_waited_for(gpu: GPU):
    transfer = Transfer(CUDA, gpu)
    sent = transfer.send(torch.arange(3), lambda copy: copy * 2)
    assert gpu.told == [("copy", "side"), ("record", "side")]
    gpu.current = taker = TimedStream(gpu, "taker")
    assert transfer.take(sent).tolist() == [0, 2, 4]
    assert gpu.told[2:] == [("wait", "taker"), ("used by", "taker")]
    assert taker.free == COPY
    assert gpu.main.free == gpu.now == 0, "neither the host nor another stream waits"


def test_a_copy_runs_beside_what_is_computed(gpu: GPU):
    transfer = Transfer(CUDA, gpu)
    gpu.main.do(STEP)
    transfer.take(transfer.send(torch.arange(3)))
    assert gpu.main.free == STEP
    gpu.now = 3 * STEP
    transfer.take(transfer.send(torch.arange(3)))
    assert gpu.main.free == 3 * STEP + COPY


@pytest.mark.slow
def test_the_hosts_memory_is_kept_until_it_is_copied(gpu: GPU):
    transfer = Transfer(CUDA, gpu)
    host = torch.arange(3)
    kept = weakref.ref(host)
    transfer.take(transfer.send(host))
    del host
    transfer.send(torch.arange(3))
    gc.collect()
    assert kept() is not None
    gpu.now = COPY
    transfer.send(torch.arange(3))
    gc.collect()
    assert kept() is None


def test_one_stream_serves_all(gpu: GPU):
    made: list[TimedStream] = []
    make, gpu.Stream = gpu.Stream, lambda device: made.append(make(device)) or made[-1]
    transfer = Transfer(CUDA, gpu)
    assert not made
    for _ in range(3):
        transfer.carry(torch.zeros(2))
    assert len(made) == 1


def test_memory_that_the_system_may_move_is_pinned_first(gpu: GPU):
    Transfer(CUDA, gpu).carry(torch.zeros(2))
    assert gpu.told[:2] == [("pin", "host"), ("copy", "side")]


def test_without_a_gpu_nothing_is_copied(gpu: GPU):
    transfer, here = Transfer(torch.device("cpu"), gpu), torch.zeros(2)
    assert transfer.carry(here) is here
    assert transfer.take(transfer.send(here, lambda tensor: tensor + 1)).tolist() == [1, 1]
    assert gpu.told == []


def on_gpu(beton: Any, gpu: GPU, **options: Any) -> PairedViews:
    """A loader that takes the pretended GPU for its device, with colours that take 2 ms of the current stream."""

    def colour(images: Tensor, factors: Tensor, choices: Tensor, threshold: int) -> Tensor:
        gpu.current.do(COLOUR)
        gpu.told.append(("colour", gpu.current.name))
        return 255 - images

    settings = ViewSettings(image_size=32, patch_size=8, folds=5)
    loader = PairedViews(
        beton, 4, engine="torch", settings=settings, augment_on="device", colour=colour, workers=2, **options
    )
    loader.transfer = Transfer(CUDA, gpu)
    return loader


def ready(taken: Any, batches: int = 1) -> None:
    """Wait until the loader's threads have made the next batches."""
    stream = taken._stream

    def is_made(number: int) -> bool:
        job = stream._jobs.get(number)
        return number >= stream._count or (job is not None and job.left == 0)

    with stream._lock:
        stream._changed.wait_for(lambda: all(is_made(stream._taken + ahead) for ahead in range(batches)))


@pytest.mark.untyped
def test_the_next_batch_is_copied_while_the_one_before_is_computed_on(mixed: Any, gpu: GPU):
    with on_gpu(mixed, gpu) as loader:
        taken = iter(loader)
        for number in range(len(loader)):
            gpu.told.clear()
            # the first call sends two
            ready(taken, 2 if number == 0 else 1)
            batch = next(taken)
            sends = 2 if number == 0 else 1 if number < len(loader) - 1 else 0
            sent = [("copy", "side"), ("colour", "side"), ("record", "side")]
            tensors = [*batch.views, *(value for value in vars(batch).values() if isinstance(value, Tensor))]
            assert gpu.told == sends * sent + [("wait", "main")] + [("used by", "main")] * len(tensors)
            assert {tensor.data_ptr() for tensor in tensors} <= gpu.used  # pyright: ignore[reportAttributeAccessIssue]
            assert loader.state_dict()["batch"] == number + 1
            begun = gpu.main.free
            gpu.main.do(STEP)
            ready(taken)
        assert begun == COPY + COLOUR + (len(loader) - 1) * STEP, "only the first batch was waited for"
        assert next(taken, None) is None


@pytest.mark.untyped
def test_the_same_batches_as_without_a_gpu(mixed: Any, gpu: GPU):
    with on_gpu(mixed, gpu, drop_last=False) as loader:
        there = list(loader)
        loader.transfer = Transfer(torch.device("cpu"))
        here = list(loader)
    assert len(there) == len(here) == 6
    for a, b in zip(there, here, strict=True):
        assert np.array_equal(a.samples, b.samples)
        assert all(torch.equal(one, other) for one, other in zip(a.views, b.views, strict=True))
        assert torch.equal(a.label, b.label)


@pytest.mark.untyped
def test_a_bad_batch_is_told_of_when_it_is_asked_for(tmp_path: Any, gpu: GPU):
    """Its copy is on its way by then, with rows for which there is no sample."""
    images = [np.zeros((20, 20, 3), np.uint8)] * 4 + [b"\xff\xd8 no picture"] * 70
    file = write_beton(tmp_path / "bad.beton", images, [(20, 20)] * 74)
    with on_gpu(file, gpu, shuffle=False, bad_fraction=1.0) as loader:
        taken = iter(loader)
        ready(taken)
        assert len(next(taken)) == 4
        ready(taken)
        with pytest.raises(UserError, match="in a row"):
            next(taken)


@pytest.mark.untyped
def test_nothing_comes_after_the_end(mixed: Any, gpu: GPU):
    with on_gpu(mixed, gpu) as loader:
        taken = iter(loader)
        next(taken)
        ready(taken)
        next(taken)
    assert next(taken, None) is None
    with on_gpu(mixed, gpu) as loader:
        taken = iter(loader)
        ready(taken)
        next(taken)
        taken.close()
        assert next(taken, None) is None


def test_devices_that_take_no_batch_are_refused_at_once(mixed, monkeypatch):
    def made(**options):
        PairedViews(mixed, 4, engine="torch", views=[mae_view(32)], workers=1, **options)

    with pytest.raises(UserError, match="device is 'mps', which has no float64"):
        made(device="mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="device is 'cuda:7', and this machine's GPUs are cuda:0 to cuda:1"):
        made(device="cuda:7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="pin_memory=True is for copies to a GPU, and torch finds none"):
        made(pin_memory=True)
    with pytest.raises(UserError, match="pin_memory=True is for copies to a GPU, and torch finds none"):
        PlainViews(mixed, 4, 32, engine="torch", pin_memory=True)
