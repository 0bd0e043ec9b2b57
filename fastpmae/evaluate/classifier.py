"""A classifier's networks and optimizer, a whole ViT or MAE's linear probe of a frozen one, and its file at the end."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Lars, param_groups_layer_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn

from fastpmae.evaluate.augment import START, drawn_from
from fastpmae.evaluate.backbone import features
from fastpmae.evaluate.finetune_state import Setting
from fastpmae.evaluate.recipe import FinetuneConfig
from fastpmae.evaluate.vit_arguments import timm_arguments_of
from fastpmae.weights.tensor_file import save_tensors
from fastpmae_loaders.files import atomic_write


class Probe(nn.Module):
    """MAE's linear probe: features scaled by a BatchNorm without parameters, and a linear layer.

    Attributes:
        group: the ranks over whose images the BatchNorm takes its means. The features have no gradient, so neither
            have those.
    """

    group: dist.ProcessGroup | None = None

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, rows: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        over_ranks = self.training and self.group is not None
        return self.head(self._normalised_over_ranks(rows) if over_ranks else self.norm(rows))

    @torch.no_grad()
    def _normalised_over_ranks(self, rows: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """As `norm` does with the rows of all ranks, which are as many on each. (torch's SyncBatchNorm needs a GPU.)"""
        assert self.group is not None
        norm, count = self.norm, len(rows) * self.group.size()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        assert norm.momentum is not None
        mean = rows.float().sum(dim=0)
        dist.all_reduce(mean, group=self.group)
        mean /= count
        squares = (rows.float() - mean).square().sum(dim=0)
        dist.all_reduce(squares, group=self.group)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(squares / max(1, count - 1), norm.momentum)
        norm.num_batches_tracked += 1
        return (rows.float() - mean) / (squares / count + norm.eps).sqrt()


def make_classifier(
    setting: Setting, config: FinetuneConfig
) -> tuple[nn.Module, Callable[[Float[Tensor, "batch 3 side side"]], Tensor]]:
    """What is trained, and what it is given of normalised images: the images themselves, or frozen features."""
    classes = len(setting.train.names)
    with drawn_from(START, config.seed):
        if not setting.frozen:
            model = setting.backbone.build(classes, config.pool, config.drop_path)
            return model.to(setting.device), lambda images: images
        frozen: Any = setting.backbone.build().to(setting.device).eval()
        probe = Probe(frozen.num_features, classes)

    def encode(images: Float[Tensor, "batch 3 side side"]) -> Tensor:
        with torch.no_grad():
            return features(frozen, images, (config.pool,))[0].float()

    return probe.to(setting.device), encode


def make_optimizer(model: nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    """The optimizer of `config`, with timm's groups for layer-wise decay of the rate."""
    by_layer = config.opt == "adamw" or (config.opt == "sgd" and config.layer_decay < 1)
    if by_layer and not isinstance(model, Probe):
        vit: Any = model
        groups = param_groups_layer_decay(
            model, config.weight_decay, vit.no_weight_decay(), layer_decay=config.layer_decay
        )
        if config.opt == "sgd":
            return torch.optim.SGD(groups, lr=config.peak_lr, momentum=0.9)
        return torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas)
    # As MAE's LARS: biases and norms take the plain rate, without decay.
    wide = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay}
    thin = {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}
    if config.opt == "adamw":
        return torch.optim.AdamW([wide, thin], lr=config.peak_lr, betas=config.betas)
    if config.opt == "sgd":
        return torch.optim.SGD([wide, thin], lr=config.peak_lr, momentum=0.9)
    momentum: Any = 0.9  # timm says int
    return Lars([wide | {"always_adapt": True}, thin | {"always_adapt": False}], lr=config.peak_lr, momentum=momentum)


def make_schedule(optimizer: torch.optim.Optimizer, config: FinetuneConfig, steps_per_epoch: int) -> CosineLRScheduler:
    """timm's schedule by the step: linear from 0 over the warm-up, then a cosine to the lowest rate."""
    total, warmup = config.epochs * steps_per_epoch, round(config.warmup_epochs * steps_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, total - warmup),
        lr_min=config.min_lr,
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def write_classifier(setting: Setting, model: nn.Module, config: FinetuneConfig) -> None:
    """The trained weights, under timm's names where it is a whole network, and in the header what they need besides."""
    backbone = setting.backbone
    header = {
        "format": "pt",
        **({"timm": json.dumps(timm_arguments_of(model))} if isinstance(model, VisionTransformer) else {}),
        "classes": json.dumps(setting.train.names),
        "finetune": json.dumps(dataclasses.asdict(config)),
        "backbone": backbone.source,
        "mean": json.dumps(backbone.mean),
        "std": json.dumps(backbone.std),
        "crop_ratio": json.dumps(setting.crop_ratio),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(setting.folder / "classifier.safetensors") as beside:
        save_tensors(tensors, beside, header)
