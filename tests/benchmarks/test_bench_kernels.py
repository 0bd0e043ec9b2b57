"""The kernels' benchmark as a command: its rows, its gates and its sentences."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_kernels, common
from fastpmae_kernels import sinkhorn_bias_ref

KEYS = {"case", "metric", "unit", "value", "low", "high", "baseline", "ratio", "gate", "device", "versions", "date"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"BATCH": 3, "MASKED": 10, "PROTOTYPES": 40, "BOTTLENECK": 8, "DIM": 16, "IMAGES": 5, "SIDE": 40}
    for name, number in sizes.items():
        monkeypatch.setattr(bench_kernels, name, number)


@pytest.mark.slow
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
        ("photometric", "time", "torchvision"),
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
    slow = common.Case("c", lambda: calls.append("c"), at_most=1)
    seconds = common.alternating([*cases, slow], 3)
    assert calls == [*"abc", *"abc", *"ab", *"ab"]
    assert [len(times) for times in seconds.values()] == [3, 3, 1]


def test_the_exact_bias_is_that_of_the_plain_form():
    logits = torch.rand(1100, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = sinkhorn_bias_ref(logits.double(), bench_kernels.EPSILON, bench_kernels.ITERATIONS)
    torch.testing.assert_close(bench_kernels.exact_bias(logits), expected, rtol=1e-12, atol=1e-12)


def test_a_check_finds_one_wrong_number_among_many_and_no_number():
    right = torch.ones(3000, 4)
    assert bench_kernels.close(right + 5e-5, right, 1e-4)
    for wrong in (1.001, torch.nan):
        got = right.clone()
        got[2999, 3] = wrong
        assert not bench_kernels.close(got, right, 1e-4)


@pytest.mark.slow
def test_peak_memory_is_that_of_a_matrix_held():
    """From the same command that the benchmark runs: the form with both logits matrices holds at least those.

    What the system took from the process before, and it needs again, is counted too: the least of three is the loss's.
    """
    peaks = {
        name: min(json.loads(bench_kernels._measured(name, "cpu"))["peak"] for _ in range(3))
        for name in ("loss", "loss-with-logits")
    }
    matrix = 64 * 147 * 4096 * 4
    assert 2 * matrix < peaks["loss-with-logits"] < 3 * matrix
    assert peaks["loss"] < matrix


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_asked_for_in_vain(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_kernels", "--device", "cuda"])
    assert bench_kernels.main() == 2
    assert capsys.readouterr().err == "bench_kernels: error: --device cuda: torch finds no GPU here\n"
