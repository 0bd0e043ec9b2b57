"""What `fastpmae-eval patches`, `segment`, `detect` and `predict` are told on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastpmae.evaluate.arguments import UNTOUCHED, Common, Training
from fastpmae.evaluate.dense.recipe import DetectConfig, SegmentConfig


@dataclass(frozen=True)
class DenseCommon(Common):
    """What every evaluation of dense tasks is told."""

    train: Path
    """Labelled images of this machine to train on. A folder with a training and a validation split holds both sets."""
    val: Path | None = None
    """Labelled images to test on; by default those of the validation split in --train."""
    classes: Path | None = None
    """JSON file that names the classes: number, colour or name to name; null ignores one."""


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
    training: Annotated[Training, tyro.conf.arg(name="")] = UNTOUCHED


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
    training: Annotated[Training, tyro.conf.arg(name="")] = UNTOUCHED


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


@dataclass(frozen=True)
class Predict:
    """What a trained segmenter or detector makes of images of yours: classes of pixels or boxes, and pictures."""

    weights: Annotated[Path, tyro.conf.Positional]
    """The folder that segment or detect left, the network's file in it, or what `fastpmae-export --format plain` made
    of it."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, and folders of them."""
    out: Path
    """Folder for the results: NAME-overlay.png of each image, with NAME-labels.png or NAME-objects.json."""
    force: bool = False
    """Replace results that are there."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
