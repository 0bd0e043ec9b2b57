"""AdamW with the paper's schedule, and updates that a non-finite gradient cannot reach."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastpmae.config import Config
from fastpmae.distributed.dtensor import to_full
from fastpmae.distributed.ranks import Ranks
from fastpmae.model.build import warmup_epochs


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """The rate of step `step` (from 0): linear warm-up, then a half cosine to 0, moving with every step as MAE's."""
    optimizer, peak = config.optimizer, config.optimizer.peak_lr
    epoch, warmup = step / steps_per_epoch, warmup_epochs(config)
    if epoch < warmup:
        return peak * epoch / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (optimizer.epochs - warmup)))


def make_optimizer(student: nn.Module, config: Config) -> torch.optim.AdamW:
    """Fused AdamW over the student; biases and norms are not decayed, nor are tokens unless the settings say so.

    MAE's and SdAE's code leaves the choice to timm 0.3.2, whose rule spares what has one axis; a token has three there.
    """
    decayed, spared = [], []
    for name, parameter in student.named_parameters():
        token = name.endswith(("cls_token", "mask_token")) and not config.optimizer.decay_tokens
        (spared if parameter.ndim <= 1 or token else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.optimizer.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.optimizer.betas, fused=True)


def update(
    optimizer: torch.optim.AdamW, loss: Float[Tensor, ""], lr: float, clip_grad: float, ranks: Ranks
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """One AdamW step, skipped on the device itself when the loss or a gradient is not finite.

    Args:
        loss: the step's loss, to be checked.
        lr: this step's learning rate.
        clip_grad: largest norm of the gradient, or 0.
        ranks: whose ranks skip together.

    Returns:
        The norm of the gradient before clipping, and 1 where the step was skipped, else 0. Both stay on the device.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = to_full(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    skipped = ranks.max_on_device((~(torch.isfinite(norm) & torch.isfinite(loss))).float())
    if clip_grad > 0:
        nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    # The fused kernels read this flag on the device, as a gradient scaler would set it.
    optimizer.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped
