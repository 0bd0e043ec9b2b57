"""Stages `step`, `waits`, `table6`, `variants` and `plan`: the trainer's step beside the plain baseline's."""

import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_table6 import METHODS
from benchmarks.gpu.page import Results
from benchmarks.gpu.task import Task
from benchmarks.step_cases import (
    Ours,
    Plain,
    Precision,
    apart,
    made_batch,
    make_case,
    measured_case,
    model_flops,
    most_apart,
    release,
    settings_of,
)
from fastpmae.plan.costs import step_costs
from fastpmae.plan.gpus import GPUS, Gpu
from fastpmae.plan.plan import Plan
from fastpmae.pretraining.collapse import collapse_figures
from fastpmae.pretraining.match_geometry import geometry_figures
from fastpmae.run.device_metrics import to_host

COMPILING = 60.0
"""Seconds that a compiled case takes about; one that would be cut off is not begun."""
EAGER = 8.0
"""The same of a case that is not compiled."""
WAITED = "called a synchronizing CUDA operation"
"""What torch says of each wait. That its account is a prototype, and knows not all of them, it says once and first."""


def step(task: Task) -> None:
    """Ours and the baseline: eager first, which takes seconds, then compiled, from the largest model down."""
    sizes = task.sizes
    for model in reversed(sizes.models):
        for method in ("dual", "sdae"):
            plain, ours = (
                time_case(task, f"{name}, {model}, eager", name, model, sizes.batch)
                for name in (f"plain-{method}", method)
            )
            if plain and ours:
                compare_losses(task, method, model, "bf16", plain["losses"], ours["losses"])
            with task.record.trying(f"losses of {method}, {model}, fp32"):
                exact = [losses_in_fp32(task, name, model) for name in (f"plain-{method}", method)]
                compare_losses(task, method, model, "fp32", exact[0], exact[1])
    for model in reversed(sizes.models):
        for name in ("dual", "plain-dual", "sdae", "plain-sdae"):
            title = f"{name}, {model}, compiled"
            if task.tiny and name != "dual":
                continue  # each takes a CPU's compiler tens of seconds
            if task.has(COMPILING, title):
                time_case(task, title, name, model, sizes.batch, compiled=True)


def compare_losses(
    task: Task, method: str, model: str, precision: Precision, plain: list[float], ours: list[float]
) -> None:  # fmt: skip
    """The four losses of the same weights on the same images, by both codes."""
    limit = most_apart(task.device, precision)
    task.record.check(f"losses of {method}, {model}, {precision}", apart(ours, plain), limit, losses=[plain, ours])


def losses_in_fp32(task: Task, name: str, model: str) -> list[float]:
    """A case's losses without autocast."""
    case = build(task, name, model, task.sizes.batch, precision="fp32")
    try:
        return case.losses(given(case, task.sizes.batch))
    finally:
        case.close()
        del case
        release()


def build(task: Task, name: str, model: str, batch: int, **others: Any) -> Ours | Plain:
    """A case at this task's sizes, in bf16 unless it says otherwise."""
    return make_case(name, model, batch, **settings_here(task, **others))


def settings_here(task: Task, **others: Any) -> dict[str, Any]:
    """What a case is made with at this task's sizes, on its device, in bf16 unless `others` say otherwise."""
    return {"device": task.device, "precision": "bf16"} | task.sizes.network | others


def given(case: Ours | Plain, batch: int) -> Any:
    """A batch on the device, as the case takes it."""
    return case.given(made_batch(case.config, batch))


def time_case(task: Task, title: str, name: str, model: str, batch: int, **others: Any) -> dict[str, Any]:
    """Time a case's steps, after a first one that is held against eager, and note the figures; {} where it failed."""
    figures: dict[str, Any] = {}
    with task.record.trying(title):
        how = settings_here(task, **others)
        found = measured_case(name, model, batch, task.sizes.steps, **how)
        if others.get("compiled") and not name.startswith("plain-"):
            limit = most_apart(task.device, how["precision"])
            task.record.check(f"{title}: losses against eager", found.apart, limit)
        figures, flops = found.timing.figures(batch), model_flops(found.config)
        task.record.note(
            title, case=name, model=model, batch=batch, compiled=bool(others.get("compiled")),
            **figures, flops_of_an_image=flops, flops_per_second=flops * figures["images_per_second"],
            losses=found.losses,
            milliseconds_of={
                part: 1e3 * statistics.median(parts[part] for parts in found.parts) for part in found.parts[0]
            },
        )  # fmt: skip
        figures["losses"] = found.losses
    return figures


def waits(task: Task) -> None:
    """Where the host waits for the GPU within a step (nowhere, it should), and what a row of metrics.jsonl costs."""
    model, batch = task.sizes.models[0], task.sizes.table6_batch
    forms: Sequence[tuple[str, dict[str, Any]]] = (
        ("dual", {}), ("dual", {"match_scope": "fold"}), ("sdae", {}), ("mae", {}),
    )  # fmt: skip
    for name, others in forms:
        title = " ".join(["waits of", name, *(f"{key} {value}" for key, value in others.items())])
        with task.record.trying(title):
            case = build(task, name, model, batch, **others)
            images = given(case, batch)
            for _ in range(2):
                case.step(images)
            task.wait()
            places = host_waits(task, lambda case=case, images=images: case.step(images))
            task.record.note(title, places=places, ok=not places)
            if name == "dual" and not others and isinstance(case, Ours):
                time_row(task, case, images)
            case.close()
            del case
    if task.cuda:
        for kind in ("pageable", "pinned"):
            host = torch.zeros(768, dtype=torch.int64)
            if kind == "pinned":
                host = host.pin_memory()
            torch.cuda._sleep(200_000_000)
            start = time.perf_counter()
            host.to(task.device, non_blocking=True)
            task.record.note(
                f"a {kind} copy of 6 KB behind 0.1 s of work", milliseconds=1e3 * (time.perf_counter() - start)
            )
            task.wait()


def host_waits(task: Task, run: Callable[[], Any]) -> list[str]:
    """Files and lines at which the host waited for the GPU, by CUDA's own account."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if task.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            if task.cuda:
                torch.cuda.set_sync_debug_mode("default")
    return sorted({f"{Path(one.filename).name}:{one.lineno}" for one in caught if WAITED in str(one.message)})


def time_row(task: Task, case: Ours, batch: Any) -> None:
    """What a row of metrics.jsonl adds to a step: the wait for its figures, and the host's work beside the next one."""
    targets, match = case.targets, None if case.out is None else case.out.match
    assert targets is not None
    assert match is not None

    def row() -> tuple[float, float]:
        task.wait()
        start = time.perf_counter()
        rest = to_host(collapse_figures(targets), geometry_figures(batch, match, case.config))
        there = time.perf_counter()
        rest()
        return there - start, time.perf_counter() - there

    row()  # compiles and loads
    waiting, on_the_host = row()
    task.record.note("row", waiting_milliseconds=1e3 * waiting, on_the_host_milliseconds=1e3 * on_the_host)


def table6(task: Task) -> None:
    """Time and memory of the five methods, and their ratios to SdAE's beside the FLOPs' own."""
    model, batch = task.sizes.models[0], task.sizes.table6_batch
    flops = {
        name: model_flops(settings_of(name, model, batch, precision="bf16", **task.sizes.network)) for name in METHODS
    }
    # A stage may be cut off at any of them: first the two that the aim is about.
    order = sorted(METHODS, key=lambda name: name not in ("sdae", "dual"))
    for compiled in (False,) if task.tiny else (False, True):
        how = "compiled" if compiled else "eager"
        base: dict[str, Any] = {}
        for name in order:
            title = f"{name}, {model}, {how}"
            if not task.has(COMPILING if compiled else EAGER, title):
                continue
            figures = time_case(task, title, name, model, batch, compiled=compiled)
            if name == "sdae":
                base = figures
            if figures and base:
                ratio, floor = figures["step_ms"] / base["step_ms"], flops[name] / flops["sdae"]
                memory = figures["peak_gib"] / base["peak_gib"] if base["peak_gib"] else None
                task.record.note(
                    f"{name} over sdae, {how}", time=ratio, flops=floor, time_over_flops=ratio / floor, memory=memory
                )  # fmt: skip


def variants(task: Task) -> None:
    """The forms of a step that a flag chooses, at the largest model."""
    model, batch = task.sizes.models[-1], task.sizes.batch
    forms: Sequence[tuple[str, dict[str, Any], bool]] = (
        ("fp8 teachers", {"teacher_precision": "fp8"}, False),
        ("fp8 teachers, compiled", {"teacher_precision": "fp8", "compiled": True}, True),
        ("xformers", {"attention": "xformers"}, True),
        ("xformers, 5 folds", {"attention": "xformers", "folds": 5}, True),
        ("sdpa, 5 folds", {"folds": 5}, False),
        ("CUDA graphs", {"compiled": True, "compile_mode": "reduce-overhead"}, True),
        ("CUDA graphs, match in fold",
         {"compiled": True, "compile_mode": "reduce-overhead", "match_scope": "fold"}, True),
        ("logits in chunks", {"chunk": 4096 if not task.tiny else 16}, False),
        ("every block recomputed", {"activation_checkpointing": 1}, False),
        ("fp32", {"precision": "fp32"}, False),
    )  # fmt: skip
    for title, others, needs_gpu in forms:
        if needs_gpu and not task.cuda:
            continue
        if others.get("attention") == "xformers" and importlib.util.find_spec("xformers") is None:
            task.record.note(title, skipped="xformers is not installed here")
            continue
        if task.has(COMPILING if others.get("compiled") else EAGER, title):
            time_case(task, f"dual, {model}, {title}", "dual", model, batch, **others)


def plan(task: Task) -> None:
    """`fastpmae-plan`'s memory and time beside what the stage `step` has measured."""
    measured = [row for row in Results(task.record.file).rows("step") if "step_ms" in row]
    gpu = gpu_here(task)
    for row in measured:
        if row["case"].startswith("plain-"):
            continue
        with task.record.trying(f"plan of {row['name']}"):
            config = settings_of(row["case"], row["model"], row["batch"], precision="bf16", **task.sizes.network)
            costs = step_costs(config, row["batch"])
            seconds = costs.flops / (gpu.bf16 * Plan.efficiency_of_peak)
            task.record.note(
                f"plan of {row['name']}",
                gpu=gpu.words,
                compiled=row["compiled"],
                planned_gib=costs.peak / 2**30,
                memory=costs.peak / 2**30 / row["peak_gib"] if row["peak_gib"] else None,
                planned_ms=1e3 * seconds,
                time=1e3 * seconds / row["step_ms"],
                efficiency_of_peak=costs.flops / gpu.bf16 / (row["step_ms"] / 1e3),
            )
    if not measured:
        task.record.note("plan", ok=False, failed="the stage 'step' has measured nothing to compare with")


def gpu_here(task: Task) -> Gpu:
    """What the plan knows of this GPU; on a CPU, and of one that it does not know, an H100's."""
    name = torch.cuda.get_device_name(task.device) if task.cuda else ""
    known = [gpu for gpu in GPUS.values() if gpu.words.split()[0].lower() in name.lower().split()]
    return known[0] if known else GPUS["h100"]
