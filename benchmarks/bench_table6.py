"""The five methods of the paper's Table 6 with the trainer's own code: what a second teacher costs in time and memory.

`python -m benchmarks.bench_table6 [--model vit_small] [--batch-size 32] [--quick] [--json F] [--plot F]`. Same model,
same batch in memory; the methods take turns in one process, and each one's peak memory is measured in processes of
its own, as in `bench_step`, with more images: what does not grow with them (weights, moments, teachers) weighs as it
does on a GPU; 96 is what each of 8 GPUs has of the paper's 768. Times and memory are given as ratios to SdAE, beside
the paper's. The ratio of the products' FLOPs is the floor of a time ratio: the method's own, without those that are
computed anew because patch logits are held a chunk at a time (`--prototypes-chunk 1024`). fp32, on the CPU.

With `--device cuda` the methods run one after the other in this process, in bf16, compiled as the trainer does it, and
without chunks: time by events, memory by the allocator's peak, both with 96 images.
"""

import argparse
import json
import math
import operator
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_step import CHUNK, flops_of, measured
from benchmarks.common import Row, add_device, arguments, device_name, finish, make_row, save
from benchmarks.step_cases import (
    Ours,
    Precision,
    made_batch,
    make_case,
    measured_case,
    model_flops,
    most_apart,
    seconds_of_parts,
)
from fastpmae.distributed.ranks import choose_device
from fastpmae.run.malloc import tune_allocator
from fastpmae_loaders.cli.exits import exit_with_sentence

METHODS = ("sdae", "mae", "single-step", "single-epoch", "dual")
NAMES = ("SdAE", "MAE", "single teacher, per step", "single teacher, per epoch", "two teachers")
PAPER_DAYS = (2.5, 12.7, 2.9, 2.9, 3.2)
PAPER_GIGABYTES = (11.2, 10.0, 12.0, 12.0, 14.5)
REMARK = (
    "The paper's 12.7 days for MAE can only be those of MAE's own 1,600 epochs (the others train for 300): "
    "per epoch they are 0.95 of SdAE's, and no ratio of steps."
)


def rows_of(model: str, batch_size: int, rounds: int, memory_batch_size: int) -> list[Row]:
    """Time, memory and FLOPs of every method, and their ratios to SdAE's, ours and the paper's."""
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda name: json.loads(measured(name, model, memory_batch_size, CHUNK)), METHODS)
        memory: dict[str, dict[str, float]] = dict(zip(METHODS, runs, strict=True))

    cases: dict[str, Ours] = {}
    for name in METHODS:
        case = make_case(name, model, batch_size, chunk=CHUNK)
        assert isinstance(case, Ours)
        cases[name] = case
    batch, few = (made_batch(cases["sdae"].config, size) for size in (batch_size, 2))
    gates = {}
    for name, case in cases.items():
        losses = case.losses(few)
        same = abs(memory[name]["loss"] - losses[0]) <= 1e-4 * abs(losses[0])
        gates[name] = same and all(map(math.isfinite, losses))
        seconds_of_parts(case, batch)  # warms up
    # In proportion to the images, and without chunks: those cost FLOPs of their own.
    flops: dict[str, float] = {}
    for name in METHODS:
        whole = make_case(name, model, len(few.index))
        flops[name] = flops_of(whole, few)[0] * batch_size / len(few.index)
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(rounds):
        for name, case in cases.items():
            seconds[name].append(sum(seconds_of_parts(case, batch).values()))
    peaks = {name: run["peak"] / 2**20 for name, run in memory.items()}
    # Each round's steps saw the same machine, so they are compared with each other.
    times = {name: list(map(operator.truediv, seconds[name], seconds["sdae"])) for name in METHODS}
    return _ratios(seconds, times, flops, peaks, gates, device_name("cpu"))


def rows_in_turn(
    model: str,
    batch_size: int,
    steps: int,
    device: torch.device,
    precision: Precision,
    compiled: bool,
    **more: Any,
) -> list[Row]:
    """The same of one method after the other in this process: for a GPU, whose clock and memory tell (a CPU's memory
    is not known there, nor its ratio)."""
    seconds: dict[str, list[float]] = {}
    flops, peaks, gates = {}, {}, {}
    for name in METHODS:
        case = measured_case(
            name, model, batch_size, steps, device=device, precision=precision, compiled=compiled, **more
        )
        seconds[name], peaks[name] = case.timing.seconds, case.timing.peak / 2**20
        flops[name] = model_flops(case.config) * batch_size
        gates[name] = case.apart <= most_apart(device, precision) and all(map(math.isfinite, case.losses))
    first = statistics.median(seconds["sdae"])
    times = {name: [step / first for step in steps_of] for name, steps_of in seconds.items()}
    return _ratios(seconds, times, flops, peaks, gates, device_name(device.type))


def _ratios(
    seconds: dict[str, list[float]],
    times: dict[str, list[float]],
    flops: dict[str, float],
    peaks: dict[str, float],
    gates: dict[str, bool],
    where: str,
) -> list[Row]:
    rows = []
    for place, name in enumerate(METHODS):
        gate = gates[name] and gates["sdae"]
        floor = flops[name] / flops["sdae"]
        for metric, unit, samples in (
            ("step", "s", seconds[name]),
            ("flops", "GFLOP", [flops[name] / 1e9]),
            ("peak_memory", "MiB", [peaks[name]]),
            ("time_over_sdae", "×", times[name]),
            ("flops_over_sdae", "×", [floor]),
            ("time_over_floor", "×", [ratio / floor for ratio in times[name]]),
            ("memory_over_sdae", "×", [peaks[name] / peaks["sdae"] if peaks["sdae"] else math.nan]),
            ("paper_time_over_sdae", "×", [PAPER_DAYS[place] / PAPER_DAYS[0]]),
            ("paper_memory_over_sdae", "×", [PAPER_GIGABYTES[place] / PAPER_GIGABYTES[0]]),
        ):
            rows.append(make_row(name, metric, unit, samples, where, gate))
    return rows


def table6(rows: Sequence[Row]) -> str:
    """Markdown: a line for each method."""
    found = {(row.case, row.metric): row.value for row in rows}
    lines = [
        "| method | step | over SdAE's | FLOPs (the floor) | over the floor | paper's time | peak memory | over SdAE's "
        "| paper's memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, title in zip(METHODS, NAMES, strict=True):
        of = {metric: value for (case, metric), value in found.items() if case == name}
        lines.append(
            f"| {title} | {of['step']:.3g} s | {of['time_over_sdae']:.3f} | {of['flops_over_sdae']:.3f} "
            f"| {of['time_over_floor']:.3f} | {of['paper_time_over_sdae']:.2f} | {of['peak_memory']:.0f} MiB "
            f"| {of['memory_over_sdae']:.3f} | {of['paper_memory_over_sdae']:.2f} |"
        )
    return "\n".join([*lines, "", REMARK])


def picture(rows: Sequence[Row], title: str, file: Path) -> None:
    """Ratios to SdAE: time beside its floor and the paper's, memory beside the paper's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {(row.case, row.metric): row.value for row in rows}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    drawn = (
        ("time", {"time_over_sdae": "ours", "flops_over_sdae": "its floor: FLOPs", "paper_time_over_sdae": "paper"}),
        ("memory", {"memory_over_sdae": "ours", "paper_memory_over_sdae": "paper"}),
    )
    for axis, (kind, bars) in zip(axes, drawn, strict=True):
        for turn, (metric, label) in enumerate(bars.items()):
            high = 0.8 / len(bars)
            places = [place + (turn - (len(bars) - 1) / 2) * high for place in range(len(METHODS))]
            drawn_bars = axis.barh(places, [found[name, metric] for name in METHODS], high, label=label)
            axis.bar_label(drawn_bars, fmt="%.2f", padding=2, fontsize="small")
        axis.set_yticks(range(len(METHODS)), NAMES)
        axis.axvline(1, color="gray", linewidth=1)
        axis.invert_yaxis()
        # The paper's MAE trained for 1,600 epochs: its bar is cut.
        axis.set(xlim=(0, 2), xlabel=f"{kind} over SdAE's")
        axis.legend(fontsize="small")
    figure.suptitle(title)
    save(figure, file)


def bench() -> int:
    parser = arguments("bench_table6", (__doc__ or "").split("\n\n")[0])
    add_device(parser)
    parser.add_argument("--model", default="vit_small", help="as of fastpmae-train")
    parser.add_argument(
        "--batch-size", type=int, default=0, help="images a step: 32, or 4 with --quick; on a GPU 96, or 32"
    )
    parser.add_argument(
        "--memory-batch-size",
        type=int,
        default=0,
        help="on the CPU, images of the step whose memory is taken: 96, or 4 with --quick",
    )
    parser.add_argument(
        "--rounds", type=int, default=0, help="times that each method is timed: 6 (2 with --quick), on a GPU 20 (4)"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="on a GPU: compiled passes, unless --quick"
    )
    given = parser.parse_args()
    device = choose_device(given.device)
    if device.type == "cuda":
        batch_size = given.batch_size or (32 if given.quick else 96)
        compiled = not given.quick if given.compile is None else given.compile
        rows = rows_in_turn(
            given.model, batch_size, given.rounds or (4 if given.quick else 20), device, "bf16", compiled
        )
        title = f"Table 6 at {given.model}: time and memory with {batch_size} images a step"
    else:
        tune_allocator(torch.device("cpu"))  # as the trainer does
        batch_size = given.batch_size or (4 if given.quick else 32)
        memory_batch_size = given.memory_batch_size or (4 if given.quick else 96)
        rows = rows_of(given.model, batch_size, given.rounds or (2 if given.quick else 6), memory_batch_size)
        title = f"Table 6 at {given.model}: time with {batch_size} images a step, memory with {memory_batch_size}"
    status = finish(rows, title, given.json, given.plot, picture)
    print(table6(rows))
    return status


def main() -> int:
    return exit_with_sentence("bench_table6", bench)


if __name__ == "__main__":
    sys.exit(main())
