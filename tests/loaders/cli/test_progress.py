"""What a count says of its rate."""

import pytest

from fastpmae_loaders.cli import progress
from fastpmae_loaders.cli.progress import Progress


@pytest.mark.parametrize(("pause", "said"), [(4.0, "4.0 s each"), (0.01, "100 parts/s"), (1.0, "1 parts/s")])
def test_the_rate_leaves_out_the_first_and_reads_well_when_slow(monkeypatch, pause: float, said: str):
    now = 50.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    counted = Progress()
    with counted.count(3, "parts"):
        now += 30  # a slow start is no part of the rate
        for _ in range(3):
            counted.advance()
            now += pause
        now -= pause
        assert counted.rate() == said


def test_nothing_done_has_no_rate():
    counted = Progress()
    with counted.count(3, "parts"):
        assert counted.rate() == "0 parts/s"
