"""The loader's benchmark as a command: its rows, its checks, its processes and its sentences."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import bench_loader, loader_cases, loader_checks, loader_kinds, loader_turns
from benchmarks.loader_baselines import Task
from benchmarks.loader_cases import Case, Shown
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.sources.beton import COEFFICIENTS
from fastpmae_loaders.write.write import write_beton
from tests.engines import needs_ffcv
from tests.made import REPOSITORY, made_image

ROOT = Path(__file__).parents[2]
KEYS = {"case", "metric", "unit", "value", "low", "high", "baseline", "ratio", "gate", "device", "versions", "date"}
REQUIRED = {
    "ours-native", "ours-native-coefficients", "ours-ffcv", "ours-dali", "ours-torch", "ours-ffcv-device-colour",
    "ours-ffcv-geometry", "ffcv-stock", "dali-stock", "torchvision", "torchvision-geometry", "timm", "decode-only",
}  # fmt: skip


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small JPEGs of two classes."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(12):
        place = folder / f"class{number % 2}"
        place.mkdir(exist_ok=True)
        made_image(number, 90 + number, 80).save(place / f"{number}.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def task(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Task:
    images = bench_loader.prepare(photographs, tmp_path_factory.mktemp("prepared"), 24)
    task = Task("ours-torch", images.beton, images.folder, batch=4, workers=1, side=48)
    bench_loader.write_coefficients(task)
    return task


def command(*flags: str | Path) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "benchmarks.bench_loader", *map(str, flags)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_every_case_that_is_named_is_there():
    assert set(loader_cases.CASES) >= REQUIRED
    assert set(bench_loader.QUICK) == REQUIRED
    compared = {name for case in REQUIRED for name in bench_loader.baselines_of(case, REQUIRED)}
    others = {"ffcv-stock", "dali-stock", "torchvision", "torchvision-geometry", "timm", "decode-only"}
    assert compared == others | {"ours-native", "ours-ffcv"}
    assert {"torchvision", "ours-ffcv", "decode-only"} <= set(bench_loader.baselines_of("ours-native", REQUIRED))
    wanted = {"torchvision", "ours-native", "decode-only"}
    assert wanted <= set(bench_loader.baselines_of("ours-native-coefficients", REQUIRED))
    assert set(bench_loader.PEERS) <= set(bench_loader.baselines_of("ours-native", loader_cases.CASES))


@needs_ffcv
@pytest.mark.slow
def test_the_command_writes_rows_with_their_names_and_keys(photographs: Path, tmp_path: Path):
    file, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    cases = ["ours-torch", "ours-ffcv-geometry", "torchvision", "torchvision-geometry", "decode-only"]
    sizes = ["--batch", "8", "--side", "64", "--workers", "2"]
    result = command("--quick", "--data", photographs, "--json", file, "--plot", plot, *sizes, "--cases", *cases)
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())
    assert all(set(row) == KEYS and row["gate"] for row in rows)
    assert all(0 < row["low"] <= row["value"] <= row["high"] for row in rows)
    pairs = {(row["case"], row["baseline"]) for row in rows if row["metric"] == "images_per_second"}
    assert pairs == {
        ("ours-torch", "torchvision"),
        ("ours-torch", "decode-only"),
        ("ours-ffcv-geometry", "torchvision-geometry"),
        ("ours-ffcv-geometry", "decode-only"),
        ("torchvision", None),
        ("torchvision-geometry", None),
        ("decode-only", None),
    }
    assert {row["metric"] for row in rows} == {"images_per_second", "cpu_seconds_per_image"}
    for row in rows:
        if row["baseline"] == "torchvision" and row["metric"] == "images_per_second":
            baseline = next(r for r in rows if r["case"] == "torchvision" and r["metric"] == row["metric"])
            assert row["ratio"] == pytest.approx(row["value"] / baseline["value"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert str(photographs) in result.stdout


def records_of(task: Task, speeds: dict[str, list[float]]) -> list[loader_turns.Record]:
    return [
        loader_turns.Record(
            replace(task, case=case), first_batch=1.0, peaks=[100.0],
            rounds=[loader_turns.Round(1.0, 2.0, int(speed)) for speed in found],
        )
        for case, found in speeds.items()
    ]  # fmt: skip


def test_more_images_and_less_of_the_rest_is_better(task: Task):
    records = records_of(task, {"ours-ffcv": [300, 200, 250], "torchvision": [50, 50, 50], "decode-only": [500]})
    rows = bench_loader.rows_of(records, "here")
    ratios = {(row.metric, row.case, row.baseline): row.ratio for row in rows}
    assert ratios["images_per_second", "ours-ffcv", "torchvision"] == 5
    assert ratios["images_per_second", "ours-ffcv", "decode-only"] == 0.5
    assert ratios["cpu_seconds_per_image", "ours-ffcv", "torchvision"] == pytest.approx(5)
    assert ratios["peak_memory", "ours-ffcv", "torchvision"] == 1
    assert ("peak_memory", "ours-ffcv", "decode-only") not in ratios
    assert ratios["first_batch", "ours-ffcv", None] is None


@pytest.mark.parametrize("wrong", ["ours-ffcv", "torchvision"])
def test_nothing_is_claimed_of_a_wrong_output(task: Task, wrong: str):
    records = records_of(task, {"ours-ffcv": [300], "torchvision": [50]})
    next(record for record in records if record.task.case == wrong).wrong = "all black"
    rows = bench_loader.rows_of(records, "here")
    compared = [row for row in rows if row.baseline]
    assert compared
    assert all(row.ratio is None and not row.gate for row in compared)


def shown_first(task: Task) -> Shown:
    return next(loader_cases.CASES[task.case].open(task))


OURS = ["ours-native", "ours-native-coefficients", "ours-torch"]
OURS_BY_FFCV = ["ours-ffcv", "ours-ffcv-geometry", "ours-ffcv-device-colour"]


@pytest.mark.parametrize("case", [*OURS, *(pytest.param(case, marks=needs_ffcv) for case in OURS_BY_FFCV)])
def test_ours_passes_its_check_and_fails_it_when_a_pixel_out_of_place(task: Task, case: str):
    """Negative controls: a view one pixel aside, mirrored, of another sample, or a little too bright."""
    task = replace(task, case=case)
    shown = shown_first(task)

    def verdict(change=None, number: int = 0) -> str:
        views = list(shown.views)
        if change is not None:
            views[number] = change(views[number])
        return loader_checks.check(task, loader_checks.evidence(replace(shown, views=tuple(views)), case))

    assert verdict() == ""
    for number in (0, 1):
        assert "from the reference" in verdict(lambda view: view.roll(1, dims=3), number)
        assert "from the reference" in verdict(lambda view: view.flip(3), number)
        assert "from the reference" in verdict(lambda view: view.roll(1, dims=0), number)
        assert "from the reference" in verdict(lambda view: view.clamp(max=252) + 3, number)
    assert "not uint8" in verdict(lambda view: view.float())
    assert "not two of" in verdict(lambda view: view[:, :, 1:])
    assert "same" in loader_checks.check(
        task, loader_checks.evidence(replace(shown, views=(shown.views[0], shown.views[0])), case)
    )


def test_a_black_baseline_fails_its_check(task: Task):
    task = replace(task, case="torchvision")
    shown = Shown(task.batch, (torch.zeros(4, 3, 48, 48, dtype=torch.uint8),) * 2)
    assert "no photographs" in loader_checks.check(task, loader_checks.evidence(shown, task.case))


@needs_ffcv
def test_the_ceiling_decodes_what_is_there(task: Task):
    task = replace(task, case="decode-only")
    shown = shown_first(task)
    assert loader_checks.check(task, loader_checks.evidence(shown, task.case)) == ""
    turned = tuple(image.flip(0) for image in shown.views)
    wrong = loader_checks.check(task, loader_checks.evidence(replace(shown, views=turned), task.case))
    assert "from Pillow's" in wrong


@pytest.mark.slow
@pytest.mark.parametrize("case", ["torchvision", "torchvision-tensor", "torchvision-tensor-geometry", "timm"])
def test_the_baselines_pass_their_checks(task: Task, case: str):
    task = replace(task, case=case)
    assert loader_checks.check(task, loader_checks.evidence(shown_first(task), case)) == ""


def test_all_cases_read_the_same_bytes(task: Task, photographs: Path):
    beton = loader_cases.Beton(task.beton)
    files = [Path(file) for file in task.files]
    assert len(files) == 12
    assert len(beton) == 24
    for index in range(24):
        assert beton.payload(index).tobytes() == files[index % 12].read_bytes()
    originals = {file.read_bytes() for file in photographs.rglob("*.jpg")}
    assert {file.read_bytes() for file in files} == originals


def test_coefficients_are_those_of_the_same_images(task: Task):
    """Sample by sample, of 12 images 24 times."""
    jpegs, coded = loader_cases.Beton(task.beton), loader_cases.Beton(task.coefficients)
    assert len(jpegs) == len(coded) == 24
    assert (coded.mode == COEFFICIENTS).all()
    for index in range(24):
        assert np.array_equal(jpegs.decode(index), coded.decode(index))


@pytest.mark.parametrize("kind", loader_kinds.KINDS)
def test_an_image_of_every_kind(photographs: Path, tmp_path: Path, kind: str):
    loader_kinds.write_kind(kind, photographs / "class0", tmp_path / "made", 1)
    with Image.open(tmp_path / "made" / "0000.jpg") as image:
        size = "x".join(map(str, image.size))
        assert kind.startswith(size)
        assert (image.mode == "L") == ("gray" in kind)
        assert ("progressive" in image.info) == ("progressive" in kind)
        if image.mode == "RGB":
            first, second, third = (layer[1:3] for layer in image.layer)  # pyright: ignore[reportAttributeAccessIssue]
            assert second == third == (1, 1)
            assert first == ((1, 1) if "4:4:4" in kind else (2, 2))


@pytest.mark.slow
def test_kinds_are_swept(photographs: Path, tmp_path: Path):
    sizes = ["--batch", "12", "--side", "48", "--workers", "1", "--cases", "ours-native-coefficients", "torchvision"]
    file = tmp_path / "rows.json"
    done = command("--quick", "--kinds", "--data", photographs, "--json", file, "--plot", tmp_path / "p.png", *sizes)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert {row["case"].split(" kind=")[1] for row in rows} == set(loader_kinds.KINDS)
    assert all(row["gate"] for row in rows)
    assert (tmp_path / "p_kinds.png").exists()


def test_raw_pixels_are_refused(photographs: Path, tmp_path: Path):
    write_beton(photographs, tmp_path / "raw.beton", mode="raw")
    with pytest.raises(UserError, match="holds raw pixels"):
        bench_loader.prepare(tmp_path / "raw.beton", tmp_path, 10)


def counting(task: Task) -> Iterator[Shown]:
    """A case that works on one core and holds 64 MiB; each batch says when it was made."""
    held = np.ones(64 << 20, np.uint8)
    views = torch.from_numpy(np.array(Image.effect_noise((8, 8), 80))).expand(2, 3, 8, 8)
    while True:
        end = time.process_time() + 0.02
        while time.process_time() < end:
            held[0] ^= 1
        yield Shown(task.batch, (views, views))


def failing(task: Task) -> Iterator[Shown]:
    raise ValueError("no such thing")
    yield


@pytest.fixture
def turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[loader_turns.Turns]:
    monkeypatch.setitem(loader_cases.CASES, "counting", Case(counting))
    monkeypatch.setitem(loader_cases.CASES, "failing", Case(failing))
    monkeypatch.setitem(loader_cases.CASES, "absent", Case(failing, ("no_such_package",)))
    with loader_turns.Turns(tmp_path, forked=True) as turns:
        yield turns


@pytest.mark.slow
def test_a_round_counts_images_time_and_the_memory_held(task: Task, turns: loader_turns.Turns):
    task = replace(task, case="counting", batch=2)
    turns.start(task)
    seconds, _ = turns.opened("counting")
    assert seconds > 0
    record = loader_turns.Record(task)
    loader_turns.take_turns(turns, [record], 2, 0.4, warm_up=False)
    assert len(record.rounds) == 2
    for found in record.rounds:
        batches = found.images / 2
        assert found.cpu_seconds == pytest.approx(0.02 * batches, rel=0.2, abs=0.03)
        assert found.seconds >= 0.9 * found.cpu_seconds
    loader_turns.watch_memory(turns, [record], 1, 10)
    assert record.peaks[0] > 64


def test_a_case_stands_still_while_it_is_not_its_turn(task: Task, turns: loader_turns.Turns):
    turns.start(replace(task, case="counting"))
    turns.opened("counting")
    process = turns._running["counting"][0].pid
    deadline = time.monotonic() + 10
    while (states := {fields[0] for _, fields in loader_turns.group_members(process)}) != {"T"}:
        assert time.monotonic() < deadline, states
    turns.end("counting")
    assert not list(loader_turns.group_members(process))


def test_what_cannot_be_opened_is_left_out_with_a_sentence(task: Task, turns: loader_turns.Turns):
    said = []
    tasks = [replace(task, case=case) for case in ("absent", "failing")]
    assert bench_loader.open_all(turns, tasks, 2, said.append) == []
    assert said[0] == "absent is left out: the package no_such_package is not installed"
    assert "failing: ValueError: no such thing" in said[1]


def test_children_are_part_of_a_case():
    """CPU time and memory are those of the process group."""
    process = subprocess.Popen([sys.executable, REPOSITORY / "tests/programs/two_that_work.py"])
    try:
        deadline = time.monotonic() + 20
        while loader_turns.cpu_seconds(process.pid) < 0.3 or loader_turns.memory(process.pid) < 64:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(list(loader_turns.group_members(process.pid))) == 2
        assert loader_turns.memory(process.pid) < 100
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_the_plot_of_a_sweep_needs_no_more_than_its_rows(task: Task, tmp_path: Path):
    rows = []
    for workers, side in ((1, 224), (2, 224), (2, 128)):
        records = records_of(task, {"ours-ffcv": [300], "torchvision": [50]})
        rows += bench_loader.rows_of(records, "here", f" workers={workers} side={side}")
    assert rows[0].case == "ours-ffcv workers=1 side=224"
    assert rows[0].baseline == "torchvision workers=1 side=224"
    bench_loader.draw_scale(rows, "title", tmp_path / "scale.png")
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_data_that_is_not_there_is_said_in_a_sentence(tmp_path: Path):
    result = command("--quick", "--data", tmp_path / "nothing", "--cases", "ours-torch")
    assert result.returncode == 2
    assert "nothing" in result.stderr
    assert "Traceback" not in result.stderr
