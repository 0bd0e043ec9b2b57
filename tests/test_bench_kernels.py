"""The kernels' benchmark as a command: its rows, its gates and its sentences."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_kernels, common

ROOT = Path(__file__).parents[1]
KEYS = {"case", "metric", "unit", "value", "low", "high", "baseline", "ratio", "gate", "device", "versions", "date"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in {"BATCH": 3, "MASKED": 10, "PROTOTYPES": 40, "BOTTLENECK": 8, "DIM": 16}.items():
        monkeypatch.setattr(bench_kernels, name, number)


@pytest.mark.usefixtures("small")
def test_rows_have_their_names_and_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setattr(bench_kernels, "_measured", lambda name, device: json.dumps({"peak": 2**20, "loss": 1.0}))
    file, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    monkeypatch.setattr(sys, "argv", ["bench_kernels", "--device", "cpu", "--json", str(file), "--plot", str(plot)])
    assert bench_kernels.main() == 0
    rows = json.loads(file.read_text())
    assert all(set(row) == KEYS and row["gate"] for row in rows)
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    pairs = {(row["case"], row["metric"], row["baseline"]) for row in rows}
    assert pairs >= {
        ("sinkhorn", "time", "dinov2-in-place"),
        ("sinkhorn", "time", "dinov2-out-of-place"),
        ("prototype_cross_entropy", "time", "usual"),
        ("nearest_patch", "time", "cdist"),
        ("loss", "peak_memory", "usual"),
        ("dinov2-in-place", "time", None),
        ("usual", "peak_memory", None),
    }
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "modelled, not measured" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_nothing_is_claimed_of_a_wrong_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setattr(bench_kernels, "sinkhorn_bias", lambda logits, *rest: torch.zeros(logits.shape[1]))
    rows = bench_kernels.time_rows("cpu", 1)
    wrong = [row for row in rows if row.case == "sinkhorn"]
    assert all(not row.gate and row.ratio is None for row in wrong)
    assert common.finish(rows, "title", None, tmp_path / "plot.png") == 1
    assert "failed their check" in capsys.readouterr().out


def test_a_ratio_is_of_medians_and_above_one_is_better():
    row = common.make_row("a", "time", "s", [1.0, 2.0, 9.0], "here", True, ("b", [4.0, 4.0, 40.0]))
    assert (row.value, row.ratio, row.baseline) == (2.0, 2.0, "b")
    assert row.low == pytest.approx(1.4)
    assert row.high == pytest.approx(6.2)


def test_cases_take_turns_after_a_round_that_does_not_count():
    calls = []
    cases = [common.Case(name, lambda name=name: calls.append(name)) for name in "ab"]
    seconds = common.alternating(cases, 3)
    assert calls == ["a", "b"] * 4
    assert [len(times) for times in seconds.values()] == [3, 3]


@pytest.mark.slow
def test_peak_memory_is_that_of_a_matrix_held():
    """From the same command that the benchmark runs: the form with both logits matrices holds at least those."""
    peaks = {name: json.loads(bench_kernels._measured(name, "cpu"))["peak"] for name in ("loss", "loss-with-logits")}
    matrix = 64 * 147 * 4096 * 4
    assert 2 * matrix < peaks["loss-with-logits"] < 3 * matrix
    assert peaks["loss"] < matrix


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_asked_for_in_vain():
    command = [sys.executable, "-m", "benchmarks.bench_kernels", "--device", "cuda"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "torch finds no GPU here" in result.stderr
    assert "Traceback" not in result.stderr
