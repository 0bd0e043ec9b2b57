"""The usual way of writing the step computes what the trainer computes; the benchmark's rows, gates and files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_step, bench_table6, step_cases
from benchmarks.baseline import plain_batch
from benchmarks.bench_step import PAIRS, PARTS
from benchmarks.step_cases import DROP_PATH, Ours, Plain, made_batch, make_case
from fastpmae import Config
from fastpmae.pretraining.step import compute_targets, student_loss
from tests import tiny
from tests.test_train import environment
from tests.tiny import disturb, tiny_config

KEYS = {"case", "metric", "unit", "value", "low", "high", "baseline", "ratio", "gate", "device", "versions", "date"}
PRESETS = ("paper", "sdae")


def both(preset: str, folds: int = 3) -> tuple[Ours, Plain]:
    """The two ways with the same weights, every network with weights of its own."""
    ours = Ours(tiny_config(preset, drop_path=0.0, folds=folds))
    for number, network in enumerate((ours.student, *ours.teachers.modules().values())):
        disturb(network, number)
    return ours, Plain(ours)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("fold_sizes", [(4, 4, 4), (5, 4, 4)])
def test_the_usual_way_has_the_same_losses_and_gradients(preset: str, fold_sizes: tuple[int, ...]):
    ours, plain = both(preset)
    batch = tiny.made_batch(1, 3, fold_sizes)
    losses = student_loss(ours.student, batch, None, compute_targets(ours.teachers, batch, ours.config), ours.config)
    losses.total.backward()
    usual = plain_batch(batch)
    others = plain.method.learn(usual, plain.method.teach(usual))
    others.total.backward()
    torch.testing.assert_close(list(others), list(losses[:4]), rtol=1e-5, atol=1e-6)
    theirs = dict(plain.method.student.named_parameters())
    for name, parameter in ours.student.named_parameters():
        gradient = theirs[name].grad
        assert parameter.grad is not None
        assert gradient is not None
        error, largest = float((gradient - parameter.grad).abs().max()), float(parameter.grad.abs().max())
        assert error <= 1e-3 * largest + 1e-6, name


@pytest.mark.parametrize("preset", PRESETS)
def test_the_usual_way_takes_the_same_steps(preset: str):
    """AdamW, weight decay and the teachers' EMA: the weights after three steps."""
    ours, plain = both(preset)
    batch = tiny.made_batch(1, 3)
    for _ in range(3):
        ours.step(batch)
        plain.step(plain_batch(batch))
    for name, teacher in ours.teachers.modules().items():
        for key, tensor in teacher.state_dict().items():
            torch.testing.assert_close(plain.method.teachers[name].state_dict()[key], tensor, rtol=1e-4, atol=1e-5)
    theirs = plain.method.student.state_dict()
    for key, tensor in ours.student.state_dict().items():
        # A key's bias moves no attention: its gradient is rounding, of which AdamW makes a step of any sign.
        if not key.endswith("qkv.bias"):
            torch.testing.assert_close(theirs[key], tensor, rtol=1e-3, atol=2e-5)


def test_a_plain_step_stops_at_a_loss_that_is_not_finite():
    _, plain = both("sdae")
    with torch.no_grad():
        plain.method.student.encoder.cls_token.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="loss is nan"):
        plain.step(plain_batch(tiny.made_batch(1, 2)))


class Here:
    """`Apart` in this process, where the sizes can be swapped."""

    def __init__(self, *given: Any):
        self.case = make_case(*given[:3], chunk=given[3])
        self.given = self.case.given(made_batch(self.case.config, given[2]))
        self.losses = self.case.losses(self.given)

    def timed(self) -> dict[str, float]:
        return step_cases.seconds_of_parts(self.case, self.given)

    def end(self) -> None:
        pass


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(preset: str, model: str, batch_size: int, **others: Any) -> Config:
        return tiny_config(preset, **others)

    monkeypatch.setattr(step_cases, "settings", settings)
    monkeypatch.setattr(bench_step, "Apart", Here)
    # nothing is compiled here that would have to be forgotten, and pytest's own objects take long to look through
    monkeypatch.setattr(step_cases, "release", lambda: None)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_rows_have_their_names_and_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any):
    peaks = {"dual": 2**20, "plain-dual": 2**21, "sdae": 2**20, "plain-sdae": 2**22}
    monkeypatch.setattr(bench_step, "measured", lambda name, *rest: json.dumps({"peak": peaks[name], "loss": 1.0}))
    file, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    monkeypatch.setattr(sys, "argv", ["bench_step", "--quick", "--json", str(file), "--plot", str(plot)])
    assert bench_step.main() == 0
    rows = json.loads(file.read_text())
    assert all(set(row) == KEYS and row["gate"] for row in rows)
    by_pair = {(row["case"], row["baseline"], row["metric"]): row for row in rows}
    assert by_pair["dual", "plain-dual", "peak_memory"]["ratio"] == 2
    assert by_pair["sdae", "plain-sdae", "peak_memory"]["ratio"] == 4
    for ours, plain in PAIRS:
        mine, other = by_pair[ours, plain, "images_per_second"], by_pair[plain, None, "images_per_second"]
        assert mine["ratio"] == pytest.approx(mine["value"] / other["value"])
        assert by_pair[ours, plain, "step"]["ratio"] > 0
        for name in (ours, plain):
            assert sum(by_pair[name, None, f"share_{part}"]["value"] for part in PARTS) == pytest.approx(100, abs=60)
        assert by_pair[f"{ours} linear layers", "F.linear", "rate"]["value"] > 0
        assert by_pair[f"{ours} attention", "F.linear", "rate"]["value"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "plain-dual" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_nothing_is_claimed_of_other_losses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Plain, "losses", lambda self, batch: [0.0] * 4)
    rows = bench_step.time_rows("vit_small", 3, 1)
    assert all(row.ratio is None and not row.gate for row in rows if row.case in ("dual", "sdae"))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_one_case_after_the_other_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What `--device cuda` does, on the CPU, with passes that are not really compiled."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append(function) or function)
    real = bench_step.measured_case

    def with_memory(name: str, *given: Any, **how: Any) -> step_cases.Measured:
        found = real(name, *given, **how)
        return found._replace(timing=found.timing._replace(peak=2**20 * (2 if "plain" in name else 1)))

    monkeypatch.setattr(bench_step, "measured_case", with_memory)
    rows = bench_step.rows_in_turn("tiny", 2, 3, torch.device("cpu"), "fp32", [False, True])
    assert all(row.gate for row in rows)
    found = {(row.case, row.metric): row for row in rows}
    names = [name for pair in PAIRS for name in pair]
    assert {case for case, _ in found} == {name + way for name in names for way in ("", " compiled")}
    # both passes of each of the four
    assert len(asked) == 8
    metrics = {"images_per_second", "step", "peak_memory", "host", "utilisation", "warm_up"}
    for name in names:
        assert {metric for case, metric in found if case == name} == metrics | {f"share_{part}" for part in PARTS}
        assert sum(found[name, f"share_{part}"].value for part in PARTS) == pytest.approx(100, abs=60)
    for name, baseline in (*PAIRS, ("dual compiled", "plain-dual compiled")):
        for metric in ("images_per_second", "step", "host", "utilisation"):
            assert (found[name, metric].baseline, found[baseline, metric].baseline) == (baseline, None)
        rate, usual = (found[case, "images_per_second"] for case in (name, baseline))
        assert rate.ratio == pytest.approx(rate.value / usual.value)
        assert found[name, "peak_memory"].ratio == 2
    # both are held against what the method itself needs
    shares = [found[name, "utilisation"].value * found[name, "step"].value for name in PAIRS[0]]
    assert shares[0] == pytest.approx(shares[1], rel=0.3)
    bench_step.picture(rows, "as on a GPU", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("spoilt", ["losses", "checked_step"])
def test_nothing_is_claimed_of_a_gpu_that_computes_something_else(spoilt: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Ours, spoilt, lambda self, batch: [0.0] * 4 if spoilt == "losses" else 0.5)
    rows = bench_step.rows_in_turn("tiny", 2, 1, torch.device("cpu"), "fp32", [False])
    assert not any(row.gate for row in rows)
    assert all(row.ratio is None for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("bench", [bench_step, bench_table6])
def test_a_gpu_that_is_not_there_gets_a_sentence(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cuda", "--quick"])
    assert bench.main() == 2
    said = capsys.readouterr()
    assert "--device cuda: torch sees no GPU here" in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize("flag", [["--precision", "bf16"], ["--compile"]])
def test_what_only_a_gpu_is_asked_for(flag: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(sys, "argv", ["bench_step", *flag])
    assert bench_step.main() == 2
    assert "--device cuda" in capsys.readouterr().err


def served(connection: Any, *given: Any) -> None:
    """`serve` with a method that takes no time to make."""
    step_cases.settings = lambda preset, model, batch_size, **others: tiny_config(preset, **others)
    bench_step.serve(connection, *given)


@pytest.mark.slow
def test_a_case_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patched:
        patched.setattr(bench_step, "serve", served)
        case = bench_step.Apart("dual", "tiny", 2, 0)
    bench_settings = tiny_config("paper", drop_path=DROP_PATH)
    here = Ours(bench_settings)
    assert case.losses == pytest.approx(here.losses(made_batch(bench_settings, 2)), rel=1e-5)
    assert set(case.timed()) == set(PARTS)
    case.end()
    assert case.process.exitcode == 0


@pytest.mark.usefixtures("small")
def test_flops_are_those_of_the_products():
    """Of SdAE at the tiny size, counted by hand: two for each product and sum, thrice where gradients are needed."""
    case = make_case("plain-sdae", "tiny", 2)
    batch = case.given(made_batch(case.config, 2))
    total, attention = bench_step.flops_of(case, batch)
    images, width, deep = 2, 16, 8

    def blocks(rows: int, tokens: int, dim: int, depth: int) -> tuple[int, int]:
        return 2 * rows * tokens * 12 * dim * dim * depth, 4 * rows * tokens * tokens * dim * depth

    pixels = 48 * 16 * 16 * images * 2
    teacher, student = blocks(3 * images, 5, width, 2), blocks(images, 5, width, 2)
    decoder = blocks(images, 17, deep, 1)
    ends = 2 * images * (5 * width * deep + 17 * deep * width)
    # The teacher embeds its view once for all folds; the student's weights have a gradient of their own.
    expected = teacher[0] + teacher[1] + pixels + 2 * pixels + 3 * (student[0] + decoder[0] + ends)
    # Backward of attention is five products for the two of its forward.
    attended = teacher[1] + 3.5 * (student[1] + decoder[1])
    assert attention == attended
    assert total == expected - teacher[1] + attended


@pytest.mark.slow
def test_the_peak_is_that_of_memory_held():
    """A step that takes 64 MiB more than another shows them: each in its own process, as the benchmark measures.

    In a process that has freed larger tensors the step would get their pages.
    """
    little, much = (
        int(subprocess.check_output([sys.executable, "-m", "tests.programs.held_step", str(size)], env=environment()))
        for size in (1, 2**24)
    )
    assert much - little == pytest.approx(2**26, rel=0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_table_6_has_every_method_beside_the_papers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any):
    def measured(name: str, *rest: Any) -> str:
        case = make_case(name, "tiny", 2)
        loss = case.losses(made_batch(case.config, 2))[0]
        return json.dumps({"peak": 2**20 * (1 + (name == "dual")), "loss": loss})

    monkeypatch.setattr(bench_table6, "measured", measured)
    file, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    monkeypatch.setattr(sys, "argv", ["bench_table6", "--quick", "--json", str(file), "--plot", str(plot)])
    assert bench_table6.main() == 0
    rows = json.loads(file.read_text())
    assert all(set(row) == KEYS and row["gate"] for row in rows)
    found = {(row["case"], row["metric"]): row["value"] for row in rows}
    assert [round(found[name, "paper_time_over_sdae"], 2) for name in bench_table6.METHODS] == [
        1,
        5.08,
        1.16,
        1.16,
        1.28,
    ]
    assert round(found["dual", "paper_memory_over_sdae"], 2) == 1.29
    assert found["dual", "memory_over_sdae"] == 2
    assert found["sdae", "time_over_sdae"] == found["sdae", "flops_over_sdae"] == 1
    assert (
        found["mae", "flops_over_sdae"]
        < 1
        < found["single-step", "flops_over_sdae"]
        == found["dual", "flops_over_sdae"]
    )
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "1,600 epochs" in printed
    assert all(name in printed for name in bench_table6.NAMES)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_table_6_one_method_after_the_other_as_on_a_gpu():
    rows = bench_table6.rows_in_turn("tiny", 2, 3, torch.device("cpu"), "fp32", False)
    found = {(row.case, row.metric): row for row in rows}
    assert all(row.gate for row in rows)
    assert {case for case, _ in found} == set(bench_table6.METHODS)
    assert found["sdae", "time_over_sdae"].value == pytest.approx(1)
    assert found["dual", "time_over_sdae"].value == pytest.approx(
        found["dual", "step"].value / found["sdae", "step"].value
    )
    assert found["mae", "flops_over_sdae"].value < 1 < found["dual", "flops_over_sdae"].value
    assert "two teachers" in bench_table6.table6(rows)
