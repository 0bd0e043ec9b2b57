"""What every evaluation is told on the command line, and what every training of one is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastpmae.evaluate.backbone import Which


@dataclass(frozen=True)
class Common:
    """What every evaluation is told."""

    weights: Annotated[str, tyro.conf.Positional]
    """A run folder or checkpoint of ours, the folder of a fine-tuning or an export, a safetensors file, a .pth of MAE,
    SdAE, DINO, iBOT, MoCo v3, BEiT and many others, each also at an address in a store, or timm:NAME for a model that
    timm fetches."""
    train: Path | str
    """Labelled images to train on."""
    val: Path | str | None = None
    """Labelled images to test on."""
    network: Which = "auto"
    """Whose encoder, where the file holds several; auto takes our student, and of others what they evaluate."""
    out: Path | None = None
    """Folder for the result, here or in a store; by default `eval` in the run's folder, and NAME-eval beside a file."""
    heads: int = 0
    """Attention heads, where the weights do not tell and the width is unusual."""
    workers: int = 0
    """Threads that prepare images; 0 takes all cores that may be used."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


@dataclass(frozen=True)
class Training:
    """How a training is started, and what it writes besides its rows and checkpoints."""

    resume: bool = False
    """Resume the training in --out."""
    steps: int | None = None
    """Stop after so many optimizer steps in all; changes no schedule."""
    deterministic: bool = False
    """Compute the same bits each time on a GPU too, somewhat slower."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: bool = False
    """Log to Weights & Biases too, where it is installed."""


UNTOUCHED = Training()
"""A training from its beginning to its end."""
