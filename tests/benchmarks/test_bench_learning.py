"""`bench_learning`: what it compares is fair, what it judges is right, and what is done is not done again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.bench_learning import Evening, curve_of, for_device, main
from benchmarks.learning_cases import BASE as BASE_FILE
from benchmarks.learning_cases import CASES, TABLES
from benchmarks.learning_judge import POOLS, Images, Judged, interval, judge, read, write
from benchmarks.learning_tables import lines_of, write_page
from fastpmae import Config
from fastpmae.config_file import read_config
from fastpmae.model.build import check
from fastpmae_loaders.errors import UserError
from tests.made import REPOSITORY

BASE = read_config(BASE_FILE)


def judged(case: str, seed: int, right: np.ndarray, equal: str = "steps") -> Judged:
    return Judged(
        case, seed, equal, 2, 1.0, {f"{m}/{p}": right for m in ("knn_val", "knn_train", "linear_val") for p in POOLS}
    )


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_run_that_differs_in_what_its_row_is_about(name):
    changed = BASE.using(**CASES[name].changes(BASE), beton=Path("x.beton"))
    check(changed)
    one, other = BASE.flat(), changed.flat()
    differing = {key for key in one if one[key] != other[key]} - {"beton"}
    assert differing <= set(CASES[name].changes(BASE))
    assert {"blr", "batch_size", "epochs", "seed", "mask_ratio", "image_size"}.isdisjoint(differing)


@pytest.mark.slow
def test_what_comes_after_mae_begins_with_its_encoder(small_beton, tmp_path, monkeypatch):
    """Half of the time is the first case's: its run comes first, and the second starts from it."""
    given = []

    def pretrained(config):
        given.append(config)
        return config.run.out

    monkeypatch.setattr("benchmarks.bench_learning.pretrain", pretrained)
    monkeypatch.setattr("benchmarks.bench_learning.load_encoder", lambda run: (None, None))
    monkeypatch.setattr("benchmarks.bench_learning.features_of", lambda *_: {})
    monkeypatch.setattr("benchmarks.bench_learning.seconds_of", lambda _: [2.0, 3.0])
    monkeypatch.setattr("benchmarks.bench_learning.curve_of", lambda _: [])
    base = BASE.using(epochs=12)
    evening = Evening(base, small_beton, small_beton, tmp_path / "runs", tmp_path / "results", 1)
    (tmp_path / "results" / "step-seconds.json").write_text('{"sdae": 0.6, "mae": 0.4}')
    epochs = evening.epochs_in_the_same_time("mae-sdae")
    result = evening.trained("mae-sdae", 5, "time", epochs)
    first, second = given
    assert (first.teacher.teachers, first.optimizer.epochs, first.run.init) == ("none", 15, None)
    assert (second.teacher.teachers, second.optimizer.epochs) == ("reconstruction", 10)
    assert second.run.init == str(first.run.out)
    assert (first.run.seed, second.run.seed, result.seconds) == (5, 5, 10.0)
    assert evening.epochs_in_the_same_time("mae-dual") == evening.epochs_in_the_same_time("mae-no-patch") == 6
    assert evening.epochs_in_the_same_time("mae") == 30


@pytest.mark.slow
def test_at_equal_steps_all_come_after_one_run_of_mae(small_beton, tmp_path, monkeypatch):
    given = []
    for name, value in (("load_encoder", (None, None)), ("features_of", {}), ("seconds_of", [2.0]), ("curve_of", [])):
        monkeypatch.setattr(f"benchmarks.bench_learning.{name}", lambda *_, value=value: value)
    monkeypatch.setattr("benchmarks.bench_learning.pretrain", lambda config: given.append(config) or config.run.out)
    base = BASE.using(epochs=4)
    evening = Evening(base, small_beton, small_beton, tmp_path / "runs", tmp_path / "results", 1, mae_epochs=7)
    for name in ("mae-sdae", "mae-dual-formed"):
        assert evening.trained(name, 2, "steps", 4).epochs == 4
    first, sdae, again, formed = given
    assert first == again
    assert (first.teacher.teachers, first.optimizer.epochs) == ("none", 7)
    assert sdae.run.init == formed.run.init == str(first.run.out)
    assert (sdae.teacher.teachers, sdae.optimizer.epochs) == ("reconstruction", 4)
    assert (formed.teacher.teachers, formed.loss.class_epsilon, formed.optimizer.epochs) == ("dual", 0.025, 4)


@pytest.mark.parametrize(
    ("case", "more", "sentence"),
    [
        ("mae-dual", [], "mae-dual comes after MAE: say --equal time, or --mae-epochs with equal steps"),
        ("mae-sdae", ["--equal", "time", "--mae-epochs", "3"], "mae-sdae comes after MAE: say --equal time, or"),
        ("pixels-dual", [], "pixels-dual gives half of its time to pixels: say --equal time"),
    ],
)
def test_cases_that_share_their_time_say_what_they_need(case, more, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_learning", "--cases", case, *more])
    assert main() == 2
    assert sentence in capsys.readouterr().err


def test_smaller_views_first_are_timed_by_each_size(small_beton, tmp_path, monkeypatch):
    """And a step of the case takes what its sizes take, each by its share of the epochs."""
    given = []

    def pretrained(config):
        given.append(config)
        return config

    cost = {(64, "dual"): 1.0, (64, "none"): 0.4, (48, "none"): 0.2}
    monkeypatch.setattr("benchmarks.bench_learning.pretrain", pretrained)
    monkeypatch.setattr("benchmarks.bench_learning.release", lambda: None)
    monkeypatch.setattr(
        "benchmarks.bench_learning.seconds_of",
        lambda _: [cost[given[-1].views.image_size, given[-1].teacher.teachers]],
    )
    assert CASES["progressive-resolution"].changes(BASE)["progressive_resolution"] == ("48:0.5", "64")
    evening = Evening(BASE.using(epochs=9), small_beton, small_beton, tmp_path / "runs", tmp_path / "results", 1)
    assert evening.epochs_in_the_same_time("progressive-resolution") == round(9 / (4 / 9 * 0.2 + 5 / 9 * 0.4))
    assert all(config.views.progressive_resolution == () for config in given)
    assert [config.views.image_size for config in given] == [64, 48, 64] * 3


def test_rows_of_table_8_take_the_base_s_own_weights():
    weights = {name: BASE.using(**CASES[name].changes(BASE)).loss for name in TABLES[8]}
    loss = BASE.loss
    assert (weights["weights-1-0-1"].lambda_c, weights["weights-1-0-1"].lambda_p) == (0, loss.lambda_p)
    assert (weights["weights-1-1-0"].lambda_c, weights["weights-1-1-0"].lambda_p) == (loss.lambda_c, 0)
    assert weights["weights-0-1-1"].lambda_m == 0
    assert BASE.using(**CASES["weights-1-0-0"].changes(BASE)).teacher.teachers == "reconstruction"


@pytest.mark.slow
def test_what_is_judged_equals_scikit_learn():
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 5
    rows = torch.randn(300, 12, generator=draw) + torch.nn.functional.one_hot(labels, 12)
    train, val = Images(torch.empty(0), labels[:200]), Images(torch.empty(0), labels[200:])
    right = judge({"class": (rows[:200], rows[200:])}, train, val)
    near = KNeighborsClassifier(10, metric="cosine").fit(rows[:200].numpy(), train.labels.numpy())
    assert (right["knn_val/class"] == (near.predict(rows[200:].numpy()) == val.labels.numpy())).all()
    alone = [
        KNeighborsClassifier(10, metric="cosine")
        .fit(np.delete(rows[:200].numpy(), i, 0), np.delete(train.labels.numpy(), i))
        .predict(rows[i : i + 1].numpy())[0]
        == train.labels[i].item()
        for i in range(200)
    ]
    assert (right["knn_train/class"] == np.array(alone)).all()
    scaled = (rows - rows[:200].mean(0)) / rows[:200].std(0, correction=0)
    found = [
        (
            LogisticRegression(C=c, max_iter=1000)
            .fit(scaled[:200].numpy(), train.labels.numpy())
            .predict(scaled[200:].numpy())
            == val.labels.numpy()
        )
        for c in (0.001, 0.01, 0.1)
    ]
    assert any((right["linear_val/class"] == one).mean() >= 0.99 for one in found)


def test_results_are_kept_to_the_bit(tmp_path):
    right = np.random.default_rng(0).random(1001) < 0.3
    write(judged("dual", 3, right), tmp_path / "x.json")
    again = read(tmp_path / "x.json")
    assert all((again.right[name] == right).all() for name in again.right)
    assert (again.case, again.seed, again.epochs) == ("dual", 3, 2)


@pytest.mark.slow
def test_the_interval_is_paired_and_covers():
    """Two sorters that fail on the same images differ by little and are told apart; by chance alone, seldom."""
    draw = np.random.default_rng(1)
    shared = draw.random(2000) < 0.4
    better = shared | (draw.random(2000) < 0.03)
    middle, low, high = interval([judged("a", 0, better)], [judged("b", 0, shared)], "knn_val/mean")
    assert middle == pytest.approx(better.mean() - shared.mean())
    assert 0 < low < middle < high
    outside = 0
    for _ in range(100):
        one, other = (draw.random(500) < 0.4 for _ in range(2))
        _, low, high = interval([judged("a", 0, one)], [judged("b", 0, other)], "knn_val/mean", resamples=400)
        outside += not low <= 0 <= high
    assert outside <= 15  # 5 expected; more than 15 has a chance below 1e-4


def test_seeds_are_paired():
    right = {seed: np.random.default_rng(seed).random(100) < 0.5 for seed in (0, 1)}
    ours = [judged("a", seed, right[seed]) for seed in (0, 1)]
    assert interval(ours, [judged("b", 1, right[1])], "knn_val/mean") == (0, 0, 0)


def test_tables_and_page(tmp_path):
    right = np.arange(100) < 40
    found = {
        ("dual", "steps"): [judged("dual", 0, right), judged("dual", 1, right)],
        ("sdae", "steps"): [judged("sdae", 0, np.arange(100) < 30)],
        ("random", "steps"): [judged("random", 0, np.arange(100) < 20)],
    }
    lines = list(lines_of(found))
    (row,) = [line for line in lines if line.startswith("| SdAE")]
    assert row.count("+10.0 (") == 4
    assert row.endswith("| 74.19 |")
    others = list(lines_of(found, "sdae"))
    (row_of_dual,) = [line for line in others if line.startswith("| Pseudo-MAE")]
    assert row_of_dual.count("-10.0 (") == 4
    assert not any("(" in line.removeprefix("| SdAE") for line in others if line.startswith("| SdAE"))
    assert "10-NN, leave one out: class token" in lines[3]
    of_others = list(lines_of(found, judged_on="val"))
    assert "10-NN, val: class token" in of_others[3]
    assert "linear, val: class token" in of_others[3]
    page = tmp_path / "page.md"
    marker = "<!-- {}: written by benchmarks/bench_learning.py -->\n{}\n<!-- end of {} -->\n"
    page.write_text("a\n" + marker.format("other", "kept", "other") + marker.format("base", "old", "base") + "z\n")
    write_page(page, "base", lines)
    text = page.read_text()
    assert text.startswith("a\n")
    assert text.endswith("<!-- end of base -->\nz\n")
    assert "kept" in text
    assert row in text
    assert "old" not in text
    with pytest.raises(UserError, match="has no place for these tables"):
        write_page(page, "unknown", lines)


def test_what_a_gpu_changes_of_the_base():
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert for_device(BASE, cpu, None) == BASE
    with pytest.raises(UserError, match="--device cuda"):
        for_device(BASE, cpu, "default")
    for base, mode, expected in (
        (BASE, None, "reduce-overhead"), (BASE, "default", "default"), (BASE.using(accumulate=2), None, "default"),
    ):  # fmt: skip
        efficiency = for_device(base, gpu, mode).efficiency
        assert (efficiency.compile, efficiency.compile_mode) == ("on", expected)
        check(for_device(base, gpu, mode))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_gets_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_learning", "--device", "cuda"])
    assert main() == 2
    assert "--device cuda: torch sees no GPU here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_is_done_is_not_done_again(small_beton, tmp_path):
    """The command, twice: the second time nothing is trained."""
    base = tmp_path / "base.json"
    tiny = {"width": 32, "depth": 1, "heads": 2, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    config = BASE.using(**tiny, head_hidden=32, head_bottleneck=16, prototypes=16, image_size=32, batch_size=8)
    base.write_text(json.dumps(config.groups()))
    command = [
        sys.executable, "-m", "benchmarks.bench_learning", "--train", str(small_beton), "--val", str(small_beton),
        "--base", str(base), "--cases", "dual", "mae", "--epochs", "1", "--out", str(tmp_path / "runs"),
        "--results", str(tmp_path / "results"),
        "--plot", str(tmp_path / "plot.png"), "--json", str(tmp_path / "rows.json"),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}:{REPOSITORY / 'loaders'}"}
    outputs = [
        subprocess.run(command, cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=300)
        for _ in range(2)
    ]
    assert [output.returncode for output in outputs] == [0, 0], outputs[0].stderr[-2000:]
    assert "dual-steps-1-seed0:" in outputs[0].stdout
    assert "dual-steps-1-seed0:" not in outputs[1].stdout
    assert "**Table 6, equal steps**" in outputs[1].stdout
    names = {"dual-steps-1-seed0.json", "mae-steps-1-seed0.json", "random-seed0.json", "thumbnails-seed0.json"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == names
    curve = json.loads((tmp_path / "results" / "dual-steps-1-seed0.json").read_text())["curve"]
    assert curve[-1]["step"] == 5
    assert all(set(point) == {"step", "epoch", "loss", "loss_m", "loss_c", "loss_p", "seconds"} for point in curve)
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    cases = {row["case"] for row in json.loads((tmp_path / "rows.json").read_text())}
    assert cases == {"dual", "mae", "random", "thumbnails"}


@pytest.mark.parametrize("base", sorted((REPOSITORY / "docs/learning").glob("*.json")), ids=lambda path: path.stem)
def test_the_bases_of_the_pages_tables_are_read(base: Path) -> None:
    assert read_config(base) != Config()


def test_a_long_runs_curve_is_of_means(monkeypatch):
    rows = [{"step": step, "epoch": step / 10, "loss": float(step), "lr": 0.1} for step in range(1, 8)]
    monkeypatch.setattr("benchmarks.bench_learning.rows_of", lambda _: rows)
    monkeypatch.setattr("benchmarks.bench_learning.seconds_of", lambda _: [2.0] * 7)
    monkeypatch.setattr("benchmarks.bench_learning.LONGEST_CURVE", 3)
    found = curve_of(Path("run"))
    assert [point["step"] for point in found] == [3, 6, 7]
    assert [point["loss"] for point in found] == [2.0, 5.0, 7.0]
    assert [point["seconds"] for point in found] == [6.0, 6.0, 2.0]
    assert all(set(point) == {"step", "epoch", "loss", "seconds"} for point in found)
    monkeypatch.setattr("benchmarks.bench_learning.LONGEST_CURVE", 7)
    assert [point["loss"] for point in curve_of(Path("run"))] == [1, 2, 3, 4, 5, 6, 7]
