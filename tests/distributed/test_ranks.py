"""What a run computes on, and how it gets there."""

import ctypes
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpmae.distributed import ranks as ranks
from fastpmae.distributed.ranks import has_bf16, to_device
from fastpmae.evaluate.datasets import half
from tests.made import tiny_settings
from tests.test_train import environment, flags_of


@pytest.mark.parametrize("emulated", [False, True])
def test_emulated_bf16_counts_as_none(emulated: bool, monkeypatch: pytest.MonkeyPatch):
    """A GPU that torch says yes for by default, although its bf16 is emulated: a V100."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or not emulated
    )
    assert has_bf16(torch.device("cuda")) != emulated
    assert not has_bf16(torch.device("cpu"))
    assert not half(torch.device("cpu"))._enabled


@pytest.mark.parametrize("pinned", [False, True])
def test_what_goes_to_a_gpu_starts_in_pinned_memory(pinned: bool, monkeypatch: pytest.MonkeyPatch):
    """Nothing is pinned twice, and nothing that stays on the host."""
    done: list[Any] = []
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: pinned)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: done.append("pinned") or self)
    monkeypatch.setattr(
        Tensor, "to", lambda self, device, non_blocking: done.append((device.type, non_blocking)) or self
    )
    to_device(torch.zeros(3), torch.device("cpu"))
    assert done == [("cpu", True)]
    to_device(torch.zeros(3), torch.device("cuda"))
    assert done[1:] == ["pinned"] * (not pinned) + [("cuda", True)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "shard", "held", "error"])
def test_no_thread_of_gloos_outlives_the_interpreter(kind: str, small_beton: Path, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tiny_settings(small_beton).using(steps=2, shard=kind == "shard", out=tmp_path / "run")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.programs.gloo_threads", str(rank), str(port), kind, *flags_of(config)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        )
        for rank in range(2)
    ]  # fmt: skip
    ended = [(*rank.communicate(timeout=500), rank.returncode) for rank in ranks]
    assert {status for *_, status in ended} <= ({2} if kind == "error" else {0}), ended
    # FSDP keeps the group in the library's own memory: its threads are asleep then, and have let go of everything.
    if kind != "shard":
        assert all("threads left: 0" in said for said, *_ in ended), ended


@pytest.mark.slow
def test_the_exit_waits_for_threads_that_still_run(monkeypatch: pytest.MonkeyPatch):
    """Two that run, sleep for a look, run again, then sleep."""
    looks = iter(["RR", "SS", "SR", "SS", "SS", "SS"])
    monkeypatch.setattr(ranks, "_states", lambda name: list(next(looks)))
    held = threading.Event()
    ranks._await_threads(weakref.ref(held), patience=60)
    assert next(looks, None) is None
    monkeypatch.setattr(ranks, "_states", lambda name: ["R"])
    ranks._await_threads(weakref.ref(held), patience=0.05)
    ranks._await_threads(lambda: None)


def test_threads_are_found_by_name():
    """One that waits for a lock, whose name holds what ends a name in Linux's line."""
    lock = threading.Lock()
    lock.acquire()

    def wait() -> None:
        ctypes.CDLL(None).prctl(15, b"a (b) R c")  # PR_SET_NAME
        ready.set()
        lock.acquire()

    ready, thread = threading.Event(), threading.Thread(target=wait)
    thread.start()
    ready.wait()
    time.sleep(0.05)
    assert ranks._states("a (b) R c") == ["S"]
    lock.release()
    thread.join()
    assert ranks._states("a (b)") == []
