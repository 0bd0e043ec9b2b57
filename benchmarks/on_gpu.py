"""Everything that is to be known of fastpmae on a GPU, in one command: it checks, measures and trains.

`python -m benchmarks.on_gpu [--budget SECONDS] [--stages NAME ...] [--out DIR] [--data DIR] [--tiny]`. The stages come
in the order of their worth, each a process of its own with a limit, under one deadline. Each figure is on the disk, in
DIR/results.jsonl, as soon as it is found, and a stage that fails ends nothing else. A second call adds to the file;
`--page docs/gpu.md --results FILE ...` writes the page from such files. `--tiny` runs the code of every stage on the
CPU, to try the command itself. It needs no network, nor FFCV, DALI or xformers: what is missing is left out.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.common import device_name, versions
from benchmarks.gpu.images import DRAWN, TRAIN, find_images
from benchmarks.gpu.page import ENDED, STARTED, Results, aims_table, stages_table, write_page
from benchmarks.gpu.record import Record, now
from benchmarks.gpu.task import Task
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.machine import usable_cores

METHODS = ("dual", "mae", "sdae", "mae-dual", "mae-sdae")
BUDGET = 420.0
TINY_BUDGET = 300.0
GRACE = 5.0
"""Seconds that a stage has to end after SIGTERM."""
SLOWER = 4
"""So many times a stage's limit it may take with --tiny, on a CPU that others use too."""
LEAST = 15.0
"""Seconds below which no stage is started."""


class Stage(NamedTuple):
    """A part of the run."""

    limit: float
    """Seconds that it may take on a GPU."""
    work: str
    """Module and function: imported where it is run alone."""


STAGES = {
    "versions": Stage(30, "benchmarks.on_gpu:show_versions"),
    "kernels": Stage(100, "benchmarks.gpu.kernel_stages:kernels"),
    "bandwidth": Stage(40, "benchmarks.gpu.kernel_stages:bandwidth"),
    "step": Stage(220, "benchmarks.gpu.step_stages:step"),
    "waits": Stage(45, "benchmarks.gpu.step_stages:waits"),
    "plan": Stage(40, "benchmarks.gpu.step_stages:plan"),
    "train": Stage(150, "benchmarks.gpu.train_stages:train"),
    "resume": Stage(100, "benchmarks.gpu.train_stages:resume"),
    "table6": Stage(140, "benchmarks.gpu.step_stages:table6"),
    "variants": Stage(150, "benchmarks.gpu.step_stages:variants"),
    "loaders": Stage(60, "benchmarks.gpu.loader_stages:loaders"),
    "dali": Stage(70, "benchmarks.gpu.loader_stages:dali"),
    "learning": Stage(600, "benchmarks.gpu.train_stages:learning"),
}
"""In the order of their worth."""
USUAL = [name for name in STAGES if name != "learning"]
"""Learning takes minutes for each method: it is asked for by name."""


def show_versions(task: Task) -> None:
    """The card, and that everything which the other stages need can be imported."""
    figures: dict[str, object] = {}
    if task.cuda:
        properties = torch.cuda.get_device_properties(task.device)
        figures = {
            "memory_gib": properties.total_memory / 2**30,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(task.device))),
            "cuda": torch.version.cuda,
        }
    task.record.note("device", device=device_name(task.device.type), cores=usable_cores(), **figures)
    for package in ("xformers", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "ffcv", "tyro"):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        task.record.note(package, version=found)
    with task.record.trying("imports"):
        import fastpmae.train
        import fastpmae_kernels
        import fastpmae_loaders

        task.record.note("imports", ok=all((fastpmae.train, fastpmae_kernels, fastpmae_loaders)))


def run_stage(name: str, work: str, given: argparse.Namespace) -> int:
    """One stage (`work` is its module and function) in this process. The status is 1 where it broke off."""
    device = torch.device("cpu") if given.tiny else torch.device("cuda", 0)
    record = Record(given.out / "results.jsonl", name, device)
    with tempfile.TemporaryDirectory(prefix="on_gpu_") as folder:
        task = Task(
            device=device, tiny=given.tiny, record=record, data=given.data, folder=Path(folder), out=given.out,
            deadline=given.until, methods=tuple(given.methods), epochs=given.epochs,
        )  # fmt: skip
        done = False
        with record.trying(name):
            module, function = work.split(":")
            getattr(importlib.import_module(module), function)(task)
            done = True
    return 0 if done else 1


def run_all(given: argparse.Namespace) -> int:
    """Every stage in a process of its own, then the tables. The status is 1 where one failed."""
    deadline = time.monotonic() + given.budget
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "results.jsonl"
    if given.tiny:
        file.unlink(missing_ok=True)
    given.data = find_images(given.data, given.out, given.tiny)
    device = torch.device("cpu") if given.tiny else torch.device("cuda", 0)
    failed: list[str] = []
    warming = None if given.tiny else _compile_views(given.data)
    for name in given.stages:
        left = deadline - time.monotonic()
        if left < LEAST:
            print(f"== {name}: not started, {max(left, 0):.0f} s are left", flush=True)
            continue
        limit = min(left - GRACE, STAGES[name].limit * (SLOWER if given.tiny else 1))
        print(f"== {name}: at most {limit:.0f} s, {left:.0f} s are left", flush=True)
        record = Record(file, name, device)
        record.note(
            STARTED, device_type=device.type, device=device_name(device.type), cores=usable_cores(), tiny=given.tiny,
            drawn=(given.data / DRAWN).exists(), versions=versions(), date=now(),
        )  # fmt: skip
        status, cut = _in_a_process(name, given, limit)
        record.note(ENDED, status=status, limit=limit if cut else None)
        if status or not Results(file).stages[name].passed:
            failed.append(name)
    if warming is not None and warming.poll() is None:
        warming.kill()
    results = Results(file)
    print("\n" + stages_table(results, given.stages))
    if not given.tiny:
        print("\n" + aims_table(results))
    if failed:
        print(f"\nfailed: {', '.join(failed)}; {file} says what and where")
    return 1 if failed else 0


def _in_a_process(name: str, given: argparse.Namespace, limit: float) -> tuple[int, bool]:
    """A stage's exit status, and whether it was ended at its limit, with everything that it had started."""
    words = [
        sys.executable, "-W", "ignore", "-m", "benchmarks.on_gpu", "--run", name, STAGES[name].work, "--out", given.out,
        "--data", given.data, "--until", time.monotonic() + limit, "--epochs", given.epochs,
        "--methods", *given.methods,
    ]  # fmt: skip
    if given.tiny:
        words.append("--tiny")
    process = subprocess.Popen([str(word) for word in words], start_new_session=True)
    try:
        return process.wait(timeout=limit), False
    except subprocess.TimeoutExpired:
        return _end(process), True
    except BaseException:
        _end(process)
        raise


def _end(process: subprocess.Popen) -> int:
    """SIGTERM, and after a while SIGKILL, to the process and its children."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=GRACE)
    with contextlib.suppress(ProcessLookupError):  # children may outlive it
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _compile_views(data: Path) -> subprocess.Popen:
    """numba's compilation of the views, beside the first stages: the GPU does not wait for it."""
    program = (
        "import sys; from fastpmae_loaders import PairedViews\n"
        "with PairedViews(sys.argv[1], 16) as views: next(iter(views))"
    )
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", program, str(data / TRAIN)])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_gpu", description=(__doc__ or "").split("\n\n")[0],
        epilog="stages, in the order of their worth: " + ", ".join(STAGES),
    )  # fmt: skip
    parser.add_argument("--budget", type=float, metavar="SECONDS",
                        help=f"for all stages together ({BUDGET:.0f}; with --tiny {TINY_BUDGET:.0f})")  # fmt: skip
    parser.add_argument("--stages", nargs="+", choices=STAGES, metavar="NAME",
                        help="which ones (all but learning; with --tiny all)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of results.jsonl (runs/gpu; with --tiny runs/gpu-tiny)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="a folder with the images, as benchmarks.gpu.pack makes it"
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU, to try the command itself")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD",
                        help=f"that learning trains ({', '.join(METHODS)}; with --tiny mae-dual)")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=0, help="that it trains each for (100; with --tiny 1)")
    parser.add_argument("--page", type=Path, metavar="F.md", help="write this page from --results, and run nothing")
    parser.add_argument("--results", type=Path, nargs="+", metavar="F", help="result files of a GPU, for --page")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    # by time.monotonic(), which is the same for all processes: what a stage takes to start is part of its time
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    given = parser.parse_args()

    def run() -> int:
        if (given.page is None) != (given.results is None):
            raise UserError("--page and --results go together")
        if given.page is not None:
            write_page(given.page, given.results)
            return 0
        if not given.tiny and not torch.cuda.is_available():
            raise UserError("torch finds no GPU here; --tiny tries the command on the CPU")
        given.budget = given.budget or (TINY_BUDGET if given.tiny else BUDGET)
        given.epochs = given.epochs or (1 if given.tiny else 100)
        given.stages = given.stages or (list(STAGES) if given.tiny else USUAL)
        given.methods = given.methods or (["mae-dual"] if given.tiny else list(METHODS))
        given.out = given.out or Path("runs/gpu-tiny" if given.tiny else "runs/gpu")
        if given.run:
            name, work = given.run
            return run_stage(name, work, given)
        return run_all(given)

    return exit_with_sentence("on_gpu", run)


if __name__ == "__main__":
    sys.exit(main())
