"""Waiting for data as a GPU sees it, on one whose times are pretended."""

from collections.abc import Callable

import pytest
import torch

from fastpmae import Config
from fastpmae.distributed.ranks import Ranks
from fastpmae.pretraining.data import Prefetcher, make_loader
from fastpmae.pretraining.data_wait import DeviceWait, HostWait
from fastpmae.run.images import open_images
from tests.timeline import GPU

STEPS = 50


def play(
    ready: Callable[[int], float], compute: float, launch: float, *, parts: int = 1, pieces: int = 10, copy: float = 0
) -> tuple[float, float, float]:
    """Steps of `parts` batches; shares of the time: the wait found, the loop's own wait, and all that the GPU idled.

    Args:
        ready: when the loader has a batch made.
        compute, launch: milliseconds a batch takes the GPU, and the host to give it to the GPU in `pieces`.
        copy: milliseconds by which a batch's copy comes after its being handed over.
    """
    gpu = GPU()
    wait = DeviceWait(parts, gpu.Event)
    found = loop = 0.0
    in_flight: list[float] = []
    for number in range(STEPS * parts):
        wait.ask()
        asked = gpu.now
        gpu.now = max(gpu.now, ready(number))
        loop += gpu.now - asked
        if copy:
            gpu.main.free = max(gpu.main.free, gpu.now + copy)
        wait.have()
        in_flight = [done for done in in_flight if done > gpu.now]
        for _ in range(pieces):
            done = gpu.main.do(compute / pieces)
            gpu.now += launch / pieces
        in_flight.append(done)
        assert len(in_flight) <= 2 * parts
        if number % (7 * parts) == 0:
            found += wait.seconds()
    gpu.now = max(gpu.now, gpu.main.free)
    found += wait.seconds()
    assert wait.seconds() == 0
    assert gpu.events <= 2 * (2 * parts + 1)
    whole = gpu.now
    return 1000 * found / whole, loop / whole, 1 - STEPS * parts * compute / whole


def test_a_loop_that_waits_beside_a_busy_gpu():
    """The loader takes 110 ms a batch, the GPU 100, the host 30: the loop waits for 80 of them and the GPU for 10."""
    found, loop, idle = play(lambda number: 110 * number, compute=100, launch=30)
    assert loop == pytest.approx(80 / 110, abs=0.02)
    assert idle == pytest.approx(10 / 110, abs=0.01)
    assert found == pytest.approx(idle, abs=0.001)


def test_a_loader_that_is_late():
    found, loop, idle = play(lambda number: 200 * number, compute=100, launch=10)
    assert idle == pytest.approx(0.5, abs=0.02)
    assert found == pytest.approx(idle, abs=0.001)
    assert loop == pytest.approx(0.95, abs=0.02)


def test_a_loader_that_is_always_ready():
    found, loop, idle = play(lambda number: 0, compute=100, launch=30)
    assert found == loop == 0
    assert idle < 0.01


def test_a_gpu_that_waits_for_the_host_does_not_wait_for_data():
    found, _, idle = play(lambda number: 0, compute=100, launch=150)
    assert idle == pytest.approx(1 / 3, abs=0.01)
    assert found == 0


def test_a_copy_that_the_stream_waits_for_is_no_work():
    found, _, idle = play(lambda number: 200 * number, compute=100, launch=10, copy=50)
    assert idle == pytest.approx(0.5, abs=0.02)
    assert found == pytest.approx(idle, abs=0.001)
    assert play(lambda number: 0, compute=100, launch=10, copy=50)[0] == pytest.approx(50 / (STEPS * 100), rel=0.05)


@pytest.mark.parametrize("late", [False, True])
def test_several_batches_a_step(late: bool):
    found, _, idle = play(lambda number: (150 if late else 50) * number, compute=100, launch=10, parts=4)
    assert found == pytest.approx(idle, abs=0.001)
    assert (found > 0.3) is late


def test_the_feed_asks_before_a_batch_is_sought_and_has_it_with_its_stochastic_depth(tiny: Config):
    told: list[str] = []

    class Told(HostWait):
        def ask(self) -> None:
            told.append("ask")
            super().ask()

        def have(self) -> None:
            told.append("have")
            super().have()

    cpu = torch.device("cpu")
    config = tiny.using(accumulate=2)
    with make_loader(open_images(config), config, Ranks(0, 1, 1, cpu, None)) as loader:
        carry = loader.transfer.carry
        loader.transfer.carry = lambda tensor: told.append("carry") or carry(tensor)
        prefetcher = Prefetcher(loader, config, cpu, wait=Told())
        batches = prefetcher.epoch(0, len(loader) - 2)
        for _ in range(2):
            batch, drop_path_scale = next(batches)
            assert drop_path_scale is not None
            assert len(drop_path_scale) == len(batch) == config.optimizer.batch_size // 2
            told.append("step")
        assert next(batches, None) is None
    assert told == 2 * ["ask", "carry", "have", "step"] + ["ask"]
    assert prefetcher.take_wait() > 0
    assert prefetcher.take_wait() == 0
