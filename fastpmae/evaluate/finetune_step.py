"""One step of a classifier's training: crops, RandAugment, erasing and mixing, the loss, the update."""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from fastpmae.distributed.data_parallel import no_sync
from fastpmae.distributed.ranks import Ranks, mean_over_ranks, to_device
from fastpmae.evaluate.augment import STEP, DropPath, Mixing, RandAugment, drawn_from, erase_keys, set_drop_path
from fastpmae.evaluate.datasets import engine_for, half
from fastpmae.evaluate.finetune_state import Setting, collect_state
from fastpmae.evaluate.recipe import FinetuneConfig
from fastpmae_loaders import PairedViews
from fastpmae_loaders.errors import RunError

MicroBatch = tuple[UInt8[Tensor, "batch 3 side side"], Int[Tensor, " batch"], np.ndarray]
"""Images after crops and RandAugment, with the class and the number of each."""


@dataclass(frozen=True)
class ClassifierTraining:
    """What a step of a classifier's training works on.

    Attributes:
        parallel: the model as it is called, over all ranks.
        drop_path: its stochastic depth.
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
    parallel: nn.Module
    drop_path: Sequence[DropPath]
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
        """Since the last row, over all ranks. Raises RunError, on all of them, where it is not finite."""
        total, count = self._over_ranks().tolist()
        mean = total / count
        if not math.isfinite(mean):
            epoch = (step - 1) // self.steps_per_epoch + 1
            raise RunError(f"a loss of epoch {epoch} is not finite; a lower --blr (or --lr) usually helps")
        return mean

    def _over_ranks(self) -> Float[Tensor, " 2"]:
        """The sums, as the mean over all ranks: a training that is resumed on any number of them goes on with it."""
        return mean_over_ranks(self.sums, self.ranks.group)

    def state(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint holds (see `Session.save`). Raises RunError as `mean_loss`: the one before stays."""
        if self.sums[1] > 0:
            self.mean_loss(step)
        return collect_state(self.model, self.optimizer, self.ema), {
            "steps_per_epoch": self.steps_per_epoch,
            "bad_images": 0,
            "fingerprint": str(self.record["train"]["fingerprint"]),
            "config": self.record,
            "loss": self._over_ranks().tolist(),
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
        images, labels, samples = next(batches)
        # Gradients travel between the ranks with the last part alone.
        with contextlib.nullcontext() if part == config.accumulate - 1 else no_sync(training.parallel):
            with drawn_from(STEP, config.seed, step, part), half(training.setting.device):
                loss = classifier_loss(training, images, labels, samples, step // training.steps_per_epoch)
            (loss / config.accumulate).backward()
        training.sums.add_(torch.stack([loss.detach(), torch.ones_like(loss)]))
    if config.clip_grad:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
    training.optimizer.step()
    training.optimizer.zero_grad()
    if training.ema is not None:
        training.ema.update(model, step + 1)


def classifier_loss(
    training: ClassifierTraining,
    images: UInt8[Tensor, "batch 3 side side"],
    labels: Int[Tensor, " batch"],
    samples: np.ndarray,
    epoch: int,
) -> Float[Tensor, ""]:
    """The cross-entropy of a micro-batch with its smoothed and mixed targets.

    What is drawn for an image depends on the image, and what is drawn for a batch is drawn alike by all ranks.
    """
    setting, config = training.setting, training.config
    if config.mixes:
        # timm mixes an image with its mirror place: so neighbours mix, which are on one rank, however many there are.
        images, labels = (torch.cat([each[0::2], each[1::2].flip(0)]) for each in (images, labels))
        samples = np.concatenate([samples[0::2], samples[1::2][::-1]])
    keys = erase_keys(config.seed, epoch, samples) if config.reprob else None
    set_drop_path(training.drop_path, config.seed, epoch, samples, setting.device)
    # A frozen network sees a large batch piece by piece; images that are mixed have to stay together.
    piece = setting.feature_batch if setting.frozen and not config.mixes else len(images)
    pieces = []
    for first in range(0, len(images), piece):
        part = slice(first, first + piece)
        some = setting.backbone.normalised(images[part])
        changed, target = training.mixing(some, labels[part], None if keys is None else keys[part])
        pieces.append((training.encode(changed), target))
    given, targets = pieces[0] if len(pieces) == 1 else map(torch.cat, zip(*pieces, strict=True))
    return -(targets * training.parallel(given).float().log_softmax(dim=1)).sum(dim=1).mean()


def make_loader(setting: Setting, config: FinetuneConfig, ranks: Ranks) -> PairedViews:
    """Random crops of this rank's part of the training images, a micro-batch at a time."""
    samples = setting.train.samples
    return PairedViews(
        samples,
        config.micro_batch // ranks.size,
        engine=engine_for(samples, setting.engine),
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.size,
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
    return to_device(images, setting.device), to_device(labels, setting.device), samples
