"""A method small enough to be computed token by token: settings, networks in float64, and hand-made batches."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpmae import PRESETS, Config
from fastpmae.model.teachers import Teachers
from fastpmae.model.vit import Student
from fastpmae.pretraining.networks import make_networks
from fastpmae_loaders import Batch
from tests import reference


def tiny_config(preset: str = "paper", **settings: Any) -> Config:
    """A preset at 16 patches of 4 pixels: 4 visible, 12 masked, in 3 folds unless told."""
    sizes: dict[str, Any] = {
        "image_size": 16,
        "patch_size": 4,
        "width": 16,
        "heads": 2,
        "depth": 2,
        "decoder_width": 8,
        "decoder_heads": 2,
        "decoder_depth": 1,
        "head_hidden": 12,
        "head_bottleneck": 6,
        "prototypes": 10,
    }
    return PRESETS[preset].using(**(sizes | settings))


def made_batch(seed: int = 0, size: int = 3, fold_sizes: tuple[int, ...] = (4, 4, 4)) -> Batch:
    """Random bytes, a random mask for each image."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(16, generator=generator) for _ in range(size)])
    masked = sum(fold_sizes)
    views = torch.randint(0, 256, (2, size, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Batch(
        views=(views[0], views[1]),
        visible=order[:, : 16 - masked].contiguous(),
        folds=order[:, 16 - masked :].contiguous(),
        fold_sizes=fold_sizes,
        label=torch.zeros(size, dtype=torch.int64),
        index=torch.arange(size),
        boxes=torch.zeros(size, 2, 4, dtype=torch.int32),
        flips=torch.zeros(size, 2, dtype=torch.bool),
        factors=torch.ones(size, 2, 5, dtype=torch.float64),
        choices=torch.zeros(size, 2, 9, dtype=torch.uint8),
        source_size=torch.zeros(size, 2, dtype=torch.int32),
        samples=np.arange(size),
        failed=[],
    )


def drop_path_scale_of(config: Config, size: int = 3, seed: int = 5) -> Tensor:
    """Stochastic depth by hand: some branches dropped, the others scaled up."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(size, config.network.depth, 2, generator=generator, dtype=torch.float64) > 0.3
    return kept / 0.7


@torch.no_grad()
def disturb(module: torch.nn.Module, seed: int, scale: float = 0.1) -> None:
    """Move every weight, so that no bias is 0 and no norm is 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@torch.no_grad()
def widen(module: torch.nn.Module) -> None:
    """To float64; positions, which are kept in fp32, are set anew."""
    module.double()
    for name, buffer in module.named_buffers():
        if name.endswith("pos_embed"):
            side = round((buffer.shape[1] - 1) ** 0.5)
            for patch in range(side * side):
                buffer[0, 1 + patch] = reference.position(patch // side, patch % side, buffer.shape[2])


def tiny_networks(config: Config, total_steps: int = 100) -> tuple[Student, Teachers]:
    """Student and teachers in float64, every one with weights of its own."""
    student, teachers = make_networks(config, total_steps, torch.device("cpu"), None)
    widen(student)
    disturb(student, 1)
    for number, teacher in enumerate(teachers.modules().values()):
        if config.teacher.teacher_init == "copy":
            widen(teacher)
        teacher.double()  # one that starts at random has positions of its own
        disturb(teacher, 2 + number)
    return student, teachers
