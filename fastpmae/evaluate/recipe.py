"""How a classifier is trained on augmented images: fine-tuning's settings, MAE's linear probe, and their presets."""

import dataclasses
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastpmae.settings.rates import check_one_rate, peak_rate, rate_changes, with_one_rate
from fastpmae_loaders import View
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.values import Typed


@dataclass(frozen=True)
class FinetuneConfig(Typed):
    """Every setting of a classifier's training."""

    epochs: int = 100
    """Passes over the images."""
    batch_size: int = 1024
    """Images in one optimizer step."""
    accumulate: int = 1
    """Gradient accumulation: micro-batches of each step."""
    opt: Literal["adamw", "lars", "sgd"] = "adamw"
    """Optimizer: adamw for fine-tuning, lars for the linear probe of MAE, or sgd."""
    blr: float | None = 5e-4
    """Base learning rate: the peak for a batch of 256 images, which grows in proportion with the batch size."""
    lr: float | None = None
    """Peak learning rate itself, whatever the batch size; given instead of --blr."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine schedule."""
    warmup_epochs: float = 5.0
    """Epochs of linear learning-rate warm-up from 0."""
    weight_decay: float = 0.05
    """Weight decay; not applied to biases, norms and tokens."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's beta coefficients."""
    layer_decay: float = 0.65
    """Layer-wise learning rate decay: the factor from each block to the one below it."""
    drop_path: float = 0.1
    """Rate of stochastic depth in the last block; it grows linearly from 0 in the first."""
    pool: Literal["class", "mean"] = "mean"
    """What the classifier reads: the class token, or the mean of the patch tokens."""
    clip_grad: float = 0.0
    """Clip the gradient to this norm; 0 does not clip."""
    model_ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, which is evaluated instead of them; 0 keeps none. The
    decay is lower at first, so that the average of a short training contains little of its start."""
    smoothing: float = 0.1
    """Label smoothing of the cross-entropy."""
    mixup: float = 0.8
    """Mixup alpha; 0 disables mixup."""
    cutmix: float = 1.0
    """CutMix alpha; 0 disables CutMix."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix instead of mixup for a batch, where both are enabled."""
    aa: str = "rand-m9-mstd0.5-inc1"
    """RandAugment policy in timm's notation; an empty string disables it."""
    reprob: float = 0.25
    """Probability of random erasing for an image; 0 disables it."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop: smallest and largest share of the image."""
    color_jitter: float = 0.0
    """Strength of the random change of brightness, contrast and saturation."""
    eval_every: int = 1
    """Epochs between two tests on the validation set; the last epoch is always tested."""
    save_every: float = 10.0
    """Minutes between two checkpoints; 0 saves after every step. The last step and a signal always save."""
    seed: int = 0
    """Seed of crops, mixing, erasing, stochastic depth and the order of images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else [value]
            finite = not any(isinstance(number, float) and not math.isfinite(number) for number in numbers)
            _require(finite, name, self, "finite")
        for name in ("epochs", "batch_size", "accumulate", "eval_every"):
            _require(getattr(self, name) >= 1, name, self, "at least 1")
        _require(self.batch_size % self.accumulate == 0, "accumulate", self, f"a divisor of {self.batch_size}")
        check_one_rate(self.blr, self.lr)
        for name in ("lr" if self.blr is None else "blr", "layer_decay"):
            _require(getattr(self, name) > 0, name, self, "above 0")
        _require(self.layer_decay <= 1, "layer_decay", self, "at most 1")
        for name in ("min_lr", "weight_decay", "clip_grad", "mixup", "cutmix", "save_every"):
            _require(getattr(self, name) >= 0, name, self, "at least 0")
        for name in ("drop_path", "model_ema_decay", "smoothing"):
            _require(0 <= getattr(self, name) < 1, name, self, "in [0, 1)")
        for name in ("mixup_switch_prob", "reprob", "color_jitter"):
            _require(0 <= getattr(self, name) <= 1, name, self, "in [0, 1]")
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", self, "in [0, 1)")
        _require(0 < self.scale[0] <= self.scale[1] <= 1, "scale", self, "two shares, 0 < smallest <= largest <= 1")
        _require(0 <= self.seed < 2**63, "seed", self, "between 0 and 2**63 - 1")
        _require(0 <= self.warmup_epochs <= self.epochs, "warmup_epochs", self, f"in [0, {self.epochs}]")
        # timm mixes an image with its mirror place in the batch.
        _require(
            not (self.mixes and self.micro_batch % 2), "batch_size", self, "even in each part, for mixup and cutmix"
        )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others of their batch."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def micro_batch(self) -> int:
        """Images that are computed at a time."""
        return self.batch_size // self.accumulate

    @property
    def peak_lr(self) -> float:
        """The learning rate that the warm-up ends in."""
        return peak_rate(self.blr, self.lr, self.batch_size)

    def using(self, **settings: Any) -> "FinetuneConfig":
        """A copy with these settings changed; `lr` takes the place of `blr`, and `blr` of `lr`.

        Raises:
            UserError: for values that do not fit, and `blr` and `lr` together.
        """
        return replace(self, **with_one_rate(settings))

    def fitted(self, images: int, ranks: int = 1) -> "FinetuneConfig":
        """The same with no more images in a step than there are; the peak rate falls with them where `blr` sets it."""
        unit = self.accumulate * ranks * (2 if self.mixes else 1)
        most = images // unit * unit
        return replace(self, batch_size=most) if 0 < most < self.batch_size else self

    def view(self, image_size: int) -> View:
        """The loader's view of a training image."""
        return View(
            image_size,
            self.scale,
            jitter=(self.color_jitter, self.color_jitter, self.color_jitter, 0.0),
            jitter_probability=1.0 if self.color_jitter else 0.0,
        )

    def unused(self, frozen: bool) -> set[str]:
        """The settings that change nothing: with this optimizer, and where the network is frozen (a probe)."""
        without_layers = frozen or self.opt == "lars"
        return {
            *(["betas"] if self.opt != "adamw" else []),
            *(["layer_decay"] if without_layers else []),
            *(["drop_path"] if frozen else []),
        }

    def check_used(self, start: "FinetuneConfig", frozen: bool) -> None:
        """Raise UserError for a setting that differs from those to start from, and changes nothing."""
        for name in sorted(self.unused(frozen)):
            if getattr(self, name) != getattr(start, name):
                why = "of a frozen network" if frozen and name != "betas" else f"with --opt {self.opt}"
                raise UserError(f"--{name.replace('_', '-')} changes nothing {why}: leave it out")

    def differences(self, record: dict[str, Any], frozen: bool = False) -> list[str]:
        """What the record of another says otherwise, a phrase each, without the settings that change no number."""
        own = dataclasses.asdict(self)
        changed = rate_changes(record, own)
        passed_over = {"eval_every", "save_every", "blr", "lr", *self.unused(frozen)}
        for name, now in own.items():
            before, compared = record.get(name), name not in passed_over
            if compared and before != (list(now) if isinstance(now, tuple) else now):
                changed.append(f"--{name.replace('_', '-')} was {before} and is now {now}")
        return changed


def _require(holds: bool, name: str, config: FinetuneConfig, must: str) -> None:
    if not holds:
        value = getattr(config, name)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        raise UserError(f"--{name.replace('_', '-')} {shown} must be {must}")


BASE = FinetuneConfig(batch_size=2048, warmup_epochs=10.0)
SMALL = FinetuneConfig(
    batch_size=512,
    blr=2.5e-4,
    layer_decay=1.0,
    drop_path=0.1,
    pool="class",
    aa="",
    color_jitter=0.3,
    reprob=0.0,
    mixup=0.0,
    cutmix=0.0,
)

FINETUNE_PRESETS: dict[str, FinetuneConfig] = {
    # Section 4.1: ViT-B on ImageNet. What it does not say is MAE's.
    "paper": FinetuneConfig(),
    # Appendix A says otherwise for the same network, and gives ViT-L.
    "paper-a": BASE,
    "paper-a-large": replace(BASE, epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.2, warmup_epochs=5.0),
    # Appendix A for small data sets: its rate of 5e-4 is for the 512 images, as DeiT counts. Section 4.1 trains them
    # ten times as long.
    "small": SMALL,
    "small-1000": replace(SMALL, epochs=1000),
    # The same with what DeiT mixes in, but for its repeated augmentation, which would want another order of the images.
    "deit": replace(
        SMALL, color_jitter=0.0, aa="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, reprob=0.25, model_ema_decay=0.99996
    ),
}
"""Named settings of fine-tuning. The paper's section 4.1 and its appendix A differ."""

PROBE = FinetuneConfig(
    epochs=90,
    batch_size=16384,
    opt="lars",
    blr=0.1,
    min_lr=0.0,
    warmup_epochs=10.0,
    weight_decay=0.0,
    layer_decay=1.0,
    drop_path=0.0,
    pool="class",
    smoothing=0.0,
    mixup=0.0,
    cutmix=0.0,
    aa="",
    reprob=0.0,
)
"""MAE's linear probe (its appendix A.1): BatchNorm without parameters, LARS, crops and flips alone."""


def finetune_preset(name: str) -> FinetuneConfig:
    """A preset by its name. Raises UserError with the names there are."""
    if name not in FINETUNE_PRESETS:
        raise UserError(f"--preset {name}: there is no such preset; choose one of {', '.join(FINETUNE_PRESETS)}")
    return FINETUNE_PRESETS[name]
