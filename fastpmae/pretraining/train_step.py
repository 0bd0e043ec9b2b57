"""One optimizer step over its micro-batches: targets, losses, gradients, the update, and the teachers that follow."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastpmae.config import Config
from fastpmae.distributed.data_parallel import no_sync
from fastpmae.distributed.ranks import Ranks
from fastpmae.model.teachers import Teachers
from fastpmae.model.vit import Student
from fastpmae.pretraining.compile import StepFunction
from fastpmae.pretraining.optimizer import update
from fastpmae.pretraining.step import Targets, assign_pseudo_labels
from fastpmae_loaders import Batch

MicroBatch = tuple[Batch, Float[Tensor, "batch depth 2"] | None]
"""Images with their stochastic depth."""


@dataclass(frozen=True)
class Training:
    """What a step works on.

    Attributes:
        parallel: the student as it is called, over all ranks.
        teacher_forward: of `pretraining.step`, compiled or as it is.
        student_loss: likewise.
    """

    config: Config
    ranks: Ranks
    student: Student
    teachers: Teachers
    parallel: nn.Module
    optimizer: torch.optim.AdamW
    teacher_forward: StepFunction
    student_loss: StepFunction
    autocast: torch.autocast


class Done(NamedTuple):
    """What is known of a step that is done, all of it still on the device."""

    losses: Float[Tensor, " losses"]
    """Means over the micro-batches, in the order of `Losses`."""
    grad_norm: Float[Tensor, ""]
    skipped: Float[Tensor, ""]
    """1 where the update was left out, since it was not finite."""
    index: Int[Tensor, " images"]
    """The samples of this rank."""
    batch: Batch
    """The last micro-batch, with its targets and its match."""
    targets: Targets
    match: Int[Tensor, "batch masked"] | None
    label_losses: tuple[Float[Tensor, ""], Float[Tensor, ""]]
    """Of the last micro-batch's class and patch tokens, on this rank."""


def train_step(
    training: Training,
    batches: Iterator[MicroBatch],
    step: int,
    epoch: int,
    lr: float,
    before_update: Callable[[], None],
) -> Done:
    """Train on the next micro-batches, `accumulate` of them.

    Args:
        step: its number, from 0 at the phase's start.
        epoch: likewise.
        lr: its learning rate.
        before_update: called before anything is changed in place.
    """
    config, accumulate = training.config, training.config.optimizer.accumulate
    losses, index = [], []
    for number, (batch, drop_path_scale, targets) in enumerate(_with_targets(training, batches, epoch), 1):
        # Gradients travel between the ranks with the last micro-batch alone.
        with contextlib.nullcontext() if number == accumulate else no_sync(training.parallel):
            with training.autocast:
                found = training.student_loss(training.parallel, batch, drop_path_scale, targets, config)
            (found.total / accumulate).backward()
        losses.append(found.stack().detach())
        index.append(batch.index)
        if number < accumulate:
            del found, targets, batch  # their logits would stay beside those of the next
    mean_losses = torch.stack(losses).mean(dim=0)
    before_update()
    if epoch < config.optimizer.freeze_prototypes:
        freeze_prototypes(training.student)
    norm, skipped = update(training.optimizer, mean_losses[0], lr, config.optimizer.clip_grad, training.ranks)
    training.teachers.update_ema(training.student, "step", step)
    of_class, of_patch = found.class_label.detach(), found.patch_label.detach()
    return Done(mean_losses, norm, skipped, torch.cat(index), batch, targets, found.match, (of_class, of_patch))


def freeze_prototypes(student: Student) -> None:
    """Leave the prototypes out of the next update, weight decay and moments included."""
    if student.head is not None:
        student.head.class_prototypes.grad = student.head.patch_prototypes.grad = None


def _with_targets(
    training: Training, batches: Iterator[MicroBatch], epoch: int
) -> Iterator[tuple[Batch, Float[Tensor, "batch depth 2"] | None, Targets]]:
    """A step's micro-batches; those whose pseudo labels are balanced together pass the teachers together."""
    config, accumulate = training.config, training.config.optimizer.accumulate
    together = accumulate if config.optimizer.sinkhorn_over == "step" else 1
    for _ in range(accumulate // together):
        ahead = [next(batches) for _ in range(together)]
        with training.autocast:
            outputs = [training.teacher_forward(training.teachers, batch, config) for batch, _ in ahead]
            targets = assign_pseudo_labels(outputs, config, training.ranks.group, epoch)
            del outputs
        while ahead:
            # Nothing here holds what its taker has let go of.
            yield *ahead.pop(0), targets.pop(0)
