"""A training step of `dual` and `sdae` against the same methods written the usual way (`benchmarks/baseline.py`).

`python -m benchmarks.bench_step [--model vit_small] [--batch-size 32] [--quick] [--json F] [--plot F]`. The cases take
turns, each in a process of its own, from the same weights and on batches that are in memory; losses are compared first.
Peak memory is measured two processes at a time, over the third step: anonymous memory, by the kernel's account, beyond
what Python and its libraries held. The trainer's setting of the allocator (`host_memory`) is part of our cases, and
`--prototypes-chunk 1024` is of `dual`. fp32, on the CPU.

With `--device cuda` the cases run one after the other in this process, each eager and compiled, in bf16 and without
chunks: steps are timed by events, memory is the allocator's peak, `host` is the host's own time a step, and
`utilisation` the share of a measured 8192 x 8192 x 8192 product's rate that the method's own FLOPs reach.
"""

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Row, add_device, arguments, device_name, finish, make_row, save
from benchmarks.step_cases import (
    Measured,
    Ours,
    Plain,
    Precision,
    apart,
    made_batch,
    make_case,
    matrix_rate,
    measured_case,
    model_flops,
    most_apart,
    seconds_of_parts,
)
from fastpmae.distributed.ranks import choose_device
from fastpmae.plan.flops import flop_formulas
from fastpmae.run.malloc import tune_allocator
from fastpmae_loaders import Batch
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.errors import UserError

PAIRS = (("dual", "plain-dual"), ("sdae", "plain-sdae"))
CHUNK = 1024
"""`--prototypes-chunk` of the methods that have prototypes."""
PARTS = ("data", "teachers", "forward", "backward", "optimizer", "EMA")


class Apart:
    """A case in a process of its own, which waits while it is not its turn."""

    def __init__(self, name: str, model: str, batch_size: int, chunk: int):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, model, batch_size, chunk), daemon=True)
        self.process.start()
        theirs.close()
        self.losses: list[float] = self.connection.recv()

    def timed(self) -> dict[str, float]:
        self.connection.send(True)
        return self.connection.recv()

    def end(self) -> None:
        self.connection.send(False)
        self.process.join()


def serve(connection: Connection, name: str, model: str, batch_size: int, chunk: int) -> None:
    """The other end of `Apart`: the losses, then the seconds of a step whenever one is asked for."""
    if not name.startswith("plain-"):
        tune_allocator(torch.device("cpu"))  # as the trainer does
    case = make_case(name, model, batch_size, chunk=chunk)
    given = case.given(made_batch(case.config, batch_size))
    connection.send(case.losses(given))
    while connection.recv():
        connection.send(seconds_of_parts(case, given))


def time_rows(model: str, batch_size: int, rounds: int, chunk: int = 0) -> list[Row]:
    """Step, images a second and shares of every case, taking turns; then the rate of the linear layers."""
    cases = {name: Apart(name, model, batch_size, chunk) for pair in PAIRS for name in pair}
    gates: dict[str, bool] = {}
    for pair in PAIRS:
        truth, other = (cases[name].losses for name in pair)
        agree = all(abs(a - b) <= 1e-4 * max(abs(a), 1e-3) for a, b in zip(truth, other, strict=True))
        gates |= dict.fromkeys(pair, agree)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, case in cases.items():
            parts = case.timed()
            if turn:
                found[name].append(parts)
    for case in cases.values():
        case.end()
    del cases

    where, rows = device_name("cpu"), []
    seconds = {name: [sum(parts.values()) for parts in runs] for name, runs in found.items()}
    for ours, plain in PAIRS:
        for name, baseline in ((ours, plain), (plain, None)):
            rate = [batch_size / taken for taken in seconds[name]]
            of_baseline = None if baseline is None else [batch_size / taken for taken in seconds[baseline]]
            gate = gates[name]
            against = None if baseline is None or of_baseline is None else (baseline, of_baseline)
            rows.append(
                make_row(name, "images_per_second", "images/s", rate, where, gate, against, more_is_better=True)
            )
            against = None if baseline is None else (baseline, seconds[baseline])
            rows.append(make_row(name, "step", "s", seconds[name], where, gate, against))
            for part in PARTS:
                share = [100 * parts[part] / sum(parts.values()) for parts in found[name]]
                rows.append(make_row(name, f"share_{part}", "%", share, where, gate))
    for ours, _ in PAIRS:
        case = make_case(ours, model, batch_size, chunk=chunk)
        batch = made_batch(case.config, batch_size)
        case.step(batch)
        rows += rate_rows(ours, case, batch, statistics.median(seconds[ours]), gates[ours], max(1, rounds // 3))
    return rows


def flops_of(case: Ours | Plain, batch: Any) -> tuple[float, float]:
    """Floating point operations of one step by torch's count: of all products, and of attention among them."""
    flop_formulas()
    with FlopCounterMode(display=False) as counter:
        case.step(batch)
    total = counter.get_flop_counts()["Global"]
    attention = sum(count for operation, count in total.items() if "scaled_dot_product" in str(operation))
    return float(sum(total.values())), float(attention)


def rate_rows(name: str, case: Ours | Plain, batch: Any, step: float, gate: bool, repeats: int) -> list[Row]:
    """FLOP/s of the step; of its linear layers, attention and `F.linear` at the same shapes, taking turns."""
    total, attention_flops = flops_of(case, batch)
    linear, attention, alone = [], [], []
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            case.step(batch)
        products: dict[tuple[int, int, int, bool], int] = defaultdict(int)
        seconds = attending = 0.0
        for event in profiler.key_averages(group_by_input_shape=True):
            if event.key in ("aten::mm", "aten::addmm"):
                left, right = (event.input_shapes[1:] if event.key == "aten::addmm" else event.input_shapes)[:2]
                products[(left[0], left[1], right[1], event.key == "aten::addmm")] += event.count
                seconds += event.self_cpu_time_total / 1e6
            elif "scaled_dot_product_flash" in event.key:
                attending += event.self_cpu_time_total / 1e6
        flops = sum(2 * rows * inner * columns * count for (rows, inner, columns, _), count in products.items())
        linear.append(flops / seconds / 1e9)
        attention.append(attention_flops / attending / 1e9)
        alone.append(flops / sum(count * _linear_seconds(*shape) for shape, count in products.items()) / 1e9)
    where, unit = device_name("cpu"), "GFLOP/s"
    return [
        make_row(
            f"{name} step", "rate", unit, [total / step / 1e9], where, gate, ("F.linear", alone), more_is_better=True
        ),
        make_row(f"{name} linear layers", "rate", unit, linear, where, gate, ("F.linear", alone), more_is_better=True),
        make_row(f"{name} attention", "rate", unit, attention, where, gate, ("F.linear", alone), more_is_better=True),
        make_row(f"F.linear at the shapes of {name}", "rate", unit, alone, where, gate),
    ]


def _linear_seconds(rows: int, inner: int, columns: int, biased: bool) -> float:
    """`F.linear` from `inner` to `columns` features: the median of a few."""
    tokens, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    bias = torch.randn(columns) if biased else None
    taken = []
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            F.linear(tokens, weight, bias)
            taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def rows_in_turn(
    model: str,
    batch_size: int,
    steps: int,
    device: torch.device,
    precision: Precision,
    ways: Sequence[bool],
    **more: Any,
) -> list[Row]:
    """All figures of every case, one case after the other in this process: for a GPU, whose clock and memory tell (a
    CPU's memory is not known there).

    Args:
        ways: eager (False) and compiled (True).
        more: settings of all cases, as `make_case` takes them.
    """
    rate, limit = matrix_rate(device), most_apart(device, precision)
    rows = []
    for pair in PAIRS:
        for compiled in ways:
            ours, plain = (
                measured_case(
                    name, model, batch_size, steps, device=device, precision=precision, compiled=compiled, **more
                )
                for name in pair
            )
            gate = apart(ours.losses, plain.losses) <= limit and ours.apart <= limit
            least = model_flops(ours.config) * batch_size / rate
            mine, usual = (name + " compiled" * compiled for name in pair)
            where, of_usual = device_name(device.type), _samples(plain, batch_size, least)
            for name, case, baseline in ((mine, ours, usual), (usual, plain, None)):
                for (metric, unit), samples in _samples(case, batch_size, least).items():
                    against = None if baseline is None else (baseline, of_usual[metric, unit])
                    upward = unit in ("images/s", "%")
                    rows.append(make_row(name, metric, unit, samples, where, gate, against, more_is_better=upward))
                rows.append(make_row(name, "warm_up", "s", [case.timing.warm_up], where, gate))
                for part in PARTS:
                    share = [100 * parts[part] / sum(parts.values()) for parts in case.parts]
                    rows.append(make_row(name, f"share_{part}", "%", share, where, gate))
    return rows


def _samples(case: Measured, batch_size: int, least: float) -> dict[tuple[str, str], list[float]]:
    """By metric and unit; `least` is the time of a step of nothing but products, at the rate of a large one."""
    steps = case.timing.seconds
    found = {
        ("images_per_second", "images/s"): [batch_size / seconds for seconds in steps],
        ("step", "s"): steps,
        ("host", "ms"): [1e3 * seconds for seconds in case.timing.host],
        ("utilisation", "%"): [100 * least / seconds for seconds in steps],
    }
    if case.timing.peak:
        found["peak_memory", "MiB"] = [case.timing.peak / 2**20]
    return found


def memory_rows(
    pairs: Sequence[tuple[str, str]], model: str, batch_size: int, rounds: int, chunk: int = 0
) -> list[Row]:
    """Peak memory of a step of each case, and its partner's."""
    names = [name for pair in pairs for name in pair]
    # Two processes at a time, with half the cores each: how long it takes is no matter.
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda name: json.loads(measured(name, model, batch_size, chunk)), names * rounds))
    found = {name: runs[place :: len(names)] for place, name in enumerate(names)}
    rows = []
    for ours, plain in pairs:
        peaks = {name: [run["peak"] / 2**20 for run in found[name]] for name in (ours, plain)}
        truth = found[plain][0]["loss"]
        gate = all(abs(run["loss"] - truth) <= 1e-4 * abs(truth) for run in found[ours])
        where = device_name("cpu")
        rows.append(make_row(ours, "peak_memory", "MiB", peaks[ours], where, gate, (plain, peaks[plain])))
        rows.append(make_row(plain, "peak_memory", "MiB", peaks[plain], where, gate))
    return rows


def measured(name: str, model: str, batch_size: int, chunk: int = 0) -> str:
    """One case's `measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.bench_step", "--measure", name, "--model", model]
    command += ["--prototypes-chunk", str(chunk)]
    threads = str(max(1, torch.get_num_threads() // 2))
    return subprocess.run(
        [*command, "--batch-size", str(batch_size)], check=True, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    ).stdout.splitlines()[-1]  # fmt: skip


def measure(case: Ours | Plain, batch: Batch, few: Batch, before: int) -> dict[str, float]:
    """The peak of a step's anonymous memory beyond `before` bytes, and the loss of a few images.

    It is the third step: what the first two leave behind is there, as in every step of a run from then on.
    """
    loss = case.losses(case.given(few))[0]
    given = case.given(batch)
    del batch, few
    gc.collect()
    for _ in range(2):
        case.step(given)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    case.step(given)
    return {"peak": resident("VmHWM") - resident("RssFile") - before, "loss": loss}


def resident(kind: str) -> int:
    """Bytes of this process's memory by the kernel's account."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def picture(rows: Sequence[Row], title: str, file: Path) -> None:
    """How many times better each case is, and where the time of its step goes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5))
    compared = [row for row in rows if row.metric in ("images_per_second", "peak_memory") and row.ratio is not None]
    names = [f"{row.case} / {row.baseline}\n{row.metric}" for row in compared]
    bars = left.barh(names, [row.ratio or 0 for row in compared])
    left.bar_label(bars, fmt="%.2f ×", padding=3)
    left.axvline(1, color="gray", linewidth=1)
    left.margins(x=0.2)
    left.invert_yaxis()
    left.set(xlabel="times better", title=title)
    cases = [row.case for row in rows if row.metric == "step"]
    step = {row.case: row.value for row in rows if row.metric == "step"}
    start = dict.fromkeys(cases, 0.0)
    for part in PARTS:
        share = {row.case: row.value for row in rows if row.metric == f"share_{part}"}
        taken = [step[case] * share[case] / 100 for case in cases]
        right.barh(cases, taken, left=[start[case] for case in cases], label=part)
        start = {case: start[case] + more for case, more in zip(cases, taken, strict=True)}
    right.invert_yaxis()
    right.set(xlabel="seconds a step")
    right.legend(fontsize="small")
    save(figure, file)


def bench() -> int:
    parser = arguments("bench_step", (__doc__ or "").split("\n\n")[0])
    add_device(parser)
    parser.add_argument("--model", default="vit_small", help="as of fastpmae-train")
    parser.add_argument(
        "--batch-size", type=int, default=0, help="images a step: 32, or 4 with --quick; on a GPU 256, or 32"
    )
    parser.add_argument("--prototypes-chunk", type=int, help=f"of our cases, as of fastpmae-train: {CHUNK}, on a GPU 0")
    parser.add_argument(
        "--rounds", type=int, default=0, help="times that each case is timed: 6 (2 with --quick), on a GPU 12 (4)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="on a GPU (bf16); fp32 on the CPU")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="on a GPU, only compiled or only eager cases: by default both, eager with --quick",
    )
    parser.add_argument("--measure", metavar="CASE", help="(used by the benchmark itself) one case's memory")
    given = parser.parse_args()
    device = choose_device(given.device)
    if device.type == "cpu" and (given.precision == "bf16" or given.compile):
        raise UserError("--precision bf16 and --compile are of a GPU: say --device cuda, or leave them out")
    if device.type == "cuda":
        batch_size, steps = given.batch_size or (32 if given.quick else 256), given.rounds or (4 if given.quick else 12)
        ways = [given.compile] if given.compile is not None else [False] if given.quick else [False, True]
        rows = rows_in_turn(
            given.model, batch_size, steps, device, given.precision or "bf16", ways, chunk=given.prototypes_chunk or 0
        )
        return finish(rows, f"A step of {given.model}, {batch_size} images", given.json, given.plot, picture)
    batch_size = given.batch_size or (4 if given.quick else 32)
    chunk = CHUNK if given.prototypes_chunk is None else given.prototypes_chunk
    if given.measure:
        if not given.measure.startswith("plain-"):
            tune_allocator(torch.device("cpu"))  # as the trainer does
        before = resident("RssAnon")
        case = make_case(given.measure, given.model, batch_size, chunk=chunk)
        batch, few = (made_batch(case.config, size) for size in (batch_size, 2))
        print(json.dumps(measure(case, batch, few, before)))
        return 0
    rounds = given.rounds or (2 if given.quick else 6)
    rows = memory_rows(PAIRS, given.model, batch_size, 1 if given.quick else 2, chunk)
    rows += time_rows(given.model, batch_size, rounds, chunk)
    return finish(rows, f"A step of {given.model}, {batch_size} images", given.json, given.plot, picture)


def main() -> int:
    return exit_with_sentence("bench_step", bench)


if __name__ == "__main__":
    sys.exit(main())
