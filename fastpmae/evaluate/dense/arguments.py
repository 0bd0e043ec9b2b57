"""What `fastpmae-eval patches`, `segment` and `detect` are told on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastpmae.evaluate.backbone import Which
from fastpmae.evaluate.dense.recipe import DetectConfig, SegmentConfig


@dataclass(frozen=True)
class DenseCommon:
    """What every evaluation of dense tasks is told."""

    weights: Annotated[str, tyro.conf.Positional]
    """A run folder or checkpoint of ours, the folder of a fine-tuning or an export, a safetensors file, a .pth of MAE,
    SdAE, DINO, iBOT, MoCo v3, BEiT and many others, or timm:NAME for a model that timm fetches."""
    train: Path
    """Labelled images to train on. A folder with a training and a validation split holds both sets."""
    val: Path | None = None
    """Labelled images to test on; by default those of the validation split in --train."""
    classes: Path | None = None
    """JSON file that names the classes: number, colour or name to name; null ignores one."""
    network: Which = "auto"
    """Whose encoder, where the file holds several; auto takes our student, and of others what they evaluate."""
    out: Path | None = None
    """Folder for the result; by default `eval` in the run's folder, and NAME-eval beside a file."""
    heads: int = 0
    """Attention heads, where the weights do not tell and the width is unusual."""
    workers: int = 0
    """Threads that prepare images; 0 takes all cores that may be used."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


@dataclass(frozen=True)
class Segment:
    """Semantic segmentation by UPerNet, the whole network trained, with a preset whose settings are flags."""

    common: Annotated[DenseCommon, tyro.conf.arg(name="")]
    config: Annotated[SegmentConfig, tyro.conf.arg(name="")]
    preset: str = "paper"
    """Settings to start from: paper, mae (of its own figures), or small (a few hundred small images)."""
    ignore: tuple[int, ...] = ()
    """Numbers in the masks that are no class."""
    yardsticks: bool = True
    """Print what can be reached without a network too: patches told apart by colour and place, and how often each
    class stands where."""
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


@dataclass(frozen=True)
class Detect:
    """Object detection by Faster or Mask R-CNN, the whole network trained, with a preset whose settings are flags."""

    common: Annotated[DenseCommon, tyro.conf.arg(name="")]
    config: Annotated[DetectConfig, tyro.conf.arg(name="")]
    preset: str = "paper"
    """Settings to start from: paper (CAE's), vitdet (without its windowed attention), or small (a few hundred small
    images)."""
    masks: Literal["auto", "on", "off"] = "auto"
    """Learn the outlines of objects too (Mask R-CNN); auto does where the training set has them."""
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


@dataclass(frozen=True)
class Patches:
    """Masks by frozen features of patches: k-NN in context (Hummingbird), and a linear layer (BatchNorm and 1 x 1)."""

    common: Annotated[DenseCommon, tyro.conf.arg(name="")]
    ignore: tuple[int, ...] = ()
    """Numbers in the masks that do not count."""
    k: int = 30
    """Neighbours that each patch takes its label from."""
    temperature: float = 0.02
    """Temperature of the neighbours' weights."""
    memory: int = 1_000_000
    """Patches of training images to look among; of more than that, as many of each image are drawn."""
    short_side: int = 512
    """Images whose shorter side has more pixels are scaled down to it; 0 keeps every size."""
    linear: bool = True
    """Train the linear layer too."""
    steps: int = 1000
    """Optimizer steps of the linear layer."""
    step_images: int = 16
    """Images in one of them."""
    lr: float = 1e-3
    """Its learning rate, which falls to 0 on a cosine."""
    weight_decay: float = 1e-4
    """Its weight decay (AdamW)."""
    yardsticks: bool = True
    """Print what can be reached without pretraining too: random weights, patches told apart by colour and place, and
    how often each class stands where."""
    keep_gb: float = 4.0
    """Memory for features, which are kept between the two probes and between the steps; more images are computed
    again."""
    seed: int = 0
    """Seed of the random weights, the linear layer, and what is drawn."""
