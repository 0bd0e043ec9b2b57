"""`bench_stores`: its rows, from a real server; and what shows other images than the local file is not claimed."""

from pathlib import Path

import pytest

from benchmarks import bench_stores

CASES = ["local file", "S3, cold cache", "S3, warm cache", "S3, half cache"]


def rows_of(folder: Path) -> dict[tuple[str, str], bench_stores.Row]:
    """Two pages of images, once."""
    return {(row.case, row.metric): row for row in bench_stores.rows_of(folder, 120, 1, 16, latency_ms=1)}


def test_rows(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    assert [case for case, metric in rows if metric == "rate"] == CASES
    assert all(row.gate and row.value > 0 for (_, metric), row in rows.items() if metric == "rate")
    assert [rows[case, "rate"].baseline for case in CASES] == [None, *["local file"] * 3]
    hits = {case: rows[case, "pages from the cache"].value for case in CASES[1:]}
    # tables are a request as well, so what is cold may fetch more than its pages
    assert hits["S3, cold cache"] == 0
    assert hits["S3, warm cache"] == 100


def test_another_order_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = bench_stores.rate
    monkeypatch.setattr(
        bench_stores,
        "rate",
        lambda samples, batch: (5.0, 0) if isinstance(samples, Path) else (rates(samples, batch)[0], 1),
    )
    rows = rows_of(tmp_path)
    assert rows["local file", "rate"].gate
    assert not any(rows[case, "rate"].gate for case in CASES[1:])
