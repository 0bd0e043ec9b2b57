"""`fastpmae-plan`: what a run will take, before a GPU is paid for. Needs no GPU."""

import contextlib
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from fastpmae.config import Config
from fastpmae.model.build import SHAPES, check, check_label_schedules, shape_of
from fastpmae.model.phases import Phase, phases_of, resolutions_in
from fastpmae.model.resolutions import Resolution, at_size
from fastpmae.plan.costs import Costs, flops_of_an_image, step_costs
from fastpmae.plan.figures import Method, ModelNeeds, PixelPhase, Report, SizePart
from fastpmae.plan.gpus import GPUS, Gpu, gpu_named
from fastpmae.plan.loader_rate import LoaderRate, busy, measure
from fastpmae.plan.report import CHUNK, draw, show
from fastpmae.plan.scaling import (
    JITTER,
    Step,
    fsdp_messages,
    step_on,
    strong_scaling,
    traffic,
    weak_scaling,
)
from fastpmae.presets import PRESETS
from fastpmae.pretraining.cli import Command, parse
from fastpmae.pretraining.data import shared_out
from fastpmae.run.images import open_images, sources
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.cli.progress import Bar
from fastpmae_loaders.engines.base import shown
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.mixture import split_weight
from fastpmae_loaders.write.outputs import open_output

IMAGENET = 1_281_167

DESCRIPTION = f"""Predict what a run will take: FLOPs, memory, hours, CPU cores of its loader, and scaling over GPUs.

Takes every flag of fastpmae-train, and runs its step on tensors without memory: no GPU is needed. For dense tasks:
fastpmae-plan segment --help and fastpmae-plan detect --help. GPUs known:
{", ".join(GPUS)}. Example: fastpmae-plan --preset paper --model vit_base --batch-size 768 --gpu h100"""

METHODS = {"mae": "mae", "sdae": "sdae", "single-step": "single-step", "single-epoch": "single-epoch", "dual": "paper"}
"""The rows of Table 6 and the presets that they are."""
OF_A_METHOD = (
    "teachers", "target", "lambda_c", "lambda_p", "labelling_cadence", "labelling_momentum",
)  # fmt: skip
"""What makes a preset the method it is."""
CHUNKED = {"single-chunk": "single-step", "dual-chunk": "paper"}
"""More rows, of methods with prototypes: without patch logits as large as the batch."""


@dataclass(frozen=True)
class Plan(Command):
    """What stands on the command line."""

    gpu: str = "h100"
    """The GPU to plan for."""
    gpus: int = 1
    """Number of GPUs that share a step's batch."""
    images: int | None = None
    """Images in an epoch; by default those of --beton, or ImageNet-1k's 1,281,167."""
    efficiency_of_peak: float = 0.35
    """ASSUMPTION: share of the GPU's dense peak that a whole step reaches. Large products alone reach about 0.65; what
    is bound by memory halves that for widths of a ViT. Better: what a short run on your GPU reaches, images/s of its
    metrics.jsonl and GPU, times the FLOPs of an image that the plan prints, over the peak."""
    loader_rate: float | None = None
    """Images/s that one CPU core loads; by default measured here in a few seconds."""
    cores: int | None = None
    """CPU cores for each GPU that the loader will have; by default those of the GPU's usual machine, shared out."""
    network: float | None = None
    """Gbit/s that a machine sends to others; by default the usual machine's."""
    jitter: float = JITTER
    """ASSUMPTION: how much a GPU's step varies, as a share of it; every step waits for the slowest."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Write every figure to this file, here or in a store."""
    plot: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw the scaling to this .png, .pdf or .svg, here or in a store."""
    force: bool = False
    """Replace the files of --json and --plot if they exist, but no file of a run and nothing that is read here."""


def make_plan(options: Plan, tell: Callable[[str], None] = lambda _: None) -> Report:
    """Everything that a plan says.

    Args:
        tell: is told what is counted next.

    Raises:
        UserError: for settings that make no run, a GPU nobody knows, images that cannot be read.
    """
    check(options.settings)
    check_label_schedules(options.settings)
    gpu = _gpu(options)
    options = replace(options, settings=shared_out(options.settings, options.gpus)[0])
    # the last phase needs most: with its teachers the plan is made, and the time of a first one is added
    *before, phase = phases_of(options.settings)
    config = phase.config
    share = config.optimizer.batch_size // options.gpus
    epoch_images = _epoch_images(options)
    if epoch_images < config.optimizer.batch_size:
        raise UserError(f"--images {epoch_images} are less than one batch of {config.optimizer.batch_size}")

    tell("the loader")
    loader = _loader_rate(options)
    tell("the step")
    costs = step_costs(config, share, ranks=options.gpus)
    tell("the largest batch")
    largest = largest_batch(config, costs, gpu, options.gpus)

    peak = gpu.peak(config.efficiency.precision)
    rate = peak * options.efficiency_of_peak
    step = _step(config, costs, rate)
    planned = step_on(options.gpus, gpu, step, options.jitter)
    steps = epoch_images // config.optimizer.batch_size * config.optimizer.epochs
    pixels = None
    for first in before:
        tell("a step of pixels alone")
        found = step_costs(first.config, share, ranks=options.gpus)
        seconds = step_on(options.gpus, gpu, _step(first.config, found, rate), options.jitter).seconds
        epochs = first.config.optimizer.epochs
        count = epoch_images // config.optimizer.batch_size * epochs
        pixels = PixelPhase(epochs, count, found, seconds, seconds * count / 3600)
    needed_rate = config.optimizer.batch_size / planned.seconds
    sizes: list[SizePart] = []
    if options.settings.views.progressive_resolution:
        for stage in (*before, phase):
            first = pixels if stage in before else None
            whole = (costs, planned.seconds) if first is None else (first.costs, first.seconds)
            for resolution in resolutions_in(stage, options.settings):
                found, seconds = whole
                if resolution.size != config.views.image_size:
                    tell(f"a step of {resolution.size} pixels")
                    sized = at_size(stage.config, resolution)
                    found = step_costs(sized, share, ranks=options.gpus)
                    seconds = step_on(options.gpus, gpu, _step(sized, found, rate), options.jitter).seconds
                sizes.append(_size_part(stage, resolution, found, seconds, *whole, epoch_images))

    methods: list[Method] = []
    counted: dict[str, Costs] = {}  # how fast a teacher follows costs nothing
    whole = config.efficiency.prototypes_chunk == 0
    for name, preset in (METHODS | CHUNKED if whole else METHODS).items():
        tell(f"the method {name}")
        own = {key: PRESETS[preset].flat()[key] for key in OF_A_METHOD}
        method_config = config.using(**own, **({"prototypes_chunk": CHUNK} if name in CHUNKED else {}))
        of_costs = repr(method_config.using(labelling_cadence="step", labelling_momentum=(0.0, 0.0)))
        if of_costs not in counted:
            counted[of_costs] = step_costs(method_config, share, ranks=options.gpus)
        found = counted[of_costs]
        seconds = step_on(options.gpus, gpu, _step(method_config, found, rate), options.jitter).seconds
        methods.append(Method(name, found, seconds, seconds * steps / 86400))
    models = []
    for model in SHAPES:
        tell(f"the model {model}")
        sized = _sized(config, model)
        with contextlib.suppress(UserError):  # images may be too small for the patches of some
            check(sized)
            models.append(_model_needs(sized, options.efficiency_of_peak, loader.images_per_second))
    return Report(
        config=config,
        gpu_name=options.gpu,
        gpu=gpu,
        gpus=options.gpus,
        epoch_images=epoch_images,
        efficiency_of_peak=options.efficiency_of_peak,
        jitter=options.jitter,
        costs=costs,
        largest_batch=largest,
        fitting_accumulate=fitting_accumulate(share, largest),
        step=planned,
        peak_seconds=costs.flops / peak,
        traffic_seconds=costs.traffic / gpu.bandwidth,
        steps=steps,
        hours=sum(part.hours for part in sizes) or planned.seconds * steps / 3600 + (pixels.hours if pixels else 0.0),
        pixels=pixels,
        sizes=sizes,
        loader=loader,
        busy=busy(),
        needed_rate=needed_rate,
        needed_cores=needed_rate / options.gpus / loader.images_per_second,
        cores=options.cores or gpu.cores / gpu.per_node,
        methods=methods,
        models=models,
        messages=step.messages,
        weak=weak_scaling(gpu, step, jitter=options.jitter),
        strong=strong_scaling(gpu, step.times(options.gpus), config.optimizer.batch_size, jitter=options.jitter),
    )


def _size_part(
    phase: Phase, resolution: Resolution, costs: Costs, seconds: float, whole: Costs, whole_seconds: float, images: int
) -> SizePart:
    """What the epochs of a size take.

    Args:
        costs, seconds: of a step.
        whole, whole_seconds: of one with views of the last size.
        images: of an epoch.
    """
    batch, epochs = phase.config.optimizer.batch_size, resolution.last_epoch - resolution.first_epoch
    steps = images // batch * epochs
    hours, rate = seconds * steps / 3600, batch / seconds
    return SizePart(phase.name, resolution.size, epochs, steps, costs, seconds, hours, rate, whole.flops, whole_seconds)


def _gpu(options: Plan) -> Gpu:
    """The GPU with the flags that change it. Raises UserError for flags that make no plan."""
    gpu = gpu_named(options.gpu)
    rules = [
        (options.gpus >= 1, f"--gpus {options.gpus}: at least 1"),
        (options.images is None or options.images >= 1, f"--images {options.images}: at least 1"),
        (0 < options.efficiency_of_peak <= 1, f"--efficiency-of-peak {options.efficiency_of_peak} is not in (0, 1]"),
        (_positive(options.loader_rate), f"--loader-rate {options.loader_rate} is no number above 0"),
        (_positive(options.cores), f"--cores {options.cores}: at least 1"),
        (_positive(options.network), f"--network {options.network} is no number above 0"),
        (0 <= options.jitter < 1, f"--jitter {options.jitter} is not in [0, 1)"),
        (options.plot is None or Path(options.plot).suffix.lower() in (".png", ".pdf", ".svg"),
         f"--plot {options.plot} must end in .png, .pdf or .svg"),
    ]  # fmt: skip
    for fits, sentence in rules:
        if not fits:
            raise UserError(sentence)
    if options.network is not None:
        gpu = dataclasses.replace(gpu, network=options.network * 1e9 / 8)
    return gpu


def _positive(number: float | None) -> bool:
    return number is None or (math.isfinite(number) and number > 0)


def _epoch_images(options: Plan) -> int:
    if options.images is not None:
        return options.images
    return IMAGENET if not options.settings.data.beton else shown(open_images(options.settings))


def _loader_rate(options: Plan) -> LoaderRate:
    if options.loader_rate is not None:
        return LoaderRate(options.loader_rate, 1, "--loader-rate")
    return measure(options.settings)


def _step(config: Config, costs: Costs, rate: float) -> Step:
    """The step on one GPU. The backward pass is the last micro-batch's, from the losses back to the encoder."""
    micro_batches = config.optimizer.accumulate
    networks = {"head": "head", "decoder": "decoder", "student's encoder": "encoder"}
    backward = [
        (costs.backward[part] / micro_batches / rate, costs.parameters[network])
        for part, network in networks.items()
        if part in costs.backward
    ]
    labels = config.teacher.teachers in ("dual", "single")
    prototypes = 2 * config.network.prototypes if labels else 0
    # Logits in chunks are balanced on their own, after those of class tokens.
    rounds = 2 if config.efficiency.prototypes_chunk else 1
    fsdp: list[float] = []
    if config.efficiency.shard:
        depth = shape_of(config.network).depth
        blocks = {"encoder": depth, "decoder": config.network.decoder_depth, "head": 1}
        student = [(count, blocks[name]) for name, count in costs.parameters.items() if name in blocks]
        teachers = [(count, depth) for name, count in costs.parameters.items() if name not in blocks]
        fsdp = fsdp_messages(student, teachers, micro_batches)
    balanced = 1 if config.optimizer.sinkhorn_over == "step" else micro_batches
    messages = traffic(costs.trained, prototypes, config.loss.sinkhorn_iterations, balanced, fsdp, rounds)
    return Step(costs.flops / rate, backward, messages)


def largest_batch(config: Config, costs: Costs, gpu: Gpu, gpus: int) -> int:
    """Images that fit on each GPU at a time, 0 where not even one does.

    Memory grows evenly with the batch, but for the workspace of kernels: two counts tell how.
    """
    micro_batches = config.optimizer.accumulate
    count = costs.images // micro_batches
    few = max(1, count // 2) if count > 1 else 2
    other = step_costs(config, few * micro_batches, ranks=gpus)
    each = (costs.peak - other.peak) / (count - few)
    return max(0, int(count + (gpu.usable - costs.peak) / each))


def fitting_accumulate(share: int, largest: int) -> int | None:
    """The fewest equal micro-batches of a GPU's share of which each fits; None where none does."""
    return next((count for count in range(1, share + 1) if share % count == 0 and share // count <= largest), None)


def _model_needs(config: Config, efficiency: float, per_core: float) -> ModelNeeds:
    flops = flops_of_an_image(config)
    rates = {name: gpu.peak(config.efficiency.precision) * efficiency / flops for name, gpu in GPUS.items()}
    return ModelNeeds(config.network.model, flops, rates, {name: rate / per_core for name, rate in rates.items()})


def _sized(config: Config, model: str) -> Config:
    """The settings with another model, of its own sizes; its patches may ask for another image size."""
    config = config.using(model=model, patch_size=0, width=0, depth=0, heads=0)
    patch = SHAPES[model].patch_size
    return config.using(image_size=max(1, config.views.image_size // patch) * patch)


def as_json(report: Report) -> dict[str, Any]:
    """Every figure as plain values."""
    plain = dataclasses.asdict(dataclasses.replace(report, config=None))
    counted = [(plain, report), *zip(plain["methods"], report.methods, strict=True)]
    counted += zip(plain["sizes"], report.sizes, strict=True)
    if report.pixels is not None:
        counted.append((plain["pixels"], report.pixels))
    for row, counts in counted:
        found, costs = row["costs"], counts.costs
        found |= {"flops": costs.flops, "peak": costs.peak}
    for name in ("weak", "strong"):
        for row, point in zip(plain[name], getattr(report, name), strict=True):
            row["seconds"] = point.seconds
    return plain | {
        "config": report.config.groups(),
        "step": plain["step"] | {"seconds": report.step.seconds},
        "sent_bytes": report.messages.sent(report.gpus),
        "saved_flops": report.saved_flops,
        "hours_at_last": report.hours_at_last,
    }


def plan(options: Plan) -> None:
    """Make a plan, print it, and write the files that are asked for."""
    given = [path for path in (options.config, *(split_weight(each)[0] for each in sources(options.settings))) if path]
    if options.json is not None and options.json == options.plot:
        raise UserError(f"--json and --plot both name {options.json}: give each a file of its own")
    figures, picture = (
        None if out is None else open_output(out, force=options.force, inputs=given)
        for out in (options.json, options.plot)
    )
    stages = phases_of(options.settings)
    smaller = [
        each
        for phase in stages
        for each in resolutions_in(phase, options.settings)
        if each.size != options.settings.views.image_size
    ]
    with _progress(len(stages) + len(smaller)) as tell:
        report = make_plan(options, tell)
    if figures is not None:
        with figures.writing() as beside:
            beside.write_text(json.dumps(as_json(report), indent=1) + "\n")
    if picture is not None:
        with picture.writing() as beside:
            draw(report, beside)
    show(report, _console())


@contextlib.contextmanager
def _progress(stages: int) -> Iterator[Callable[[str], None]]:
    """A bar in a terminal, nothing elsewhere: a plan takes seconds."""
    counted, total = itertools.count(1), 2 + stages + len(METHODS) + len(CHUNKED) + len(SHAPES)
    with Bar(total, "counting") as bar:
        yield lambda words: bar.update(next(counted), words=f"counting {words}")


def main() -> int:
    """`fastpmae-plan`."""
    return exit_with_sentence("fastpmae-plan", _run)


def _run() -> None:
    if sys.argv[1:2] in (["segment"], ["detect"]):
        from fastpmae.plan import dense

        dense.run(sys.argv[1:], _console())
    else:
        plan(parse(Plan, "fastpmae-plan", DESCRIPTION))


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 110)


if __name__ == "__main__":
    sys.exit(main())
