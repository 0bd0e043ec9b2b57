"""`benchmarks.on_gpu`: that every stage's code runs, that figures outlive what fails, and what the page claims."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import on_gpu
from benchmarks.gpu import kernel_stages, pack, page, train_stages
from benchmarks.gpu.images import ORIGINALS, TRAIN, VAL, find_images, repeated
from benchmarks.gpu.record import Record, read_results
from benchmarks.gpu.task import FULL, TINY, Task
from fastpmae_loaders import Beton
from fastpmae_loaders.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PATHS = (ROOT, ROOT / "kernels", ROOT / "loaders")


def command(*words: Any, module: str = "benchmarks.on_gpu", **environment: str) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | paths | environment,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_stage_runs_on_the_cpu(tmp_path: Path):
    docs = {path: path.stat().st_mtime_ns for path in (ROOT / "docs").rglob("*")}
    # the budget is another matter: on a busy machine a stage that is not begun would say nothing of its code
    # and what torch makes of a compiled step on a CPU, in minutes, is tests/test_train.py's
    done = command("--tiny", "--out", tmp_path, "--budget", 1500, TORCHDYNAMO_DISABLE="1")
    results = page.Results(tmp_path / "results.jsonl")
    failed = {stage.name: stage.failed for stage in results.stages.values() if not stage.passed}
    assert (done.returncode, failed) == (0, {}), done.stderr[-3000:]
    assert list(results.stages) == list(on_gpu.STAGES)
    assert all(stage.rows for stage in results.stages.values())
    assert "FAILED" not in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "docs").rglob("*")} == docs
    # what a CPU has measured never becomes a page about GPUs
    written = command("--page", tmp_path / "gpu.md", "--results", tmp_path / "results.jsonl")
    assert written.returncode == 2
    assert "was not measured on a GPU" in written.stderr
    assert not (tmp_path / "gpu.md").exists()


@pytest.mark.slow
def test_a_stage_that_fails_makes_the_status_1_and_ends_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stage that raises, one that is killed, one that runs into its limit; figures found before stay."""
    stages = tmp_path / "failing_stages.py"
    stages.write_text(
        "import os, signal, time\n"
        "def raises(task):\n"
        "    task.record.note('before', value=1)\n"
        "    raise ValueError('as it must')\n"
        "def dies(task):\n"
        "    task.record.note('before', value=2)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "def lasts(task):\n"
        "    task.record.note('before', value=3)\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    time.sleep(600)\n"
        "def checks(task):\n"
        "    task.record.check('nan', float('nan'), 1.0)\n"
        "def works(task):\n"
        "    task.record.check('fine', 0.5, 1.0)\n"
    )
    names = ("raises", "dies", "lasts", "checks", "works")
    limits = dict.fromkeys(names, 60.0) | {"lasts": 12.0 / on_gpu.SLOWER}
    monkeypatch.setattr(
        on_gpu, "STAGES", {name: on_gpu.Stage(limits[name], f"failing_stages:{name}") for name in names}
    )  # fmt: skip
    monkeypatch.setattr(on_gpu, "GRACE", 1.0)
    monkeypatch.setattr(sys, "argv", ["on_gpu", "--tiny", "--out", str(tmp_path / "out")])
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path, *PATHS))))
    assert on_gpu.main() == 1
    results = page.Results(tmp_path / "out/results.jsonl")
    assert [stage.passed for stage in results.stages.values()] == [False, False, False, False, True]
    assert [results.figure(name, "before", "value") for name in names[:3]] == [1, 2, 3]
    assert "ValueError: as it must" in str(results.stages["raises"].failed)
    table = page.stages_table(results)
    assert "| lasts | cut off |" in table
    assert "| works | passed |" in table


@pytest.mark.slow
def test_without_a_gpu_it_says_so_in_a_sentence(tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = command("--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "on_gpu: error: torch finds no GPU here; --tiny tries the command on the CPU\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("", "there is nothing in it"),
        ("no json\n", "line 1, is no JSON"),
        ("[1]\n", "names no stage and figure"),
        ('{"stage": "step", "name": "dual"}\n', "has figures and no beginning"),
        ('{"stage": "step", "name": "started", "device_type": "cpu"}\n', "was not measured on a GPU"),
        ('{"stage": "step", "name": "started", "device_type": "cuda", "tiny": true}\n', "was not measured on a GPU"),
    ],
)
def test_no_page_of_anything_else(lines: str, sentence: str, tmp_path: Path):
    (tmp_path / "results.jsonl").write_text(lines)
    with pytest.raises(UserError, match=sentence):
        page.write_page(tmp_path / "gpu.md", [tmp_path / "results.jsonl"])
    assert not (tmp_path / "gpu.md").exists()


@pytest.mark.slow
def test_a_file_that_is_not_there_is_a_sentence(tmp_path: Path):
    done = command("--page", tmp_path / "gpu.md", "--results", tmp_path / "none.jsonl")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert command("--page", tmp_path / "gpu.md").returncode == 2


def gpu_results(file: Path, **changes: Any) -> Path:
    """What a GPU that meets every aim would leave, with other figures by `stage/line/key`."""
    about = {"device_type": "cuda", "device": "NVIDIA H100 80GB HBM3", "cores": 16, "versions": {"torch": "2.11.0"}}
    of_step = {"model": "vit_base", "batch": 256, "compiled": True}
    figures: dict[str, list[dict[str, Any]]] = {
        "kernels": [{"name": "sinkhorn", "value": 1e-5, "limit": 2e-4, "ok": True}] * 3,
        "bandwidth": [
            {"name": "matrix product", "flops_per_second": 790e12},
            {"name": "sinkhorn", "of_copy": 0.85, "times": 9.0},
            {"name": "cross_entropy with its gradient", "of_copy": 0.85, "times": 9.0},
        ],
        "step": [
            {"name": "dual", "case": "dual", **of_step, "step_ms": 100.0, "images_per_second": 2560.0, "peak_gib": 30.0,
             "flops_per_second": 400e12, "flops_of_an_image": 2e11},
            {"name": "small", "case": "dual", **of_step, "model": "vit_small", "step_ms": 50.0,
             "images_per_second": 5120.0, "peak_gib": 3.0, "flops_per_second": 100e12, "flops_of_an_image": 1e11},
            {"name": "plain", "case": "plain-dual", **of_step, "step_ms": 150.0, "images_per_second": 1700.0,
             "peak_gib": 50.0, "flops_per_second": 250e12, "flops_of_an_image": 2e11},
        ],
        "table6": [{"name": "dual over sdae, compiled", "time_over_flops": 1.02, "memory": 1.05}],
        "train": [{"name": "train vit_base", "images_per_second": 2000.0, "data_wait": 0.01}],
        "plan": [{"name": "plan of dual", "compiled": True, "time": 1.1, "memory": 0.9}],
        "dali": [
            {"name": "dali: the same crops, flips and masks", "ok": True},
            {"name": "dali, parts of 64", "images_per_second": 9000.0},
        ],
        "learning": [
            {"name": f"learning {method}", "epochs": 100} for method in ("mae", "sdae", "dual", "mae-dual", "mae-sdae")
        ],
    }  # fmt: skip
    lines = []
    for stage, rows in figures.items():
        lines.append({"stage": stage, "name": "started", "date": "2026-01-02T03:04:05", **about})
        for row in rows:
            changed = {
                key.split("/")[2]: value for key, value in changes.items() if key.startswith(f"{stage}/{row['name']}/")
            }
            lines.append({"stage": stage, "seconds": 1.0, **row, **changed})
        lines.append({"stage": stage, "name": "ended", "status": 0, "limit": None, "seconds": 12.0})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_the_page_says_what_was_met_and_on_what(tmp_path: Path):
    page.write_page(tmp_path / "gpu.md", [gpu_results(tmp_path / "results.jsonl")])
    text = (tmp_path / "gpu.md").read_text()
    assert "- NVIDIA H100 80GB HBM3, 16 cores; torch 2.11.0; 2026-01-02" in text
    assert text.count("| yes |") == len(page.AIMS)
    assert "1.51 x, 0.60 of its memory, 51% of the matrix rate (vit_base)" in text


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        ("kernels/sinkhorn/ok", False, "each kernel against float64"),
        ("bandwidth/sinkhorn/of_copy", 0.79, "Sinkhorn sweep"),
        ("bandwidth/sinkhorn/times", 7.9, "Sinkhorn sweep"),
        ("bandwidth/cross_entropy with its gradient/of_copy", 0.5, "prototype loss and gradient"),
        ("step/dual/images_per_second", 2000.0, "step of dual"),
        ("step/dual/peak_gib", 36.0, "step of dual"),
        ("step/dual/flops_per_second", 300e12, "step of dual"),
        ("table6/dual over sdae, compiled/time_over_flops", 1.04, "dual over our own sdae"),
        ("table6/dual over sdae, compiled/memory", 1.11, "dual over our own sdae"),
        ("train/train vit_base/data_wait", 0.021, "fastpmae-train from original JPEGs"),
        ("dali/dali: the same crops, flips and masks/ok", False, "DALI, decoding"),
        ("plan/plan of dual/time", 1.16, "fastpmae-plan"),
        ("plan/plan of dual/memory", 0.84, "fastpmae-plan"),
        ("learning/learning dual/epochs", 99, "learning"),
    ],
)
def test_an_aim_that_is_missed_is_called_so(place: str, value: Any, what: str, tmp_path: Path):
    results = page.Results(gpu_results(tmp_path / "results.jsonl", **{place: value}))
    missed = [line for line in page.aims_table(results).splitlines() if line.endswith("| no |")]
    assert len(missed) == 1
    assert missed[0].startswith(f"| {what}")


def test_checks_that_were_cut_off_are_not_all_of_them(tmp_path: Path):
    file = gpu_results(tmp_path / "results.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [line for line in lines if (line["stage"], line["name"]) != ("kernels", "ended")]
    file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    line = page.aims_table(page.Results(file)).splitlines()[2]
    assert "3 of 3 checks within their bounds, and the stage did not come to its end | no |" in line


def test_steps_are_compared_of_one_model_and_with_losses_that_agree(tmp_path: Path):
    """Where the baseline of the largest model failed, ours is not held against the baseline of a smaller one."""
    results = page.Results(gpu_results(tmp_path / "results.jsonl", **{"step/plain/model": "vit_small"}))
    found = page._step(results)
    assert found is not None
    assert found == ("3.01 x, 0.06 of its memory, 13% of the matrix rate (vit_small)", False)
    results = page.Results(gpu_results(tmp_path / "results.jsonl", **{"step/small/model": "vit_small"}))
    assert page._step(results) == ("1.51 x, 0.60 of its memory, 51% of the matrix rate (vit_base)", True)
    wrong = {"name": "dual, vit_base, compiled: losses against eager", "ok": False}
    results.stages["step"].rows.append(wrong)
    found = page._step(results)
    assert found is not None
    assert found[0].endswith("with losses that are apart")
    assert not found[1]


def test_what_was_not_measured_is_not_met(tmp_path: Path):
    (tmp_path / "results.jsonl").write_text(
        json.dumps({"stage": "step", "name": "started", "device_type": "cuda"}) + "\n" + '{"stage": "st'
    )
    results = page.Results(tmp_path / "results.jsonl")
    assert page.aims_table(results).count("| not measured |  |") == len(page.AIMS)
    assert "| step | cut off |" in page.stages_table(results)


def test_what_was_measured_when_sdae_was_another_method_is_marked(tmp_path: Path):
    of = {"step/plain/decoder_class_token": True, "step/small/decoder_class_token": False}
    page.write_page(tmp_path / "gpu.md", [gpu_results(tmp_path / "results.jsonl", **of)])
    (line,) = [line for line in (tmp_path / "gpu.md").read_text().splitlines() if line.startswith(page.UNLIKE)]
    assert line.endswith(": small.")


def test_a_stage_that_ran_again_counts_once(tmp_path: Path):
    first = gpu_results(tmp_path / "first.jsonl", **{"train/train vit_base/data_wait": 0.5})
    second = gpu_results(tmp_path / "second.jsonl")
    results = page.Results(first, second)
    assert len(results.rows("train")) == 1
    assert results.figure("train", "train vit_base", "data_wait") == 0.01


def test_hostile_words_stay_in_their_cell(tmp_path: Path):
    name = "a | b\n# <script>"
    results = page.Results(gpu_results(tmp_path / "results.jsonl", **{"train/train vit_base/name": name}))
    table = page.figures_table(results.stages["train"])
    assert len(table.splitlines()) == 3
    assert "a \\| b # &lt;script>" in table


def test_a_check_that_kernels_must_fail_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A Sinkhorn that is a little wrong, and one that gives NaN, do not pass."""
    record = Record(tmp_path / "results.jsonl", "kernels", torch.device("cpu"))
    task = Task(torch.device("cpu"), True, record, tmp_path, tmp_path, tmp_path, time.monotonic() + 60, (), 1)
    right = kernel_stages.sinkhorn_bias
    for wrong in (lambda *words: right(*words) + 1e-3, lambda *words: right(*words) * float("nan")):
        monkeypatch.setattr(kernel_stages, "sinkhorn_bias", wrong)
        kernel_stages.check_sinkhorn(task, 70, 300, torch.float32)
    monkeypatch.setattr(kernel_stages, "sinkhorn_bias", right)
    kernel_stages.check_sinkhorn(task, 70, 300, torch.float32)
    assert [row["ok"] for row in read_results(record.file)] == [False, False, True]


def test_what_the_time_does_not_hold_is_left_out_with_a_reason(tmp_path: Path):
    record = Record(tmp_path / "results.jsonl", "step", torch.device("cpu"))
    task = Task(torch.device("cpu"), True, record, tmp_path, tmp_path, tmp_path, time.monotonic() + 30, (), 1)
    assert task.has(20, "short")
    assert not task.has(40, "long")
    (row,) = read_results(record.file)
    assert row["name"] == "long"
    assert row["left_out"].startswith("it takes about 40 s, and 3")


def test_rows_lie_among_nan():
    inside = kernel_stages.among_nan(5, 7, torch.float16, torch.device("cpu"))
    assert inside.shape == (5, 7)
    assert inside.isfinite().all()
    around = inside.as_strided((7, 15), inside.stride(), inside.storage_offset() - inside.stride(0))
    assert int(around.isnan().sum()) == 7 * 15 - 5 * 7


def test_rows_apart_is_the_worst_of_all_figures():
    row: dict[str, float] = dict.fromkeys(train_stages.COMPARED, 2.0)
    assert train_stages.rows_apart([row, row], [row, row]) == 0.0
    assert train_stages.rows_apart([row, row | {"loss_p": 2.5}], [row, row]) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="zip"):
        train_stages.rows_apart([row], [row, row])


@pytest.mark.slow
@pytest.mark.parametrize("deaf", [False, True])
def test_a_run_that_is_stopped_leaves_its_rows(deaf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = tmp_path / "trainer"
    rows = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2))
    partial = json.dumps({"step": 3, "loss": 1.0, "partial": True}) + "\n"
    trainer.write_text(
        f"#!{sys.executable}\nimport signal, sys, time\n"
        f"open({str(tmp_path / 'metrics.jsonl')!r}, 'w').write({rows + partial!r})\n"
        f"signal.signal(signal.SIGTERM, lambda *_: None if {deaf} else sys.exit(143))\n"
        "end = time.monotonic() + 60\nwhile time.monotonic() < end: time.sleep(0.05)\n"
    )
    trainer.chmod(0o755)
    monkeypatch.setattr(train_stages.sys, "executable", str(trainer))
    monkeypatch.setattr(train_stages, "STOPPING", 0.5)
    found = train_stages.run_train(tmp_path, seconds=5.0, whole=False)
    assert [row["step"] for row in found] == [1, 2]
    with pytest.raises(RuntimeError, match="stopped after 0 s"):
        train_stages.run_train(tmp_path, seconds=0.1)


def test_images_are_drawn_where_there_are_none(tmp_path: Path):
    folder = find_images(None, tmp_path, tiny=True)
    assert [len(Beton(folder / name)) for name in (ORIGINALS, TRAIN, VAL)] == [16, 48, 24]
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert find_images(None, tmp_path, tiny=True) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    more = Beton(repeated(Beton(folder / ORIGINALS), tmp_path / "more.beton", 40))
    assert len(more) == 48
    assert more.payload(17).tobytes() == more.payload(1).tobytes()
    with pytest.raises(UserError, match=r"lacks originals\.beton"):
        find_images(tmp_path, tmp_path, tiny=False)


def test_machine_code_of_other_gpus_becomes_zeros():
    """A fat binary with code for two architectures and PTX between paddings, as CUDA writes them."""

    def entry(kind: int, architecture: int, payload: bytes) -> bytes:
        header = bytearray(64)
        struct.pack_into(pack.ENTRY, header, 0, kind, 0x101, 64, len(payload))
        struct.pack_into("<I", header, pack.ARCHITECTURE, architecture)
        return bytes(header) + payload

    entries = [entry(2, 80, b"a" * 40), entry(2, 90, b"b" * 48), entry(1, 90, b"c" * 56)]
    body = b"".join(entries)
    fat = struct.pack(pack.FAT_HEADER, pack.FAT_MAGIC, 1, 16, len(body)) + body
    data = bytearray(b"x" * 32 + fat + bytes(24) + fat + b"y" * 16)
    gone = pack._zero_section(data, 32, len(data) - 16, 90)
    kept = b"".join([entries[0][:64] + bytes(40), entries[1], entries[2][:64] + bytes(56)])
    fat = fat[:16] + kept
    assert bytes(data) == b"x" * 32 + fat + bytes(24) + fat + b"y" * 16
    assert gone == 2 * (40 + 56)


@pytest.mark.slow
def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path):
    (tmp_path / "mine").write_text("mine")
    done = command(tmp_path, module="benchmarks.gpu.pack")
    assert (done.returncode, done.stderr) == (2, f"pack: error: {tmp_path} is not empty: name a new folder\n")
    assert [child.name for child in tmp_path.iterdir()] == ["mine"]


def test_sizes_are_those_of_the_aims():
    assert (FULL.batch, FULL.models[-1], FULL.kernel_batch, FULL.masked, FULL.prototypes) == (
        256,
        "vit_base",
        768,
        147,
        4096,
    )
    assert TINY.batch < 8
