"""What a training step costs, counted and not estimated: the real step is run on tensors without memory."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastpmae.config import Config
from fastpmae.distributed.ranks import Ranks
from fastpmae.model.build import build_student, shape_of, view_settings, views_needed
from fastpmae.model.fp8 import use_fp8
from fastpmae.model.teachers import Teachers, make_teachers
from fastpmae.model.vit import Student
from fastpmae.plan.shape_tensor import Counting, ShapeTensor, leaves
from fastpmae.pretraining.optimizer import make_optimizer, update
from fastpmae.pretraining.step import compute_targets, student_loss
from fastpmae_kernels import traffic
from fastpmae_kernels.cpu.rows import row_blocks
from fastpmae_loaders import Batch

Target = Literal["cpu", "cuda"]

KINDS = ("weights", "gradients", "optimizer", "teachers", "gathered", "images", "activations", "logits", "workspace")
"""What memory is for. `weights` and `teachers` hold their 16-bit copies too; `activations` is all that a step makes;
`gathered` is what of sharded networks is whole at a time."""


@dataclass(frozen=True)
class Costs:
    """What one step costs each GPU. FLOPs count products alone, a multiplication and an addition as two."""

    images: int
    """Images of a step on this GPU."""
    forward: dict[str, int]
    """FLOPs by part."""
    backward: dict[str, int]
    """The same of the backward pass."""
    parameters: dict[str, int]
    """By network."""
    memory: dict[str, int]
    """Bytes by kind at the moment when most are held."""
    moment: str
    """The part that is computed then."""
    traffic: int
    """Bytes that all operations read and write when none is fused with another."""

    @property
    def flops(self) -> int:
        return sum(self.forward.values()) + sum(self.backward.values())

    @property
    def peak(self) -> int:
        """Bytes held at most."""
        return sum(self.memory.values())

    @property
    def trained(self) -> int:
        """Parameters that have a gradient."""
        return sum(count for name, count in self.parameters.items() if "teacher" not in name)


def step_costs(config: Config, images: int, *, target: Target = "cuda", ranks: int = 1) -> Costs:
    """The costs of a step in which one of `ranks` GPUs (or a CPU) computes `images` images, a micro-batch at a time.

    Everything is as the trainer does it without torch.compile, which fuses some of the operations and so holds less.

    Args:
        images: of all micro-batches (`accumulate`) together.
        target: what it runs on; decides the precision where the settings leave it open, and the kernels' workspace.
    """
    micro_batches = config.optimizer.accumulate
    count = max(1, images // micro_batches)
    low = config.efficiency.precision == "bf16" or (config.efficiency.precision == "auto" and target == "cuda")
    sharded = config.efficiency.shard and ranks > 1
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=low, cache_enabled=not sharded)
    counting = Counting()
    counting.observe = functools.partial(_observe, counting, target)
    with counting:
        student, teachers, optimizer = _networks(config, counting)
        of_student = [parameter for parameter in student.parameters() if parameter.requires_grad]
        # Gradients of earlier micro-batches, and those that travel between ranks, stay while one is computed.
        held = None
        if ranks > 1 or micro_batches > 1:
            held = [counting.hold(parameter.nbytes, "gradients") for parameter in of_student]
        waiting = None
        counting.kind = "images"
        batch, drop_path_scale = _batch(config, count)
        counting.kind = "activations"
        counting.traffic = 0
        with autocast():
            counting.part = "labels"
            targets = compute_targets(teachers, batch, config)
            if config.optimizer.sinkhorn_over == "step":
                # The other micro-batches' targets wait meanwhile.
                nbytes = sum(tensor.nbytes for tensor in leaves(targets) if isinstance(tensor, Tensor))
                waiting = counting.hold((micro_batches - 1) * nbytes, "logits")
            counting.part = "losses"
            losses = student_loss(student, batch, drop_path_scale, targets, config)
        forward = dict(counting.flops)
        counting.flops.clear()
        losses.total.backward()
        backward = dict(counting.flops)
        for parameter in of_student:
            if isinstance(parameter.grad, ShapeTensor):
                counting.tags[parameter.grad.buffer.number] = "gradients" if held is None else "activations"
        of_micro_batch = counting.traffic
        counting.part = "optimizer"
        update(optimizer, losses.total.detach(), 0.0, config.optimizer.clip_grad, _ALONE)
        teachers.update_ema(student, "step", 0)
        memory, moment = counting.peak()
        if sharded:
            memory = _in_shards(memory, student, teachers, ranks)
        parameters = _parameters(student, teachers)
        del held, waiting
    return Costs(
        images,
        {part: flops * micro_batches for part, flops in forward.items()},
        {part: flops * micro_batches for part, flops in backward.items()},
        parameters,
        {kind: memory[kind] for kind in KINDS if kind in memory},
        moment,
        of_micro_batch * micro_batches + counting.traffic - of_micro_batch,
    )


def flops_of_an_image(config: Config) -> float:
    """FLOPs of a step, an image: exact, from two counts of one and of two blocks, which are all alike."""
    depths = shape_of(config.network).depth, config.network.decoder_depth
    images = config.optimizer.accumulate
    one, two = (
        step_costs(config.using(depth=blocks, decoder_depth=blocks, drop_path=0.0), images) for blocks in (1, 2)
    )
    total = 0
    for first, second in ((one.forward, two.forward), (one.backward, two.backward)):
        for part, flops in first.items():
            blocks = depths[0] if part.endswith("encoder") else depths[1]
            total += flops + (blocks - 1) * (second[part] - flops)
    return total / images


_ALONE = Ranks(0, 1, 1, torch.device("cpu"), None)


def _networks(config: Config, counting: Counting) -> tuple[Student, Teachers, torch.optim.AdamW]:
    """The networks as they are after some steps: with the optimizer's state, and set to say what they compute."""
    counting.kind = "weights"
    student = build_student(config)
    counting.kind = "teachers"
    settings = config.using(teacher_init="copy").teacher
    teachers = make_teachers(student, settings, 1, 1, torch.Generator())
    if config.efficiency.teacher_precision == "fp8":
        for teacher in teachers.modules().values():
            use_fp8(teacher.encoder)
    counting.kind = "optimizer"
    optimizer = make_optimizer(student, config)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    counting.events = _settled(counting.events)
    parts: list[tuple[nn.Module | None, str, str]] = [
        (student.encoder, "forward", "student's encoder"),
        (student.decoder, "forward", "decoder"),
        (student.head, "forward", "head"),
        (student.head, "patch_factors", "head"),
    ]
    for name, teacher in teachers.modules().items():
        words = "teacher" if teachers.reconstruction is teachers.labelling else name.replace("_", " ")
        parts += [(teacher.encoder, "encode_folds", f"{words}'s encoder"), (teacher.head, "forward", f"{words}'s head")]
    for module, method, part in parts:
        if module is not None:
            setattr(module, method, _telling(counting, part, getattr(module, method)))
    return student, teachers, optimizer


def _settled(events: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """The events without memory that was given back: what setting up takes for a moment is no part of a step."""
    gone = {number for number, nbytes, _ in events if nbytes < 0}
    return [event for event in events if event[0] not in gone]


def _telling(counting: Counting, part: str, method: Callable) -> Callable:
    """The method, which tells that `part` is computed: while it runs, and when the gradient is back at its end."""

    def tell(_: Tensor) -> None:
        counting.part = part

    def run(*args: Any) -> Any:
        before, counting.part = counting.part, part
        try:
            result = method(*args)
        finally:
            counting.part = before
        for tensor in leaves(result):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(tell)
        return result

    return run


def _in_shards(memory: dict[str, int], student: Student, teachers: Teachers, ranks: int) -> dict[str, int]:
    """The memory of one of so many ranks: its share of what is held all the time, and what is whole for a moment.

    An estimate of the latter: what belongs to no block, and of the largest block the weights that are computed with,
    those on their way, and the gradients.
    """

    def nbytes(*networks: nn.Module | None) -> int:
        return sum(parameter.nbytes for network in networks if network for parameter in network.parameters())

    kept = {"weights": nbytes(student), "gradients": nbytes(student), "optimizer": 2 * nbytes(student)}
    kept["teachers"] = nbytes(*teachers.modules().values())
    units = [nbytes(unit) for unit in (*student.encoder.blocks, *student.decoder.blocks, student.head)]
    gathered = nbytes(student) - sum(units) + 3 * max(units)
    shared = {kind: memory.get(kind, 0) - whole * (ranks - 1) // ranks for kind, whole in kept.items() if whole}
    return memory | shared | {"gathered": gathered}


def _batch(config: Config, count: int) -> tuple[Batch, Tensor | None]:
    """A batch and its stochastic depth."""
    settings = view_settings(config)
    masked = settings.patches - settings.visible
    views = [torch.empty(count, 3, view.size, view.size, dtype=torch.uint8) for view in views_needed(config)]
    batch = Batch(
        views=tuple(views),
        visible=torch.empty(count, settings.visible, dtype=torch.int64),
        folds=torch.empty(count, masked, dtype=torch.int64),
        fold_sizes=settings.fold_sizes,
        label=torch.empty(count, dtype=torch.int64),
        index=torch.empty(count, dtype=torch.int64),
        boxes=torch.empty(count, 2, 4, dtype=torch.int32),
        flips=torch.empty(count, 2, dtype=torch.bool),
        factors=torch.empty(count, 2, 5, dtype=torch.float64),
        choices=torch.empty(count, 2, 9, dtype=torch.uint8),
        source_size=torch.empty(count, 2, dtype=torch.int32),
        samples=np.arange(0),
        failed=[],
    )
    return batch, None if config.network.drop_path == 0 else torch.empty(count, shape_of(config.network).depth, 2)


def _parameters(student: Student, teachers: Teachers) -> dict[str, int]:
    networks: list[tuple[str, nn.Module | None]] = [
        ("encoder", student.encoder),
        ("decoder", student.decoder),
        ("head", student.head),
    ]
    networks += [(name.replace("_", " "), teacher) for name, teacher in teachers.modules().items()]
    return {
        name: sum(parameter.numel() for parameter in network.parameters())
        for name, network in networks
        if network is not None
    }


def _observe(
    counting: Counting, target: Target, func: Any, operands: Sequence[ShapeTensor], results: Sequence[ShapeTensor]
) -> None:
    """What the shapes alone do not tell: 16-bit copies of weights, logits, the work that kernels of our own do."""
    name = func._opname
    if name == "_to_copy" and operands and counting.tags[operands[0].buffer.number] in ("weights", "teachers"):
        counting.tags[results[0].buffer.number] = counting.tags[operands[0].buffer.number]
    if func.namespace != "fastpmae":
        return
    if name in ("column_logsumexp", "assigned_sums") or name.startswith("prototype_loss"):
        for tensor in (*operands[:2], *results):
            if tensor.ndim == 2:
                counting.tags[tensor.buffer.number] = "logits"
    if name == "nearest_patch":
        ours, theirs = operands
        counting.flops[counting.part] += 2 * ours.numel() * theirs.shape[1]
    counting.hold(_workspace(name, operands, target), "workspace")


def _workspace(name: str, operands: Sequence[Tensor], target: Target) -> int:
    """Bytes that a kernel holds beside its operands and results while it runs."""
    first = operands[0]
    if name in ("column_logsumexp", "assigned_sums"):
        rows, prototypes = first.shape
        if target == "cuda":
            parts = getattr(traffic, name)(rows, prototypes, first.itemsize).written
        else:
            parts = len(row_blocks(rows)) * prototypes * (8 if name == "column_logsumexp" else 4)
        # Maxima and sums of the parts are joined through two temporaries as large as both.
        return 2 * parts if name == "column_logsumexp" else parts
    if target == "cpu" and name == "nearest_patch":
        # Each thread widens the tokens of one image at a time.
        images, width = min(torch.get_num_threads(), len(first)), 4 * first.shape[2]
        return images * sum(each.shape[1] * width for each in operands[:2] if each.dtype != torch.float32)
    return 0
