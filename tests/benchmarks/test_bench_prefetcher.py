"""The benchmark of waiting for data: its rows, and that it sees a consumer who has to wait."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_prefetcher


def test_rows(small_beton: Path):
    rows = bench_prefetcher.rows_of(small_beton, batch=4, workers=1, share=0.5, rounds=1, batches=3)
    assert [(row.case, row.metric, row.unit) for row in rows] == [
        ("prefetcher", "images_per_second", "images/s"),
        ("prefetcher", "data_wait", "%"),
        ("consumer of 50%", "data_wait", "%"),
    ]
    assert rows[0].value > 0
    assert all(0 <= row.value <= 100 for row in rows[1:])


@pytest.mark.parametrize(("waited", "passes"), [(1.9, True), (2.0, False)])
def test_the_check_is_that_a_consumer_hardly_waits(
    waited: float, passes: bool, small_beton: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        bench_prefetcher, "taken", lambda prefetcher, epoch, batches, pause, _: (100.0, waited if pause else 90.0)
    )
    rows = bench_prefetcher.rows_of(small_beton, batch=4, workers=1, share=0.5, rounds=3, batches=3)
    assert [row.gate for row in rows] == [True, True, passes]


def test_what_is_waited_for_is_counted_and_what_is_computed_is_not():
    class Slow:
        waited = 0.0

        def epoch(self, epoch: int, first: int) -> Any:
            while True:
                time.sleep(0.01)
                self.waited += 1.0
                yield None

        def take_wait(self) -> float:
            waited, self.waited = self.waited, 0.0
            return waited

    prefetcher: Any = Slow()
    passed, waited = bench_prefetcher.taken(prefetcher, 0, 5, 0.02, bench_prefetcher.Sleeper())
    assert waited == 5
    assert passed >= 5 * 0.03


@pytest.mark.parametrize("share", ["0", "1", "-1"])
def test_a_share_that_makes_no_sense(share: str, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr("sys.argv", ["bench_prefetcher", "--share", share])
    with pytest.raises(SystemExit) as ended:
        bench_prefetcher.main()
    assert ended.value.code == 2
    assert "--share" in capsys.readouterr().err


def test_a_consumer_that_computes(monkeypatch: pytest.MonkeyPatch):
    """What a GPU does, on the CPU: the work lasts about as long as it is to, and the rest of the time is idle."""
    consumer = bench_prefetcher.Multiplier(torch.device("cpu"))
    start = time.perf_counter()
    consumer.work(0.05)
    consumer.wait()
    worked = time.perf_counter() - start
    assert consumer.idle(4 * worked) == pytest.approx(0.75, abs=0.05)
    assert consumer.idle(1.0) == 1
    monkeypatch.setattr(consumer, "each", 10.0)
    consumer.work(1.0)
    assert consumer.idle(1.0) == pytest.approx(1, abs=0.01)


def test_rows_of_a_consumer_that_computes(small_beton: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_prefetcher, "Sleeper", lambda: bench_prefetcher.Multiplier(torch.device("cpu")))
    rows = bench_prefetcher.rows_of(small_beton, batch=4, workers=1, share=0.5, rounds=2, batches=3)
    assert [(row.case, row.metric) for row in rows][2:] == [
        ("consumer of 50%", "data_wait"),
        ("consumer of 50%", "idle"),
    ]
    assert all(0 <= row.value <= 100 for row in rows[1:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_gets_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr("sys.argv", ["bench_prefetcher", "--device", "cuda"])
    assert bench_prefetcher.main() == 2
    assert "--device cuda: torch sees no GPU here" in capsys.readouterr().err
