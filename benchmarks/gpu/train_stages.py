"""Stages `train`, `resume` and `learning`: the command that users start, from JPEGs to checkpoints and features."""

import contextlib
import json
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.images import ORIGINALS, TRAIN, VAL, repeated
from benchmarks.gpu.task import Task
from benchmarks.learning_cases import AFTER_MAE, BASE
from fastpmae.config_file import read_config, write_config
from fastpmae.demo.demo import rows_of
from fastpmae_loaders import Beton
from fastpmae_loaders.engines.names import DEFAULT_ENGINE

COMPARED = ("loss", "loss_m", "loss_c", "loss_p", "grad_norm")
STEPS = 12
TRAIN_FLAGS = ("--no-tensorboard",)
STOPPING = 8.0
"""Seconds that a run has to end after SIGTERM."""
FEWEST = 4
"""Rows of a run, the first of which compiles, that say how fast it is."""
STARTING = 40.0
"""Seconds until a run on a GPU has written its first rows, about."""


@contextlib.contextmanager
def gpu_busy(task: Task) -> Iterator[list[int]]:
    """The GPU's utilisation in per cent, by its driver, five times a second while the block runs; nothing on a CPU."""
    samples: list[int] = []
    if not task.cuda or shutil.which("nvidia-smi") is None:
        yield samples
        return
    watch = subprocess.Popen(
        ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def read() -> None:
        assert watch.stdout is not None
        for line in watch.stdout:
            with contextlib.suppress(ValueError):
                samples.append(int(line))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield samples
    finally:
        watch.terminate()
        watch.wait()
        reader.join()


def run_train(out: Path, *flags: Any, seconds: float = 240.0, whole: bool = True) -> list[dict[str, float]]:
    """Run `fastpmae-train` and read its rows. Raises RuntimeError with what it said when it fails.

    Args:
        seconds: after which it is stopped.
        whole: whether a run that was stopped is a failure; if not, its rows are what was asked for.
    """
    words = [sys.executable, "-m", "fastpmae.train", "--out", str(out), *TRAIN_FLAGS, *map(str, flags)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    stopped = False
    try:
        said = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        stopped = True
        process.terminate()
        try:
            said = process.communicate(timeout=STOPPING)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            said = process.communicate()[1]
    if process.returncode and (whole or not stopped):
        after = f", stopped after {seconds:.0f} s" if stopped else ""
        raise RuntimeError(f"{' '.join(words)} ended with status {process.returncode}{after}: {said[-1500:]}")
    return [row for row in rows_of(out) if "partial" not in row]


def network_flags(task: Task) -> list[Any]:
    """The network that makes a tiny run tiny."""
    return [word for name, value in task.sizes.network.items() for word in (f"--{name.replace('_', '-')}", value)]


def train(task: Task) -> None:
    """From original JPEGs: images/s, the share of the time in which the GPU waited for data, and how busy it was."""
    sizes = task.sizes
    beton = repeated(Beton(task.data / ORIGINALS), task.folder / "repeated.beton", sizes.epoch_images)
    for model in reversed(sizes.models):
        if task.cuda and not task.has(STARTING, f"train {model}"):
            continue
        with task.record.trying(f"train {model}"):
            started = time.perf_counter()
            with gpu_busy(task) as busy:
                # What the time does not hold of the steps is left out, and what was measured stays.
                rows = run_train(
                    task.folder / f"train-{model}", "--beton", beton, "--preset", "ablation", "--model", model,
                    "--batch-size", sizes.batch, "--steps", sizes.train_steps,
                    "--log-every", max(1, sizes.train_steps // 8),
                    "--device", task.device.type, *network_flags(task),
                    seconds=task.deadline - time.monotonic() - STOPPING - 2, whole=False,
                )  # fmt: skip
            if len(rows) < min(FEWEST, sizes.train_steps):
                raise RuntimeError(f"in {time.perf_counter() - started:.0f} s the run has written {len(rows)} rows")
            late = rows[len(rows) // 2 :]  # compiled, and the loader is ahead
            task.record.note(
                f"train {model}",
                engine=DEFAULT_ENGINE,
                batch=sizes.batch,
                images_per_second=statistics.median(row["images_per_second"] for row in late),
                data_wait=statistics.median(row["data_wait"] for row in late),
                gpu_busy=statistics.median(busy[-max(1, len(busy) // 3) :]) if busy else None,
                seconds_in_all=time.perf_counter() - started,
                steps=rows[-1]["step"],
                losses=[row["loss"] for row in rows],
            )


def resume(task: Task) -> None:
    """12 steps, twice and in two halves, with and without --deterministic; then a signal, and on from there."""
    common = [
        "--beton", task.data / TRAIN, "--preset", "demo", "--pixel-epochs", 0, "--loader", "torch",
        "--device", task.device.type, "--compile", "off", "--log-every", 1, "--epochs", 1, "--workers", 2,
    ]  # fmt: skip
    if task.tiny:
        common += ["--batch-size", 4, *network_flags(task)]

    def rows_in(name: str, parts: Sequence[int], *flags: str) -> list[dict[str, float]]:
        rows: list[dict[str, float]] = []
        for number, steps in enumerate(parts):
            more = ["--resume"] if number else []
            rows = run_train(task.folder / f"resume-{name}", *common, "--steps", steps, *more, *flags, seconds=120)
        return rows

    half = [STEPS // 2, STEPS]
    runs = {
        "straight": ([STEPS], ()),
        "again": ([STEPS], ()),
        "deterministic": ([STEPS], ("--deterministic",)),
        "deterministic, in two halves": (half, ("--deterministic",)),
    }
    with task.record.trying("resume"), ThreadPoolExecutor(2) as pool:
        started = {
            name: pool.submit(rows_in, name.replace(", ", "-").replace(" ", "-"), parts, *flags)
            for name, (parts, flags) in runs.items()
        }
        found = {name: run.result() for name, run in started.items()}
        for name, other, must in (
            ("again", "straight", False), ("deterministic, in two halves", "deterministic", True),
        ):  # fmt: skip
            away = rows_apart(found[name], found[other])
            equal = away == 0.0
            task.record.note(
                f"{name} against {other}", apart=away, to_the_bit=equal, ok=equal or not (must or task.tiny)
            )  # fmt: skip
    with task.record.trying("signal"):
        stop_and_go_on(task, common)


def rows_apart(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]) -> float:
    """The largest relative difference of two runs' losses and gradient norms, row by row."""
    return max(
        abs(one[key] - other[key]) / max(abs(other[key]), 1e-6)
        for one, other in zip(ours, theirs, strict=True)
        for key in COMPARED
    )


def stop_and_go_on(task: Task, common: Sequence[Any]) -> None:
    """SIGTERM after the first rows: the status, the checkpoint, and how the run goes on from it."""
    out = task.folder / "resume-signal"
    words = [sys.executable, "-m", "fastpmae.train", "--out", out, *TRAIN_FLAGS, *common, "--epochs", 50]
    process = subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline and len(rows_of(out)) < 3:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    try:
        said = process.communicate(timeout=60)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    before = rows_of(out)[-1]["step"]
    rows = run_train(out, *common, "--epochs", 50, "--steps", int(before) + 2, "--resume", seconds=90)
    task.record.note(
        "signal", status=process.returncode, stopped_after=before, went_on_to=rows[-1]["step"],
        ok=process.returncode == 128 + signal.SIGTERM and rows[-1]["step"] == before + 2, said=said[-300:],
    )  # fmt: skip


def learning(task: Task) -> None:
    """Pretrain on 10,000 small images, one method at a time, each whole: curves, k-NN and linear classification."""
    # what lies there already is not trained again, which is what a trial is about
    results = task.folder / "judged" if task.tiny else task.out / "learning"
    base, longest = base_of(task), 0.0
    for method in task.methods:
        # A run that the time does not hold would be lost: nobody could go on with it.
        if not task.has(longest, f"learning {method}"):
            continue
        with task.record.trying(f"learning {method}"):
            began = time.monotonic()
            words = [
                sys.executable, "-m", "benchmarks.bench_learning", "--device", task.device.type, "--cases", method,
                "--compare", method, "--base", base, "--train", task.data / TRAIN, "--val", task.data / VAL,
                "--epochs", task.epochs, "--out", task.folder / "learning", "--results", results,
                "--json", results / f"{method}.json", "--plot", results / f"{method}.png",
            ]  # fmt: skip
            if method in AFTER_MAE:
                words += ["--equal", "time"]
            done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"bench_learning ended with status {done.returncode}: {done.stderr[-1500:]}")
            longest = max(longest, time.monotonic() - began)
            rows = json.loads((results / f"{method}.json").read_text())
            figures = {row["metric"]: row["value"] for row in rows if row["case"] == method}
            task.record.note(
                f"learning {method}", epochs=task.epochs, seconds_in_all=time.monotonic() - began, **figures
            )


def base_of(task: Task) -> Path:
    """The settings that the methods have in common."""
    path = task.folder / "base.json"
    base = read_config(BASE)
    if task.tiny:
        base = base.using(**task.sizes.network, model=task.sizes.models[0], batch_size=8, patch_size=8)
    write_config(base, path)
    return path
