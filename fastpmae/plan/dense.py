"""`fastpmae-plan segment` and `detect`: what training a segmenter or a detector will take. Needs no GPU."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastpmae.evaluate.dense.pyramid import TappedViT, parameter_groups, size_multiple, tapped_blocks
from fastpmae.evaluate.dense.pyramid import with_relative_positions as with_relative
from fastpmae.evaluate.dense.rcnn import Detector
from fastpmae.evaluate.dense.recipe import DetectConfig, SegmentConfig, detect_preset, segment_preset
from fastpmae.evaluate.dense.upernet import Segmenter, pixel_loss
from fastpmae.model.build import SHAPES
from fastpmae.plan.gpus import GPUS, Gpu, gpu_named
from fastpmae.plan.shape_tensor import Counting
from fastpmae_loaders.cli.help_texts import HELP_TEXTS
from fastpmae_loaders.cli.outputs import check_output
from fastpmae_loaders.cli.words import last_value, with_values
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import atomic_write

ADE20K, COCO = (20_210, 150), (118_287, 80)
"""Training images and classes of the paper's two sets."""


@dataclass(frozen=True)
class Common:
    """What both plans are told besides the training's own settings."""

    model: str = "vit_base"
    """Size of the ViT, as `fastpmae-train --model` names it."""
    gpu: str = "h100"
    """The GPU to plan for."""
    gpus: int = 1
    """Number of GPUs that share a step's batch."""
    images: int | None = None
    """Training images; by default ADE20K's or COCO's."""
    classes: int | None = None
    """Classes; by default ADE20K's or COCO's."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the products; auto is bf16, as on a GPU."""
    efficiency_of_peak: float = 0.35
    """ASSUMPTION: share of the GPU's dense peak that a whole step reaches."""
    json: Path | None = None
    """Write every figure to this file."""
    force: bool = False
    """Replace the file of --json if it exists."""


@dataclass(frozen=True)
class SegmentPlan:
    """A segmentation's training, with the flags of `fastpmae-eval segment`."""

    common: Annotated[Common, tyro.conf.arg(name="")]
    config: Annotated[SegmentConfig, tyro.conf.arg(name="")]
    preset: str = "paper"
    """Settings to start from, as of `fastpmae-eval segment`."""


@dataclass(frozen=True)
class DetectPlan:
    """A detection's training, with the flags of `fastpmae-eval detect`; images are taken for 4:3."""

    common: Annotated[Common, tyro.conf.arg(name="")]
    config: Annotated[DetectConfig, tyro.conf.arg(name="")]
    preset: str = "paper"
    """Settings to start from, as of `fastpmae-eval detect`."""
    masks: bool = True
    """Learn the outlines of objects too (Mask R-CNN)."""


@dataclass(frozen=True)
class DenseCosts:
    """What one step costs each GPU. FLOPs count products alone, a multiplication and an addition as two.

    Attributes:
        images: that the GPU computes at a time.
        height, width: of them, in pixels.
        parameters: by part.
        forward: FLOPs by part, of one micro-batch.
        backward: of its backward pass.
        memory: bytes by kind at the moment when most are held.
    """

    images: int
    height: int
    width: int
    parameters: dict[str, int]
    forward: dict[str, int]
    backward: int
    memory: dict[str, int]

    @property
    def flops(self) -> int:
        return sum(self.forward.values()) + self.backward

    @property
    def peak(self) -> int:
        """Bytes held at most."""
        return sum(self.memory.values())


def segment_costs(
    model: str, config: SegmentConfig, images: int, classes: int, *, low: bool = True, waits: bool = False
) -> DenseCosts:
    """A step of `fastpmae-eval segment` on so many images at a time, run on tensors without memory.

    Args:
        low: products in bf16.
        waits: gradients of earlier micro-batches, or those that travel between GPUs, stay while one is computed.
    """
    counting, side = Counting(), config.crop_size
    with torch.device("meta"):
        network = Segmenter(_body(model, config, side), classes, config.channels, config.dropout)
    for module in (each for each in network.modules() if type(each) is nn.BatchNorm2d):
        module.__class__ = _BatchNormOverRanks
    with counting:
        _materialize(network, counting)
        given, masks = torch.empty(images, 3, side, side), torch.empty(images, side, side, dtype=torch.int16)
        parts: dict[str, nn.Module] = {
            "ViT": network.backbone, "pyramid": network.pyramid, "decoder": network.decoder,
            "classifier of pixels": network.classify, "auxiliary head": network.auxiliary,
        }  # fmt: skip

        def loss() -> Tensor:
            logits, auxiliary = network(given)
            assert auxiliary is not None
            return pixel_loss(logits, masks, -1) + config.auxiliary_weight * pixel_loss(auxiliary, masks, -1)

        groups = parameter_groups(
            network.backbone, list(parts.values())[1:], lr=config.lr, weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )  # fmt: skip
        return _step(counting, network, parts, groups, loss, low, waits, (images, side, side))


def detect_costs(
    model: str, config: DetectConfig, images: int, classes: int, *, masks: bool = True, low: bool = True,
    waits: bool = False,
) -> DenseCosts:  # fmt: skip
    """The same of `fastpmae-eval detect`: the largest images of the training, and as many boxes as a step looks at.

    What depends on the boxes that are found (sorting, their overlaps, pooling) is no product and is left out.
    """
    counting = Counting()
    with torch.device("meta"):
        network = Detector(_body(model, config, _trained_size(model)), classes, config, masks=masks)
    with counting:
        _materialize(network, counting)
        multiple, heads = size_multiple(network.backbone.patch_size), network.roi_heads
        short = config.crop_size or config.short_sides[1]
        long = config.crop_size or min(config.long_side, round(short * 4 / 3))
        height, width = (-(-extent // multiple) * multiple for extent in (short, long))
        given = torch.empty(images, 3, height, width)
        parts: dict[str, nn.Module] = {"ViT": network.backbone, "pyramid": network.pyramid}
        parts |= {"proposals": network.rpn.head, "boxes": nn.ModuleList([heads.box_head, heads.box_predictor])}
        if masks:
            assert heads.mask_head is not None
            assert heads.mask_predictor is not None
            parts["masks"] = nn.Sequential(heads.mask_head, heads.mask_predictor)

        def loss() -> Tensor:
            maps = list(network.pyramid(network.backbone(given)).values())
            found = [each.float().sum() for answers in network.rpn.head(maps) for each in answers]
            pooled = _pooled(maps, images * config.boxes_per_image, 7)
            found += [each.float().sum() for each in heads.box_predictor(heads.box_head(pooled))]
            if masks:
                pooled = _pooled(maps, images * config.boxes_per_image // 4, 14)
                found.append(parts["masks"](pooled).float().sum())
            return torch.stack(found).sum()

        groups = parameter_groups(
            network.backbone, network.new_parts, lr=config.lr, weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )  # fmt: skip
        return _step(counting, network, parts, groups, loss, low, waits, (images, height, width))


class _BatchNormOverRanks(nn.BatchNorm2d):
    """Keeps what SyncBatchNorm does, for which one image is enough: others are on other GPUs."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.batch_norm(input, self.weight, self.bias, None, None, True, 0.1, self.eps, True)


def _pooled(maps: Sequence[Tensor], boxes: int, side: int) -> Tensor:
    """Features of boxes, as large as RoIAlign's and with a gradient to the maps."""
    first = maps[0].float().mean(dim=(0, 2, 3))[None, :, None, None]
    return first.expand(boxes, -1, side, side).contiguous()


def _materialize(network: nn.Module, counting: Counting) -> None:
    """Give a network without memory weights that are counted."""
    counting.kind = "weights"
    network.to_empty(device="cpu")


def _shape(model: str) -> Any:
    if model not in SHAPES:
        raise UserError(f"--model {model}: there is no such model; choose one of {', '.join(SHAPES)}")
    return SHAPES[model]


def _trained_size(model: str) -> int:
    """About 224 pixels, in whole patches."""
    patch_size = _shape(model).patch_size
    return 224 // patch_size * patch_size


def _body(model: str, config: SegmentConfig | DetectConfig, side: int) -> TappedViT:
    from timm.models.vision_transformer import VisionTransformer

    shape = _shape(model)
    if side % shape.patch_size:
        raise UserError(f"--crop-size {side} is no multiple of the patches of {shape.patch_size} pixels")
    vit: Any = VisionTransformer(
        img_size=side, patch_size=shape.patch_size, embed_dim=shape.width, depth=shape.depth, num_heads=shape.heads,
        mlp_ratio=shape.mlp_ratio, num_classes=0, drop_path_rate=config.drop_path,
    )  # fmt: skip
    if isinstance(config, SegmentConfig) and config.relative_positions:
        vit = with_relative(vit, config.drop_path)
    return TappedViT(vit, tapped_blocks(shape.depth), config.activation_checkpointing)


def _step(
    counting: Counting,
    network: nn.Module,
    parts: dict[str, nn.Module],
    groups: list[dict[str, Any]],
    loss: Callable[[], Tensor],
    low: bool,
    waits: bool,
    sizes: tuple[int, int, int],
) -> DenseCosts:
    """Forward pass, backward pass and update, as the second step does them: the optimizer's state is there."""

    def entering(part: str) -> Callable[..., None]:
        return lambda *_: setattr(counting, "part", part)

    for name, module in parts.items():
        for each in module if isinstance(module, nn.ModuleList) else [module]:
            each.register_forward_pre_hook(entering(name))
            each.register_forward_hook(entering("rest"))
    counting.kind = "optimizer"
    optimizer = torch.optim.AdamW(groups, lr=1.0, fused=True)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    gone = {number for number, nbytes, _ in counting.events if nbytes < 0}
    counting.events = [event for event in counting.events if event[0] not in gone]
    counting.flops.clear()
    held = [counting.hold(parameter.nbytes, "gradients") for parameter in trained] if waits else []
    counting.kind, counting.part = "activations", "rest"
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        total = loss()
    forward = {name: flops for name, flops in counting.flops.items() if flops}
    counting.flops.clear()
    counting.kind = "gradients"
    total.backward()
    backward = sum(counting.flops.values())
    optimizer.step()
    memory, _ = counting.peak()
    del held
    counted = {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in parts.items()}
    return DenseCosts(*sizes, counted, forward, backward, memory)


@dataclass(frozen=True)
class DensePlan:
    """A plan of one training.

    Attributes:
        steps: of the whole training.
        seconds: of a step, assumed.
        largest_batch: images that fit on the GPU at a time; 0 where not even one does.
    """

    kind: str
    costs: DenseCosts
    gpu: Gpu
    gpus: int
    steps: int
    seconds: float
    hours: float
    largest_batch: int


def make_plan(options: SegmentPlan | DetectPlan) -> DensePlan:
    """Everything that a plan says. Raises UserError for settings that make no training."""
    common, config = options.common, options.config
    is_segment = isinstance(options, SegmentPlan)
    default = ADE20K if is_segment else COCO
    images, classes = (
        given if own is None else own for own, given in zip((common.images, common.classes), default, strict=True)
    )
    gpu = gpu_named(common.gpu)
    for fits, sentence in (
        (common.gpus >= 1, f"--gpus {common.gpus}: at least 1"),
        (images >= 1, f"--images {images}: at least 1"),
        (classes >= 1, f"--classes {classes}: at least 1"),
        (0 < common.efficiency_of_peak <= 1, f"--efficiency-of-peak {common.efficiency_of_peak} is not in (0, 1]"),
        (config.batch_size % (common.gpus * config.accumulate) == 0,
         f"--batch-size {config.batch_size} does not share out over {common.gpus} GPUs x --accumulate "
         f"{config.accumulate}"),
    ):  # fmt: skip
        if not fits:
            raise UserError(sentence)
    if isinstance(options, SegmentPlan):
        options.config.check_images()
    low = common.precision != "fp32"
    share, waits = config.micro_batch // common.gpus, common.gpus > 1 or config.accumulate > 1

    def costs(count: int) -> DenseCosts:
        if isinstance(options, SegmentPlan):
            return segment_costs(common.model, options.config, count, classes, low=low, waits=waits)
        return detect_costs(common.model, options.config, count, classes, masks=options.masks, low=low, waits=waits)

    counted, other = costs(share), costs(share + 1)
    room = gpu.usable - counted.peak
    largest = max(0, share + int(room // max(1, other.peak - counted.peak)))
    rate = gpu.peak("fp32" if common.precision == "fp32" else "bf16") * common.efficiency_of_peak
    seconds = config.accumulate * counted.flops / rate
    steps = options.config.iterations if isinstance(options, SegmentPlan) else options.config.iterations_for(images)
    kind = "segment" if is_segment else "detect"
    return DensePlan(kind, counted, gpu, common.gpus, steps, seconds, seconds * steps / 3600, largest)


def show(plan: DensePlan, options: SegmentPlan | DetectPlan, console: Console) -> None:
    """Print a plan."""
    costs, common = plan.costs, options.common
    console.print(
        f"{plan.kind}, {common.model}: {plan.steps:,} steps of {options.config.batch_size} images of up to "
        f"{costs.height} x {costs.width} pixels on {plan.gpus} x {plan.gpu.words}"
    )
    table = Table("part", "M parameters", "GFLOP an image")
    for part, count in costs.parameters.items():
        table.add_row(part, f"{count / 1e6:.1f}", f"{costs.forward.get(part, 0) / costs.images / 1e9:,.1f}")
    total = sum(costs.parameters.values()) / 1e6
    table.add_row("all, forward", f"{total:.1f}", f"{sum(costs.forward.values()) / costs.images / 1e9:,.1f}")
    table.add_row("with the backward pass", "", f"{costs.flops / costs.images / 1e9:,.1f}")
    console.print(table)
    held = ", ".join(f"{kind} {nbytes / 1e9:.1f}" for kind, nbytes in costs.memory.items() if nbytes >= 5e7)
    fits = f"up to {plan.largest_batch} fit at a time" if plan.largest_batch else "not even one image fits"
    console.print(
        f"memory of a step with {costs.images} images a GPU: {costs.peak / 1e9:.1f} GB ({held}) of "
        f"{plan.gpu.usable / 1e9:.1f} GB; {fits}"
    )
    console.print(
        f"ASSUMED: {common.efficiency_of_peak:.0%} of the dense peak (--efficiency-of-peak). A step takes "
        f"{1000 * plan.seconds:,.0f} ms, the training {_duration(plan.hours)}, without tests and messages between GPUs"
    )


def _duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.1f} minutes"


def run(words: Sequence[str], console: Console) -> None:
    """`fastpmae-plan segment ...` or `detect ...`. Raises UserError for what does not fit."""
    options = _read(words)
    if options.common.json is not None:
        check_output(options.common.json, force=options.common.force, inputs=[])
    plan = make_plan(options)
    if options.common.json is not None:
        record = dataclasses.asdict(plan) | {"flops": plan.costs.flops, "peak": plan.costs.peak}
        with atomic_write(options.common.json, options.common.force) as beside:
            beside.write_text(json.dumps(record, indent=1) + "\n")
    show(plan, options, console)


def _read(words: Sequence[str]) -> SegmentPlan | DetectPlan:
    kind, arguments = words[0], list(words[1:])
    preset = last_value(with_values(arguments), "--preset") or "paper"
    default: Any
    if kind == "detect":
        default = DetectPlan(Common(), detect_preset(preset))
    else:
        default = SegmentPlan(Common(), segment_preset(preset))
    return tyro.cli(
        tyro.conf.configure(tyro.conf.OmitArgPrefixes)(type(default)),
        prog=f"fastpmae-plan {kind}",
        description=f"Predict what `fastpmae-eval {kind}` will take. GPUs known: {', '.join(GPUS)}.",
        args=arguments,
        default=default,
        registry=HELP_TEXTS,
    )
