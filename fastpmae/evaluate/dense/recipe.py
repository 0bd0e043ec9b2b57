"""How segmentation and detection are trained: every setting, and the presets that papers have published figures of."""

import dataclasses
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.values import Typed

UNRECORDED = ("activation_checkpointing", "eval_every", "log_every", "save_every")
"""Settings that change no number of a training."""


@dataclass(frozen=True)
class DenseConfig(Typed):
    """What segmentation and detection are both told."""

    batch_size: int = 16
    """Images in one optimizer step."""
    accumulate: int = 1
    """Gradient accumulation: micro-batches of each step."""
    lr: float = 4e-4
    """Peak learning rate."""
    weight_decay: float = 0.05
    """AdamW's weight decay; not applied to biases, norms, positions and the class token."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's beta coefficients."""
    layer_decay: float = 0.65
    """Layer-wise learning rate decay: the factor from each block to the one below it."""
    drop_path: float = 0.1
    """Rate of stochastic depth in the last block; it grows linearly from 0 in the first."""
    warmup_iterations: int = 1500
    """Optimizer steps of linear learning-rate warm-up from 0."""
    clip_grad: float = 0.0
    """Clip the gradient to this norm; 0 does not clip."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the ViT's blocks for the backward pass, and compute the rest again there."""
    eval_every: int = 0
    """Optimizer steps between two tests on the validation set; 0 tests after the last alone."""
    log_every: int = 50
    """Optimizer steps between two rows of metrics."""
    save_every: float = 10.0
    """Minutes between two checkpoints; 0 saves after every step. The last step and a signal always save."""
    seed: int = 0
    """Seed of crops, colours, dropout, stochastic depth and the order of images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else [value]
            finite = not any(isinstance(number, float) and not math.isfinite(number) for number in numbers)
            self._require(finite, name, "finite")
        for name in ("batch_size", "accumulate", "log_every"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(self.batch_size % self.accumulate == 0, "accumulate", f"a divisor of {self.batch_size}")
        self._require(self.lr > 0, "lr", "above 0")
        self._require(0 < self.layer_decay <= 1, "layer_decay", "in (0, 1]")
        self._require(0 <= self.drop_path < 1, "drop_path", "in [0, 1)")
        self._require(all(0 <= beta < 1 for beta in self.betas), "betas", "in [0, 1)")
        for name in ("weight_decay", "warmup_iterations", "clip_grad", "eval_every", "save_every"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        self._require(0 <= self.seed < 2**63, "seed", "between 0 and 2**63 - 1")

    @property
    def micro_batch(self) -> int:
        """Images that are computed at a time."""
        return self.batch_size // self.accumulate

    def differences(self, record: dict[str, Any]) -> list[str]:
        """What the record of another says otherwise, a phrase each, without the settings that change no number."""
        changed = []
        for name, now in dataclasses.asdict(self).items():
            before = record.get(name)
            if name not in UNRECORDED and before != (list(now) if isinstance(now, tuple) else now):
                changed.append(f"--{name.replace('_', '-')} was {before} and is now {_shown(now)}")
        return changed

    def _require(self, holds: bool, name: str, must: str) -> None:
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} {_shown(getattr(self, name))} must be {must}")


@dataclass(frozen=True)
class SegmentConfig(DenseConfig):
    """Every setting of a segmentation's training: by default the paper's on ADE20K."""

    iterations: int = 160_000
    """Optimizer steps of the whole training."""
    crop_size: int = 512
    """Side of a training crop, and of a window of the test, in pixels: a multiple of the network's patches."""
    short_side: int = 512
    """The shorter side that images are resized to before scaling, and for the test; 0 keeps each image's own size."""
    long_side: int = 2048
    """The longer side that this resizing does not go beyond; 0 for no limit."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Random scaling of a training image, smallest and largest factor."""
    cat_max_ratio: float = 0.75
    """A crop is drawn again (up to ten times) while one class covers more than this share of its labelled pixels."""
    photometric: bool = True
    """Change brightness, contrast, saturation and hue at random, as SSD does."""
    channels: int = 0
    """Channels of UPerNet's decoder; 0 takes the network's width."""
    dropout: float = 0.1
    """Dropout of channels before the classifier of pixels."""
    auxiliary_weight: float = 0.4
    """Weight of the auxiliary head's loss."""
    relative_positions: bool = False
    """Add relative position biases (from 0) and LayerScale (from 1), as MAE's and BEiT's published figures have."""
    stride: float = 2 / 3
    """From one window of the test to the next, as a share of --crop-size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.iterations >= 1, "iterations", "at least 1")
        self._require(
            self.warmup_iterations <= self.iterations, "warmup_iterations", f"at most --iterations {self.iterations}"
        )
        self._require(1 <= self.crop_size <= 4096, "crop_size", "between 1 and 4096")
        for name in ("short_side", "long_side"):
            self._require(0 <= getattr(self, name) <= 16384, name, "between 0 and 16384")
        self._require(self.channels >= 0, "channels", "at least 0")
        self._require(0 < self.scale[0] <= self.scale[1] <= 16, "scale", "two factors, 0 < smallest <= largest <= 16")
        self._require(0 < self.cat_max_ratio <= 1, "cat_max_ratio", "in (0, 1]")
        # of a smaller one the windows of a test are too many to count
        self._require(0.05 <= self.stride <= 1, "stride", "between 0.05 and 1")
        self._require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        self._require(self.auxiliary_weight >= 0, "auxiliary_weight", "at least 0")

    def check_images(self) -> None:
        """Raise UserError where one image alone is computed at a time, on all ranks together."""
        if self.micro_batch < 2:
            raise UserError(
                f"--batch-size {self.batch_size} with --accumulate {self.accumulate} computes one image at a time, and "
                "UPerNet normalises the mean of each image over the images: 2 at least"
            )

    def rate(self, step: int) -> float:
        """The learning rate's share of its peak at a step: linear from 0 over the warm-up, times linear to 0."""
        return _warm(step, self.warmup_iterations) * (1 - step / self.iterations)


@dataclass(frozen=True)
class DetectConfig(DenseConfig):
    """Every setting of a detection's training."""

    epochs: float = 12.0
    """Passes over the images."""
    milestones: tuple[float, ...] = (9.0, 11.0)
    """Epochs after which the learning rate falls to a tenth."""
    short_sides: tuple[int, int] = (480, 800)
    """The shorter side that a training image is resized to: drawn between these two, in steps of 32 pixels."""
    long_side: int = 1333
    """The longer side that this resizing does not go beyond."""
    test_short_side: int = 800
    """The shorter side in the test."""
    scale: tuple[float, float] = (1.0, 1.0)
    """With --crop-size: the image is scaled so that it just fits into the crop, times a factor drawn between these."""
    crop_size: int = 0
    """Side of a square training crop of the jittered image, padded where the image is smaller; 0 resizes by
    --short-sides instead, and crops nothing."""
    pyramid: Literal["taps", "simple"] = "taps"
    """Maps of four blocks (CAE, BEiT), or of the last block alone (ViTDet's simple pyramid)."""
    channels: int = 256
    """Channels of the pyramid's maps and of the heads."""
    box_loss: Literal["giou", "smooth_l1"] = "giou"
    """Loss of a box: GIoU of decoded boxes, or smooth L1 of their encoding."""
    box_loss_weight: float = 10.0
    """Weight of that loss."""
    box_head: Literal["conv", "fc"] = "conv"
    """Behind the boxes' features: four convolutions with BatchNorm and one layer, or two layers."""
    proposals: int = 1000
    """Region proposals that are kept of an image."""
    boxes_per_image: int = 512
    """Proposals of an image that a step learns from; at most a quarter of them are objects."""
    score_threshold: float = 0.05
    """Detections of a lower score are dropped."""
    nms_threshold: float = 0.5
    """Of boxes of one class that overlap by more than this IoU the best is kept."""
    detections: int = 100
    """The most detections of an image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.epochs > 0, "epochs", "above 0")
        self._require(all(each > 0 for each in self.milestones), "milestones", "above 0")
        low, high = self.short_sides
        self._require(1 <= low <= high <= 8192, "short_sides", "two sides, 1 <= smallest <= largest <= 8192")
        for name in ("long_side", "test_short_side"):
            self._require(1 <= getattr(self, name) <= 16384, name, "between 1 and 16384")
        self._require(0 <= self.crop_size <= 4096, "crop_size", "between 0 and 4096")
        self._require(0 < self.scale[0] <= self.scale[1] <= 16, "scale", "two factors, 0 < smallest <= largest <= 16")
        self._require(self.box_loss_weight > 0, "box_loss_weight", "above 0")
        for name in ("score_threshold", "nms_threshold"):
            self._require(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        for name in ("channels", "proposals", "boxes_per_image", "detections"):
            self._require(getattr(self, name) >= 1, name, "at least 1")

    def iterations_for(self, images: int) -> int:
        """Optimizer steps of the whole training."""
        return max(1, round(self.epochs * images / self.batch_size))

    def remarks(self, images: int) -> list[str]:
        """What a user should know of a learning rate that does not go as the settings say, with so many images."""
        steps, late = self.iterations_for(images), [each for each in self.milestones if each >= self.epochs]
        remarks = []
        if self.warmup_iterations >= steps:
            remarks.append(
                f"warning: --warmup-iterations {self.warmup_iterations:,} last longer than the {steps:,} steps of the "
                "training: the learning rate does not reach --lr"
            )
        if late:
            remarks.append(
                f"warning: --milestones {_shown(tuple(late))} lie past --epochs {self.epochs:g}: the learning rate "
                "does not fall there"
            )
        return remarks

    def rate(self, step: int, images: int) -> float:
        """The learning rate's share of its peak at a step: a linear warm-up, and a tenth after each milestone."""
        epoch = step * self.batch_size / images
        return _warm(step, self.warmup_iterations) * 0.1 ** sum(epoch >= milestone for milestone in self.milestones)


def _warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / (warmup + 1))


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


SEGMENT_PRESETS: dict[str, SegmentConfig] = {
    "paper": SegmentConfig(eval_every=16_000),
    "mae": SegmentConfig(lr=1e-4, relative_positions=True, eval_every=16_000),
    "small": SegmentConfig(
        iterations=2000,
        batch_size=8,
        lr=5e-4,
        layer_decay=0.8,
        warmup_iterations=150,
        crop_size=160,
        short_side=0,
        long_side=0,
        scale=(0.75, 1.75),
        channels=96,
        eval_every=500,
    ),
}
"""Named settings of segmentation: the paper's (its section 4.2; compare MAE 48.1, SdAE 48.6, Pseudo-MAE 49.1 mIoU on
ADE20K with ViT-B), those that MAE's own figures have, and some for a few hundred small images on a CPU."""

DETECT_PRESETS: dict[str, DetectConfig] = {
    "paper": DetectConfig(batch_size=32, lr=3e-4, layer_decay=0.75, drop_path=0.2, warmup_iterations=500),
    "vitdet": DetectConfig(
        batch_size=64,
        lr=1e-4,
        weight_decay=0.1,
        layer_decay=0.7,
        drop_path=0.1,
        warmup_iterations=250,
        epochs=100.0,
        milestones=(88.9, 96.3),
        long_side=1024,
        test_short_side=1024,
        scale=(0.1, 2.0),
        crop_size=1024,
        pyramid="simple",
        box_loss="smooth_l1",
        box_loss_weight=1.0,
    ),
    "small": DetectConfig(
        batch_size=4,
        lr=3e-4,
        layer_decay=0.8,
        drop_path=0.1,
        warmup_iterations=100,
        epochs=14.0,
        milestones=(10.0, 13.0),
        short_sides=(192, 320),
        long_side=448,
        test_short_side=256,
        channels=96,
        box_head="fc",
        proposals=300,
        boxes_per_image=128,
        eval_every=500,
    ),
}
"""Named settings of detection: the paper's on COCO, which are CAE's, ViTDet's, and some for a few hundred small images
on a CPU."""


def segment_preset(name: str) -> SegmentConfig:
    """A preset of segmentation by its name. Raises UserError with the names there are."""
    return _named(SEGMENT_PRESETS, name)


def detect_preset(name: str) -> DetectConfig:
    """A preset of detection by its name. Raises UserError with the names there are."""
    return _named(DETECT_PRESETS, name)


def _named(presets: dict[str, Any], name: str) -> Any:
    if name not in presets:
        raise UserError(f"--preset {name}: there is no such preset; choose one of {', '.join(presets)}")
    return replace(presets[name])
