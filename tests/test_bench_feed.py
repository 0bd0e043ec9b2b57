"""The benchmark of waiting for data: its rows, and that it sees a consumer who has to wait."""

import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_feed


def test_rows(small_beton: Path):
    rows = bench_feed.rows_of(small_beton, batch=4, workers=1, share=0.5, rounds=1, batches=3)
    assert [(row.case, row.metric, row.unit) for row in rows] == [
        ("loader", "images_per_second", "images/s"),
        ("loader", "data_wait", "%"),
        ("consumer of 50%", "data_wait", "%"),
    ]
    assert rows[0].value > 0
    assert all(0 <= row.value <= 100 for row in rows[1:])


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

    feed: Any = Slow()
    passed, waited = bench_feed.taken(feed, 0, 5, 0.02)
    assert waited == 5
    assert passed >= 5 * 0.03


@pytest.mark.parametrize("share", ["0", "1", "-1"])
def test_a_share_that_makes_no_sense(share: str, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr("sys.argv", ["bench_feed", "--share", share])
    with pytest.raises(SystemExit) as ended:
        bench_feed.main()
    assert ended.value.code == 2
    assert "--share" in capsys.readouterr().err
