"""One step of a classifier's training: crops, RandAugment, erasing and mixing, the loss, the update."""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from fastpmae.distributed.ranks import Ranks, to_device
from fastpmae.evaluate.augment import STEP, Mixing, RandAugment, drawn_from
from fastpmae.evaluate.datasets import engine_for, half
from fastpmae.evaluate.finetune_state import Setting, collect_state
from fastpmae.evaluate.recipe import FinetuneConfig
from fastpmae_loaders import PairedViews
from fastpmae_loaders.errors import RunError

MicroBatch = tuple[UInt8[Tensor, "batch 3 side side"], Int[Tensor, " batch"]]
"""Images after crops and RandAugment, with the class of each."""


@dataclass(frozen=True)
class ClassifierTraining:
    """What a step of a classifier's training works on.

    Attributes:
        encode: what the model is given of normalised images.
        ema: the average of the weights that is tested, where there is one.
        sums: of the losses since the last row, and how many they are.
        record: what decides the numbers, as a checkpoint keeps it.
    """

    setting: Setting
    config: FinetuneConfig
    ranks: Ranks
    loader: PairedViews
    augment: RandAugment
    model: nn.Module
    encode: Callable[[Float[Tensor, "batch 3 side side"]], Tensor]
    optimizer: torch.optim.Optimizer
    schedule: CosineLRScheduler
    ema: ModelEmaV3 | None
    mixing: Mixing
    sums: Float[Tensor, " 2"]
    record: dict[str, Any]

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader) // self.config.accumulate

    @property
    def tested(self) -> nn.Module:
        """The network that is tested and kept."""
        return self.model if self.ema is None else self.ema.module

    def lacks_row(self, step: int) -> bool:
        """Whether an epoch has ended whose row is not written."""
        return step % self.steps_per_epoch == 0 and bool(self.sums[1] > 0)

    def mean_loss(self, step: int) -> float:
        """Since the last row. Raises RunError where it is not finite."""
        mean = (self.sums[0] / self.sums[1]).item()
        if not math.isfinite(mean):
            epoch = (step - 1) // self.steps_per_epoch + 1
            raise RunError(f"a loss of epoch {epoch} is not finite; a lower --blr usually helps")
        return mean

    def state(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint holds (see `Session.save`). Raises RunError as `mean_loss`: the one before stays."""
        if self.sums[1] > 0:
            self.mean_loss(step)
        return collect_state(self.model, self.optimizer, self.ema), {
            "steps_per_epoch": self.steps_per_epoch,
            "bad_images": 0,
            "fingerprint": str(self.record["train"]["fingerprint"]),
            "config": self.record,
            "loss": self.sums.tolist(),
        }


def train_step(
    training: ClassifierTraining, batches: Iterator[MicroBatch], step: int, before_update: Callable[[], None]
) -> None:
    """Train on the next micro-batches, `accumulate` of them; `before_update` comes before any change in place."""
    config, model = training.config, training.model
    training.schedule.step_update(step)
    model.train()
    before_update()  # a BatchNorm moves its means in the forward pass
    for part in range(config.accumulate):
        images, labels = next(batches)
        with drawn_from(STEP, config.seed, step, part), half(training.setting.device):
            loss = classifier_loss(training, images, labels)
        (loss / config.accumulate).backward()
        training.sums.add_(torch.stack([loss.detach(), torch.ones_like(loss)]))
    if config.clip_grad:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
    training.optimizer.step()
    training.optimizer.zero_grad()
    if training.ema is not None:
        training.ema.update(model, step + 1)


def classifier_loss(
    training: ClassifierTraining, images: UInt8[Tensor, "batch 3 side side"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """The cross-entropy of a micro-batch with its smoothed and mixed targets."""
    setting, config = training.setting, training.config
    # A frozen network sees a large batch piece by piece; images that are mixed have to stay together.
    piece = setting.feature_batch if setting.frozen and not config.mixes else len(images)
    pieces = []
    for some, of_some in zip(images.split(piece), labels.split(piece), strict=True):
        changed, target = training.mixing(setting.backbone.normalised(some), of_some)
        pieces.append((training.encode(changed), target))
    given, targets = pieces[0] if len(pieces) == 1 else map(torch.cat, zip(*pieces, strict=True))
    return -(targets * training.model(given).float().log_softmax(dim=1)).sum(dim=1).mean()


def make_loader(setting: Setting, config: FinetuneConfig) -> PairedViews:
    """Random crops of the training images, a micro-batch at a time."""
    samples = setting.train.samples
    return PairedViews(
        samples,
        config.micro_batch,
        engine=engine_for(samples, setting.engine),
        seed=config.seed,
        workers=setting.workers,
        views=[config.view(setting.backbone.image_size)],
        drop_last=True,
        pin_memory=setting.device.type == "cuda",
    )


def batches_of_epoch(training: ClassifierTraining, step: int) -> Generator[MicroBatch, None, None]:
    """The micro-batches from a step to its epoch's end, on the device; RandAugment works on the next one meanwhile."""
    loader, setting = training.loader, training.setting
    epoch, place = divmod(step, training.steps_per_epoch)
    loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "batch": place * training.config.accumulate})
    ahead: deque[tuple[Any, np.ndarray]] = deque()
    for batch in loader:
        ahead.append((training.augment.submit(batch.simple.numpy(), epoch, batch.samples), batch.samples))
        if len(ahead) > 1:
            yield _handed_over(*ahead.popleft(), setting)
    while ahead:
        yield _handed_over(*ahead.popleft(), setting)


def _handed_over(begun: Any, samples: np.ndarray, setting: Setting) -> MicroBatch:
    images = torch.from_numpy(RandAugment.collect(begun))
    labels = setting.train.labels[torch.from_numpy(samples)]
    return to_device(images, setting.device), to_device(labels, setting.device)
