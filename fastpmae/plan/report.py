"""How a plan looks: tables in a terminal, and a picture of how the run grows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fastpmae.plan.costs import KINDS
from fastpmae.plan.scaling import GOOD, Point, where_it_ends
from fastpmae_loaders.printable import printable_lines

if TYPE_CHECKING:
    from fastpmae.plan.figures import Report

PAPER = {"mae": (12.7, 10.0), "sdae": (2.5, 11.2), "single-step": (2.9, 12.0), "single-epoch": (2.9, 12.0),
         "dual": (3.2, 14.5)}  # fmt: skip
"""Days and GB of the paper's Table 6."""
CHUNK = 1024
"""`--prototypes-chunk` of the rows that stand below the paper's."""
TOLD_BATCH = 4096
"""The largest batch that MAE's rule for the learning rate, which this method uses, was published with."""
WAITS = {
    "gradients": "gradients travel longer than the backward pass hides",
    "assignments": "each Sinkhorn iteration waits for a message of all GPUs",
    "slowest": "every step waits for the slowest GPU",
}
SHOWN_GPUS = ("a100-80", "h100", "h200", "b200", "l40s", "rtx4090")


def show(report: Report, console: Console) -> None:
    """Print a plan."""
    config = report.config
    batch, micro_batches = config.optimizer.batch_size, config.optimizer.accumulate
    say = _Saying(console)
    peak, kind = report.gpu.peak(config.efficiency.precision), config.efficiency.precision
    say(
        f"{config.network.model}, {config.optimizer.epochs} epochs of {report.epoch_images:,} images in steps of "
        f"{batch:,}, peak learning rate {config.optimizer.peak_lr:.4g}, on {report.gpus} × {report.gpu.words}\n"
        f"{peak / 1e12:,.0f} TFLOP/s in {'fp32' if kind == 'fp32' else 'bf16'}, {report.gpu.bandwidth / 1e12:.2f} TB/s "
        f"({report.gpu.source})\n"
    )
    console.print(_work(report))
    console.print(_memory(report))
    costs, gpu = report.costs, report.gpu
    each = costs.images // micro_batches
    fits = f"up to {report.largest_batch:,} images fit on a GPU at a time"
    if report.fitting_accumulate == 1:
        fits += f"; this plan computes {each:,}"
    elif report.fitting_accumulate is None:
        fits = "not even one image fits"
    else:
        fits += f", and {each:,} do not: --accumulate {report.fitting_accumulate} makes them fit"
    say(
        f"The most is held during {costs.moment}. {_gb(gpu.usable)} GB of the GPU are planned with: {fits}.\n"
        "This is without torch.compile, which holds less.\n"
    )
    console.print(_time(report))
    say(
        f"ASSUMED: a step reaches {report.efficiency_of_peak:.0%} of the dense peak (--efficiency-of-peak). A short "
        "run on the GPU measures it: images_per_second of its metrics.jsonl for each GPU, times "
        f"{costs.flops / costs.images / 1e9:,.1f} GFLOP an image, over {peak / 1e12:,.0f} TFLOP/s. The peak itself "
        f"would take {_ms(report.peak_seconds)}; memory traffic with nothing fused {_ms(report.traffic_seconds)}.\n"
    )
    if report.sizes:
        console.print(_sizes(report))
        last, saved = config.views.image_size, 1 - report.hours / report.hours_at_last
        say(
            f"Against views of {last} pixels throughout, which take {report.hours_at_last:,.2f} hours, this saves "
            f"{report.saved_flops:.0%} of the FLOPs and {saved:.0%} of the time, where the loader keeps up: smaller "
            f"views ask more images a second of it. All other figures of a step are of {last} pixels.\n"
        )
    console.print(_loader(report))
    noisy = report.busy is not None and report.loader.source != "--loader-rate" and report.busy > report.loader.cores
    say(
        f"Measured on {report.loader.cores} cores here with {report.loader.source}"
        + (
            f", while about {report.busy:.0f} processes wanted them: measure again when it is quiet.\n"
            if noisy
            else ".\n"
        )
        if report.loader.source != "--loader-rate"
        else "The loader's rate was given.\n"
    )
    console.print(_models(report))
    say(
        "Cores for each GPU; with fewer the loader is the bottleneck (bold: more than "
        + (
            f"the usual machine has, {report.cores:.0f} for the {report.gpu_name}'s).\n"
            if report.cores == gpu.cores / gpu.per_node
            else f"--cores {report.cores:.0f} for the {report.gpu_name}, than the usual machine has for others).\n"
        )
    )
    console.print(_methods(report))
    say(
        "The paper's 12.7 days for MAE are plausible only for its 1,600 epochs, that is "
        f"{12.7 * 300 / 1600:.1f} for 300: they are no ratio of steps. The paper's memory is of each of its GPUs."
        + (f" Rows in -chunk: --prototypes-chunk {CHUNK}.\n" if len(report.methods) > len(PAPER) else "\n")
    )
    console.print(_scaling(report))
    say(_end_of_scaling(report))


class _Saying:
    """Plain sentences, wrapped but with nothing coloured."""

    def __init__(self, console: Console):
        self.console = console

    def __call__(self, words: str) -> None:
        words = printable_lines(words)
        self.console.print(words, markup=False, highlight=False, soft_wrap=not self.console.is_terminal)


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", min_width=60)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _work(report: Report) -> Table:
    costs = report.costs
    scale, unit = (1e12, "TFLOP") if costs.flops >= 1e12 else (1e9, "GFLOP")

    def figure(flops: int) -> str:
        return f"{flops / scale:,.2f}" if flops else ""

    table = _table("Work of a step on each GPU", "part", f"forward, {unit}", f"backward, {unit}", "share")
    for part in dict.fromkeys([*costs.forward, *costs.backward]):
        forward, backward = costs.forward.get(part, 0), costs.backward.get(part, 0)
        table.add_row(part, figure(forward), figure(backward), f"{(forward + backward) / costs.flops:.1%}")
    table.add_section()
    both = figure(sum(costs.forward.values())), figure(sum(costs.backward.values()))
    table.add_row(f"all: {figure(costs.flops)} {unit}", *both, "100%")
    return table


def _memory(report: Report) -> Table:
    costs = report.costs
    scale, unit = (1e9, "GB") if costs.peak >= 1e9 else (1e6, "MB")
    table = _table("Parameters, and memory of each GPU at its peak", "network", "parameters, M", "memory", unit)
    networks = [(name, f"{count / 1e6:.1f}") for name, count in costs.parameters.items()]
    networks.append(("trained", f"{costs.trained / 1e6:.1f}"))
    held = [(kind, costs.memory.get(kind, 0)) for kind in KINDS] + [("all", costs.peak)]
    kinds = [(kind, f"{nbytes / scale:,.2f}") for kind, nbytes in held]
    for place in range(max(len(networks), len(kinds))):
        rows = (networks[place : place + 1] or [("", "")]) + (kinds[place : place + 1] or [("", "")])
        table.add_row(*rows[0], *rows[1], end_section=place == len(kinds) - 2)
    return table


def _time(report: Report) -> Table:
    step = report.step
    table = _table("Time", "what", "figure")
    table.add_row("a step", _ms(step.seconds))
    if report.gpus > 1:
        for name, words in (("gradients", "gradients"), ("assignments", "Sinkhorn"), ("slowest", "the slowest GPU")):
            table.add_row(f"  of it waiting for {words}", _ms(getattr(step, name)))
        table.add_row("sent by each GPU in a step", f"{report.messages.sent(report.gpus) / 1e6:,.1f} MB")
    table.add_row("images/s", f"{report.needed_rate:,.0f}")
    table.add_row("steps", f"{report.steps:,}")
    pixels = None if report.sizes else report.pixels
    if pixels is not None:
        table.add_row(f"hours of {pixels.epochs} epochs of pixels before ({_ms(pixels.seconds)} a step)",
                      f"{pixels.hours:,.2f}")  # fmt: skip
    words = "hours of all sizes" if report.sizes else "hours" if pixels is None else "hours of both phases"
    table.add_row(words, f"{report.hours:,.2f}")
    table.add_row("days", f"{report.hours / 24:,.2f}")
    table.add_row("hours of all GPUs", f"{report.hours * report.gpus:,.2f}")
    return table


def _sizes(report: Report) -> Table:
    """What a step takes at each size of the views."""
    table = _table(
        "Sizes of the views (--progressive-resolution)", "pixels", "epochs", "GFLOP an image", "memory, GB", "a step",
        "hours", "images/s", "cores for each GPU",
    )  # fmt: skip
    for part in report.sizes:
        cores = part.images_per_second / report.gpus / report.loader.images_per_second
        table.add_row(
            f"{part.size}{f', {part.phase}' if part.phase else ''}", f"{part.epochs:,}",
            f"{part.costs.flops / part.costs.images / 1e9:,.1f}", _gb(part.costs.peak), _ms(part.seconds),
            f"{part.hours:,.2f}", f"{part.images_per_second:,.0f}", f"{cores:.1f}",
        )  # fmt: skip
    return table


def _loader(report: Report) -> Table:
    table = _table("Loader", "what", "figure")
    table.add_row("images/s it must deliver", f"{report.needed_rate:,.0f}")
    table.add_row("images/s of one core", f"{report.loader.images_per_second:,.0f}")
    table.add_row("cores that takes for each GPU", f"{report.needed_cores:.1f}")
    table.add_row("cores there are for each GPU", f"{report.cores:.0f}")
    table.add_row("bottleneck", "the loader" if report.needed_cores > report.cores else "the GPU")
    return table


def _models(report: Report) -> Table:
    planned = report.gpu_name.lower().replace("_", "-")
    shown = list(dict.fromkeys([planned, *SHOWN_GPUS]))
    table = _table("CPU cores that feed a GPU", "model", "GFLOP an image", *shown)
    from fastpmae.plan.gpus import GPUS

    for needs in report.models:
        cells = []
        for name in shown:
            gpu, cores = GPUS[name], needs.cores[name]
            words = f"{cores:.1f}" if cores < 10 else f"{cores:,.0f}"
            there = report.cores if name == planned else gpu.cores / gpu.per_node
            cells.append(f"[bold]{words}[/bold]" if cores > there else words)
        table.add_row(needs.model, f"{needs.flops / 1e9:,.1f}", *cells)
    return table


def _methods(report: Report) -> Table:
    table = _table(
        "Table 6: the methods, at this model and batch", "method", "TFLOP a step", "× SdAE", "days", "memory, GB",
        "× SdAE", "paper: days", "× SdAE", "GB", "× SdAE",
    )  # fmt: skip
    base = next(row for row in report.methods if row.name == "sdae")
    for row in report.methods:
        paper = ()
        if row.name in PAPER:
            (days, gigabytes), of_sdae = PAPER[row.name], PAPER["sdae"]
            paper = f"{days:g}", f"{days / of_sdae[0]:.2f}", f"{gigabytes:g}", f"{gigabytes / of_sdae[1]:.2f}"
        table.add_row(
            row.name, f"{row.costs.flops / 1e12:,.2f}", f"{row.costs.flops / base.costs.flops:.2f}", f"{row.days:.2f}",
            _gb(row.costs.peak), f"{row.costs.peak / base.costs.peak:.2f}", *paper,
        )  # fmt: skip
    return table


def _scaling(report: Report) -> Table:
    table = _table(
        "Growth: as many images on each GPU (weak), or this plan's batch shared out (strong)", "GPUs", "images a step",
        "step", "gradients", "Sinkhorn", "slowest", "weak", "hours", "strong",
    )  # fmt: skip
    strong = {point.gpus: point for point in report.strong}
    for point in report.weak:
        images = report.costs.images * point.gpus
        steps = report.epoch_images / images * report.config.optimizer.epochs
        shared = strong.get(point.gpus)
        table.add_row(
            f"{point.gpus:,}", f"{images:,}", _ms(point.seconds), _ms(point.gradients), _ms(point.assignments),
            _ms(point.slowest), f"{point.efficiency:.1%}", f"{point.seconds * steps / 3600:,.2f}",
            f"{shared.efficiency:.1%}" if shared else "",
        )  # fmt: skip
    return table


def _end_of_scaling(report: Report) -> str:
    """Where each kind of growth ends, and why."""

    def ends(points: list[Point], words: str) -> str:
        end, last = where_it_ends(points), points[-1]
        if end is None:
            return (
                f"{words} keeps {last.efficiency:.1%} at {last.gpus:,} GPUs; what it loses most by: {WAITS[last.loss]}."
            )
        return (
            f"{words} ends at {end.gpus:,} GPUs, where {end.efficiency:.1%} are left (below {GOOD:.0%}): "
            f"{WAITS[end.loss]}."
        )

    sentences = [ends(report.weak, "Weak scaling"), ends(report.strong, "Strong scaling")]
    share = report.costs.images
    most = next((point.gpus for point in report.weak if point.gpus * share > TOLD_BATCH), None)
    if most is not None:
        sentences.append(
            f"From {most:,} GPUs on a step holds more than {TOLD_BATCH:,} images, beyond what the rule for the "
            "learning rate was published with: weak scaling of the method ends before that of the machines."
        )
    messages = report.messages
    sinkhorn = fsdp = ""
    if messages.fsdp:
        fsdp = f", sharded weights and gradients that are sent {len(messages.fsdp):,} times"
    if messages.assignments:
        sinkhorn = f" and {len(messages.assignments)} Sinkhorn messages of {messages.assignments[0] / 1e3:.1f} kB"
    sentences.append(
        f"Each GPU sends up to {messages.sent(1024) / 1e6:,.1f} MB a step, for gradients of "
        f"{messages.gradients / 1e6:,.1f} MB in fp32{fsdp}{sinkhorn}.\n"
        f"ASSUMED: links at 80 % of their data sheets, steps that vary by {report.jitter:.0%} (--jitter), the usual "
        "machine's network (--network)."
    )
    return "\n".join(sentences)


def draw(report: Report, file: Path) -> None:
    """Efficiency over GPUs, and what of a step is spent waiting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fastpmae.plotting import save_picture

    figure = Figure((10, 4.2), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for points, words, colour in ((report.weak, "weak", "#0072b2"), (report.strong, "strong", "#d55e00")):
        left.plot([p.gpus for p in points], [p.efficiency for p in points], "o-", color=colour, label=words)
    left.axhline(GOOD, color="#868e96", lw=1, ls="--")
    left.set(xscale="log", xlabel="GPUs", ylabel="images/s and GPU, against one GPU", ylim=(0, 1.05))
    gpus = [str(point.gpus) for point in report.weak]
    floor = [0.0] * len(gpus)
    waits = (("gradients", "gradients", "#0072b2"), ("assignments", "Sinkhorn", "#e69f00"),
             ("slowest", "slowest GPU", "#009e73"))  # fmt: skip
    for name, words, colour in waits:
        heights = [1e3 * getattr(point, name) for point in report.weak]
        right.bar(gpus, heights, bottom=floor, color=colour, label=words)
        floor = [below + height for below, height in zip(floor, heights, strict=True)]
    right.set(xlabel="GPUs", ylabel="waiting in a step, ms (weak scaling)")
    right.tick_params(axis="x", rotation=45)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(
        f"{report.config.network.model}, {report.costs.images:,} images on each {report.gpu.words}, "
        f"{1e3 * report.step.compute:,.0f} ms to compute",
        fontsize=11,
    )
    save_picture(figure, file, dpi=130)


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.2f}"


def _ms(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.2f} ms"
