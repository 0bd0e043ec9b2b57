"""The work of one training step as functions of networks and a batch: no state, no host syncs, no logging."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastpmae.config import Config, Loss
from fastpmae.model.head import PrototypeLogits, centred
from fastpmae.model.teachers import Teacher, Teachers
from fastpmae.pretraining.losses import (
    PseudoLabels,
    class_loss,
    patch_loss,
    pixel_loss,
    pixel_target,
    pseudo_labels,
    reconstruction_loss,
    reconstruction_target,
)
from fastpmae_kernels import nearest_patch
from fastpmae_loaders import Batch


class Targets(NamedTuple):
    """What the teachers give: nothing here carries a gradient."""

    reconstruction: Float[Tensor, "batch masked values"]
    tokens: Float[Tensor, "batch masked dim"] | None
    """The reconstruction teacher's tokens before they are normalised; the log reads their std."""
    label_tokens: Float[Tensor, "batch masked dim"] | None
    class_labels: PseudoLabels | None
    patch_labels: PseudoLabels | None


class Losses(NamedTuple):
    """The sum of equation 5 and its three parts, unweighted; and what the match was."""

    total: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    class_label: Float[Tensor, ""]
    patch_label: Float[Tensor, ""]
    match: Int[Tensor, "batch masked"] | None = None
    """The teacher patch that each masked patch was matched with; the log holds it against geometry."""

    def stack(self) -> Float[Tensor, " losses"]:
        """The losses without the match, in the order of the fields, which is that of `Meter.names`."""
        return torch.stack(self[:-1])


class TeacherOutputs(NamedTuple):
    """What the teachers make of a batch, before its pseudo labels are balanced."""

    targets: Targets
    """Without labels."""
    logits: tuple[PrototypeLogits, PrototypeLogits] | None
    """Of class and patch tokens, where there is a labelling teacher; with `center_bottleneck` yet to be centred."""


def compute_targets(
    teachers: Teachers, batch: Batch, config: Config, group: dist.ProcessGroup | None = None
) -> Targets:
    """Both teachers' targets for a batch: target tokens of one view, pseudo labels of the other (section 3.2)."""
    return assign_pseudo_labels([teacher_forward(teachers, batch, config)], config, group)[0]


@torch.no_grad()
def teacher_forward(teachers: Teachers, batch: Batch, config: Config) -> TeacherOutputs:
    """The teachers' part of `compute_targets`."""
    if config.loss.target == "pixels":
        # Every patch is visible or masked, so a batch tells their size; a graph cannot ask what a model's name means.
        side = math.isqrt(batch.visible.shape[1] + batch.folds.shape[1])
        target = pixel_target(batch.simple, batch.folds, batch.simple.shape[-1] // side)
        return TeacherOutputs(Targets(target, None, None, None, None), None)
    assert teachers.reconstruction is not None
    view = getattr(batch, config.views.reconstruction_view)
    _, tokens = teachers.reconstruction.encoder.encode_folds(view, batch.folds, batch.fold_sizes)
    target = reconstruction_target(tokens)
    if teachers.labelling is None:
        return TeacherOutputs(Targets(target, tokens, None, None, None), None)
    label_tokens, logits = labelling_forward(teachers.labelling, batch, config)
    return TeacherOutputs(Targets(target, tokens, label_tokens, None, None), logits)


def labelling_forward(
    teacher: Teacher, batch: Batch, config: Config
) -> tuple[
    Float[Tensor, "batch masked dim"],
    tuple[PrototypeLogits, PrototypeLogits],
]:
    """The labelling teacher's tokens, and the logits of its class and patch tokens."""
    view = getattr(batch, config.views.labelling_view)
    class_tokens, patch_tokens = teacher.encoder.encode_folds(view, batch.folds, batch.fold_sizes)
    assert teacher.head is not None
    tokens = class_tokens.flatten(0, 1), patch_tokens.flatten(0, 1)
    with _finer(view):
        if config.loss.center_bottleneck:
            return patch_tokens, teacher.head.uncentred(*tokens)
        return patch_tokens, teacher.head(*tokens, config.efficiency.prototypes_chunk)


def _finer(tensor: Tensor) -> torch.autocast:
    """Where the rest is in bf16 the labelling head is in fp16: as fast, and its logits are eight times as fine."""
    kind = tensor.device.type
    return torch.autocast(kind, torch.float16, enabled=torch.is_autocast_enabled(kind))


@torch.no_grad()
def assign_pseudo_labels(
    micro_batches: Sequence[TeacherOutputs], config: Config, group: dist.ProcessGroup | None = None, epoch: int = 0
) -> list[Targets]:
    """The targets of each micro-batch, class and patch labels balanced apart over all micro-batches and all ranks.

    Args:
        epoch: from 0, in which the temperatures are what their schedule says.
    """
    logits = [micro_batch.logits for micro_batch in micro_batches if micro_batch.logits is not None]
    if not logits:
        return [micro_batch.targets for micro_batch in micro_batches]
    if config.loss.center_bottleneck:
        of_class, of_patch = zip(*logits, strict=True)
        with _finer(micro_batches[0].targets.reconstruction):
            classes, patches = centred(of_class, group), centred(of_patch, group, config.efficiency.prototypes_chunk)
        logits = list(zip(classes, patches, strict=True))
    labels = pseudo_labels(logits, epsilons(config.loss, epoch), config.loss.sinkhorn_iterations, group)
    return [
        micro_batch.targets._replace(class_labels=of_class, patch_labels=of_patch)
        for micro_batch, (of_class, of_patch) in zip(micro_batches, labels, strict=True)
    ]


def epsilons(loss: Loss, epoch: int) -> tuple[float, float]:
    """The temperatures of the assignment of class and of patch labels in an epoch, counted from 0.

    They warm up in even steps from one epoch to the next, as the temperature of DINO's teacher does.
    """
    share, last = 1.0, loss.warmup_epsilon_epochs - 1
    if loss.warmup_epsilon is not None and epoch <= last:
        start = loss.warmup_epsilon / loss.epsilon
        share = start + (1 - start) * (epoch / last if last else 0.0)
    of_class = loss.epsilon if loss.class_epsilon is None else loss.class_epsilon
    return share * of_class, share * loss.epsilon


def label_losses(
    class_logits: PrototypeLogits,
    patch_logits: PrototypeLogits,
    targets: Targets,
    match: Int[Tensor, "batch masked"],
    folds: int,
    temperature: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """L_c and L_p of the student's logits (equations 3 and 4)."""
    assert targets.class_labels is not None
    assert targets.patch_labels is not None
    return (
        class_loss(class_logits, targets.class_labels, folds, temperature),
        patch_loss(patch_logits, targets.patch_labels, match, temperature),
    )


def student_loss(
    student: nn.Module,
    batch: Batch,
    drop_path_scale: Float[Tensor, "batch depth 2"] | None,
    targets: Targets,
    config: Config,
    losses_of_labels: Callable[..., tuple[Float[Tensor, ""], Float[Tensor, ""]]] = label_losses,
) -> Losses:
    """The student's predictions and the three losses (equations 1 to 5).

    Args:
        losses_of_labels: `label_losses`, or the same outside the graph that this becomes.
    """
    loss = config.loss
    predicted, class_logits, patch_logits = student(
        batch.simple, batch.visible, batch.folds, drop_path_scale, config.efficiency.prototypes_chunk
    )
    if loss.target == "pixels":
        reconstruction = pixel_loss(predicted, targets.reconstruction)
    else:
        reconstruction = reconstruction_loss(predicted, targets.reconstruction, loss.cosine_axis, batch.fold_sizes)
    if targets.label_tokens is None:
        nothing = torch.zeros_like(reconstruction)
        return Losses(loss.lambda_m * reconstruction, reconstruction, nothing, nothing)
    match = nearest_patch(
        predicted.detach(), targets.label_tokens, loss.match_metric, loss.match_scope, batch.fold_sizes
    )
    folds = len(batch.fold_sizes)
    of_class, of_patch = losses_of_labels(class_logits, patch_logits, targets, match, folds, loss.student_temperature)
    total = loss.lambda_m * reconstruction + loss.lambda_c * of_class + loss.lambda_p * of_patch
    return Losses(total, reconstruction, of_class, of_patch, match)
