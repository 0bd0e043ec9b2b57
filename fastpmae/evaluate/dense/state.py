"""A dense training as a checkpoint keeps it, and what a resumed one has to agree with."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastpmae.distributed.ranks import Ranks
from fastpmae.evaluate.dense.labelled import same_images
from fastpmae.evaluate.dense.recipe import DenseConfig
from fastpmae.evaluate.finetune_state import (
    STATES,
    are_numbers,
    found_checkpoint,
    other_network,
    restore_optimizer,
)
from fastpmae.run.checkpoint import CheckpointError, require
from fastpmae_loaders.errors import UserError


def take_up_dense(
    folder: Path,
    kind: str,
    config: DenseConfig,
    resume: bool,
    record: dict[str, Any],
    iterations: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
) -> tuple[int, Float[Tensor, " 2"], list[str]]:
    """Take the folder's newest sound checkpoint up.

    Args:
        kind: "segment" or "detect".
        record: what decides the numbers of this training.
        iterations: its optimizer steps.

    Returns:
        The steps that are done, the sum and number of losses since the last row, and a sentence for each damaged
        checkpoint that was passed over.

    Raises:
        UserError: where the folder holds another training, or this one and `resume` is not given.
    """
    checkpoint, complaints = found_checkpoint(
        folder, resume, {"step", "epoch", "lr", "loss"}, f"{kind} training's", ranks
    )
    if checkpoint is None:
        return 0, torch.zeros(2, dtype=torch.float64), []
    before, progress = checkpoint.progress["config"], checkpoint.progress
    if kind not in before:
        raise UserError(f"{folder} holds another kind of training: choose another --out")
    losses = progress.get("loss")
    parts = [before.get(part) for part in (kind, "backbone", "set")]
    if not (all(isinstance(part, dict) for part in parts) and are_numbers(losses)):
        raise CheckpointError(f"{checkpoint.path} is damaged: its progress is none of such a training")
    changed = config.differences(parts[0]) + other_network(parts[1], record["backbone"])
    if not same_images(progress, record["train"]) or parts[2] != record["set"]:
        changed.append("the training images, their labels or the classes are others")
    if changed:
        raise UserError(f"the training in {folder} was started with other settings: {'; '.join(changed)}")
    if progress["step"] > iterations:
        raise CheckpointError(f"{checkpoint.path} stands after a step that this training does not have")
    require(checkpoint, "model", model.state_dict())
    model.load_state_dict(checkpoint.part("model"))
    restore_optimizer(checkpoint, model, optimizer, STATES["adamw"])
    return progress["step"], torch.tensor(losses, dtype=torch.float64), complaints
