"""Writing beside training: the copy is of the moment, one write at a time, and what goes wrong comes up."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor

from fastpmae import RunError
from fastpmae.run import checkpoint_writer
from fastpmae.run.checkpoint import checkpoint_path, checkpoints_in, read_checkpoint, write_checkpoint
from fastpmae.run.checkpoint_writer import BLOCK, Saver

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def made() -> dict[str, Tensor]:
    """Of every kind that a run has: transposed, of several types, empty, a number, a view of another's memory."""
    rows = torch.arange(12.0).view(3, 4)
    return {
        "student.weight": rows.mT,
        "student.part": rows[1:],
        "student.half": torch.arange(7).half(),
        "rng.cpu": torch.arange(5, dtype=torch.uint8),
        "optimizer.weight.step": torch.tensor(3.0),
        "optimizer.nothing": torch.empty(0, 2),
        "log.count": torch.tensor(9),
    }


def progress(step: int) -> dict[str, Any]:
    told = {"step": step, "steps_per_epoch": 5, "bad_images": 0, "fingerprint": "f", "config": {}}
    return told | {"loader": {"batch": step}}


class Gate:
    """In the place of what writes a file: each write waits until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.begun, self.open, self.written = threading.Event(), threading.Event(), 0
        monkeypatch.setattr(checkpoint_writer, "write_checkpoint", self.write)

    def write(self, *arguments: Any) -> None:
        self.begun.set()
        assert self.open.wait(60)
        write_checkpoint(*arguments)
        self.written += 1


def contents(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """A file's header, with the digest in it, and its tensors' bytes; safetensors writes either in any order."""
    with safetensors.safe_open(path, "np") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def test_the_file_is_that_of_the_moment_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tensors, told = made(), progress(7)
    write_checkpoint(checkpoint_path(tmp_path / "plain", 7), tensors, told, keep=1)
    gate = Gate(monkeypatch)
    with Saver(CPU, keep=1) as beside:
        beside.save(checkpoint_path(tmp_path / "beside", 7), tensors, told)
        assert gate.begun.wait(60)
        beside.before_update()
        for tensor in tensors.values():
            tensor.add_(1)
        told["step"], told["loader"]["batch"] = 8, 8
        gate.open.set()
    assert contents(checkpoint_path(tmp_path / "beside", 7)) == contents(checkpoint_path(tmp_path / "plain", 7))


def test_a_second_write_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    with Saver(CPU, keep=5) as beside:
        beside.save(checkpoint_path(tmp_path, 1), made(), progress(1))
        assert gate.begun.wait(60)
        threading.Timer(0.2, gate.open.set).start()
        began = time.monotonic()
        beside.save(checkpoint_path(tmp_path, 2), made(), progress(2))
        assert gate.written >= 1
        assert time.monotonic() - began > 0.1
    assert checkpoints_in(tmp_path) == [checkpoint_path(tmp_path, step) for step in (2, 1)]


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_what_went_wrong_comes_up_once_and_the_next_may_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with Saver(CPU, keep=1) as beside:
        beside.save(checkpoint_path(tmp_path, 1), made(), progress(1))
        beside.wait()
        assert not beside.failed
        with monkeypatch.context() as patch:
            patch.setattr("fastpmae.run.checkpoint.save_file", full)
            beside.save(checkpoint_path(tmp_path, 2), made(), progress(2))
            until(lambda: beside.failed)
            with pytest.raises(RunError, match=r"No space left on device. Last checkpoint: .*step-00000001"):
                beside.save(checkpoint_path(tmp_path, 3), made(), progress(3))
        assert not beside.failed
        beside.wait()
        beside.save(checkpoint_path(tmp_path, 3), made(), progress(3))
    assert checkpoints_in(tmp_path) == [checkpoint_path(tmp_path, step) for step in (3, 1)]


def test_leaving_waits_and_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def leave(error: Exception | None) -> None:
        with Saver(CPU, keep=1) as beside:
            beside.save(checkpoint_path(tmp_path, 1), made(), progress(1))
            if error is not None:
                raise error

    monkeypatch.setattr("fastpmae.run.checkpoint.save_file", full)
    with pytest.raises(RunError, match="No space left"):
        leave(None)
    with pytest.raises(ZeroDivisionError):  # another error goes first
        leave(ZeroDivisionError())
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError):
        leave(ZeroDivisionError())
    assert read_checkpoint(checkpoint_path(tmp_path, 1)).progress == progress(1)
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def test_other_ranks_write_nothing(tmp_path: Path):
    with Saver(CUDA, keep=1, is_main=False) as beside:
        beside.save(checkpoint_path(tmp_path, 1), made(), progress(1))
        beside.before_update()
    assert list(tmp_path.iterdir()) == []


def until(happened: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < limit
        time.sleep(0.005)


class LateGpu:
    """CUDA's streams and events as they may behave at worst: a copy happens when somebody waits for it, not before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.told: list[str] = []
        self.queue: list[Callable[[], Any]] = []
        self.side = False
        gpu, copy = self, Tensor.copy_

        class Stream:
            def __init__(self, device: torch.device):
                gpu.told.append("stream")

            def wait_stream(self, other: object) -> None:
                gpu.told.append("side waits for step")

        class Current:
            def wait_event(self, event: object) -> None:
                gpu.told.append("step waits for copies")
                gpu.finish()

        class Event:
            def __init__(self, blocking: bool = False):
                assert blocking, "a thread that waits is to leave its core to others"

            def record(self, stream: Stream) -> None:
                gpu.told.append("record")

            def synchronize(self) -> None:
                until(lambda: not gpu.queue)

        @contextlib.contextmanager
        def within(stream: Stream) -> Iterator[None]:
            gpu.side = True
            yield
            gpu.side = False

        def late(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            if not gpu.side:
                return copy(target, source)
            assert non_blocking
            gpu.queue.append(lambda: copy(target, source))
            return target

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", within)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Current())
        monkeypatch.setattr(Tensor, "copy_", late)

    def finish(self) -> None:
        while self.queue:
            self.queue[0]()
            self.queue.pop(0)


@pytest.mark.parametrize("held", [True, False])
def test_a_gpu_may_copy_late_where_updates_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool):
    plain, tensors = made(), made()
    gpu = LateGpu(monkeypatch)
    with Saver(CUDA, keep=3) as beside:
        beside.save(checkpoint_path(tmp_path, 1), tensors, progress(1))
        assert gpu.told == ["stream", "side waits for step", "record"]
        assert len(gpu.queue) == len(tensors)
        if held:
            beside.before_update()
            assert gpu.told[-1] == "step waits for copies"
        for tensor in tensors.values():
            tensor.add_(1)
        gpu.finish()
        beside.wait()
        first = read_checkpoint(checkpoint_path(tmp_path, 1)).tensors
        places = [block.data_ptr() for block in beside.gpu.blocks] if beside.gpu is not None else []
        # without being held the update would have come first: the test would have seen it
        assert all(torch.equal(first[name], plain[name]) for name in plain) == held
        beside.save(checkpoint_path(tmp_path, 2), tensors, progress(2))
        gpu.finish()
        beside.wait()
        assert beside.gpu is not None
        assert [block.data_ptr() for block in beside.gpu.blocks] == places, "the memory is used again"
        second = read_checkpoint(checkpoint_path(tmp_path, 2)).tensors
        assert all(torch.equal(second[name], tensors[name]) for name in tensors)


def test_memory_for_copies_comes_in_blocks(monkeypatch: pytest.MonkeyPatch):
    LateGpu(monkeypatch)
    asked: list[int] = []

    def pinned(size: int) -> Tensor:
        asked.append(size)
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(checkpoint_writer, "pinned", pinned)
    monkeypatch.setattr(checkpoint_writer, "BLOCK", 1024)
    beside = Saver(CUDA, keep=1)
    assert beside.gpu is not None
    sizes = {torch.float32: 100, torch.uint8: 3, torch.float16: 1000, torch.int64: 0, torch.float64: 90, torch.int8: 5}
    likes = [torch.empty(size, dtype=dtype) for dtype, size in sizes.items()]
    for _ in range(2):
        rooms = [beside.gpu.room(like) for like in likes]
        for number, room in enumerate(rooms):
            assert (room.shape, room.dtype) == (likes[number].shape, likes[number].dtype)
            assert room.is_contiguous()
            room.fill_(number)
        assert all((room == number).all() for number, room in enumerate(rooms)), "no two share a place"
        beside.gpu.reuse()
    assert asked == [1024, 2000, 1024]


def test_without_pinned_memory_any_other_will_do(monkeypatch: pytest.MonkeyPatch):
    empty, asked = torch.empty, []

    def refused(size: int, **how: Any) -> Tensor:
        asked.append(how.pop("pin_memory", False))
        if asked[-1]:
            raise RuntimeError("CUDA error: out of memory")
        return empty(size, **how)

    monkeypatch.setattr(torch, "empty", refused)
    assert len(checkpoint_writer.pinned(BLOCK)) == BLOCK
    assert asked == [True, False]
