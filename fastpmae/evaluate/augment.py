"""What happens to a batch of training images after their crops: RandAugment, random erasing, mixup and CutMix.

timm supplies all four. Each draws from a generator of its own that is set from the step (or the image), so that a run
that is resumed in mid-epoch sees what it would have seen.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from fastpmae.distributed.ranks import to_device
from fastpmae.evaluate.recipe import FinetuneConfig
from fastpmae_loaders import uniforms
from fastpmae_loaders.errors import UserError

STEP, SAMPLE, START, ERASE = 0, 1, 2, 3
"""What is drawn for: the first part of a key."""
DROP_PATH = 1
"""Stochastic depth's own counters, beside those of views."""


@contextlib.contextmanager
def drawn_from(*key: int) -> Iterator[None]:
    """Within it Python, NumPy and torch draw from generators set by the key; then as before."""
    states = np.random.SeedSequence(key).generate_state(3)
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - timm draws from the global one
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        random.seed(int(states[0]))
        np.random.seed(states[1])  # noqa: NPY002
        torch.manual_seed(int(states[2]))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)  # noqa: NPY002


class Mixing:
    """Random erasing, mixup and CutMix for normalised images on a device, and targets for their labels."""

    def __init__(self, config: FinetuneConfig, classes: int, device: torch.device):
        from timm.data.mixup import Mixup
        from timm.data.random_erasing import RandomErasing

        self.classes, self.smoothing = classes, config.smoothing
        self.erase = RandomErasing(config.reprob, mode="pixel", device=str(device)) if config.reprob else None
        self.mix = None
        if config.mixup or config.cutmix:
            self.mix = Mixup(
                config.mixup,
                config.cutmix,
                switch_prob=config.mixup_switch_prob,
                label_smoothing=config.smoothing,
                num_classes=classes,
            )

    def __call__(
        self,
        images: Float[Tensor, "batch 3 side side"],
        labels: Int[Tensor, " batch"],
        keys: Sequence[int] | None = None,
    ) -> tuple[Float[Tensor, "batch 3 side side"], Float[Tensor, "batch classes"]]:
        """The images, changed, and the share of each class in each of them.

        Args:
            keys: what each image's rectangle is drawn from, within `drawn_from`; without them one stream serves all.
        """
        if self.erase is not None and keys is None:
            images = self.erase(images)
        elif self.erase is not None and keys is not None:
            for image, key in zip(images, keys, strict=True):
                random.seed(key)
                torch.manual_seed(key)
                self.erase(image)  # in place
        if self.mix is not None and len(images) % 2 == 0:
            return self.mix(images, labels)
        target = F.one_hot(labels, self.classes).to(images.dtype)
        return images, target * (1 - self.smoothing) + self.smoothing / self.classes


def erase_keys(seed: int, epoch: int, samples: np.ndarray) -> list[int]:
    """What random erasing of each sample is drawn from: the same on any number of ranks, at any place of a batch."""
    return [int(np.random.SeedSequence((ERASE, seed, epoch, int(each))).generate_state(1)[0]) for each in samples]


class DropPath(nn.Module):
    """Stochastic depth whose scales are set from outside before each pass; in an evaluation there are none.

    Attributes:
        rate: how often an image loses the branch.
        scale: what each image's branch is multiplied by, [batch].
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.scale: Tensor | None = None

    def forward(self, branch: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        if not self.training or self.scale is None:
            return branch
        return branch * self.scale.view(-1, *[1] * (branch.ndim - 1)).to(branch.dtype)


def take_over_drop_path(network: nn.Module) -> list[DropPath]:
    """Put ours in the place of timm's modules, which draw for a whole batch. Returns them in the network's order."""
    from timm.layers.drop import DropPath as TimmDropPath

    found = []
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, TimmDropPath):
                found.append(DropPath(float(child.drop_prob)))
                setattr(module, name, found[-1])
    return found


def set_drop_path(
    modules: Sequence[DropPath], seed: int, epoch: int, samples: np.ndarray, device: torch.device
) -> None:
    """Draw the next pass's scales: a function of (seed, epoch, sample, module) alone; 0, or 1 / (1 - rate)."""
    if not modules:
        return
    drawn = torch.from_numpy(uniforms(seed, epoch, samples, DROP_PATH, len(modules)))
    rate = torch.tensor([module.rate for module in modules])
    scales = to_device(((drawn >= rate).float() / (1 - rate)).T.contiguous(), device)
    for module, scale in zip(modules, scales, strict=True):
        module.scale = scale


class RandAugment:
    """timm's RandAugment for batches of bytes, in worker processes that are a batch ahead.

    Args:
        recipe: as timm writes it (`rand-m9-mstd0.5-inc1`); empty for none.
        mean: what is filled in where an image is moved away, 0 to 1.
        workers: processes; with 1 the work is done where it is asked for.

    Raises:
        UserError: for a recipe that timm does not know.
    """

    def __init__(self, recipe: str, side: int, mean: Sequence[float], seed: int, workers: int = 1):
        self.recipe, self.workers = recipe, workers
        self.change = partial(_changed, recipe=recipe, side=side, mean=tuple(mean), seed=seed)
        self.pool = None
        if recipe:
            try:
                _transform(recipe, side, tuple(mean))
            except (AssertionError, KeyError, ValueError, IndexError):
                raise UserError(f"--aa {recipe}: timm knows no such RandAugment") from None
            if workers > 1:
                # Not forked: the loader's threads are running.
                self.pool = ProcessPoolExecutor(workers, get_context("spawn"))

    def submit(self, images: np.ndarray, epoch: int, samples: np.ndarray) -> "list[Future[np.ndarray]] | np.ndarray":
        """Begin with a batch, uint8 [B, 3, S, S]; `samples` are the images' numbers."""
        if not self.recipe:
            return images
        if self.pool is None:
            return self.change(images, epoch=epoch, samples=samples)
        parts = zip(np.array_split(images, self.workers), np.array_split(samples, self.workers), strict=True)
        return [self.pool.submit(self.change, part, epoch=epoch, samples=numbers) for part, numbers in parts]

    @staticmethod
    def collect(begun: "list[Future[np.ndarray]] | np.ndarray") -> np.ndarray:
        """The batch that `submit` began with."""
        return begun if isinstance(begun, np.ndarray) else np.concatenate([part.result() for part in begun])

    def __enter__(self) -> "RandAugment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


@cache
def _transform(recipe: str, side: int, mean: tuple[float, ...]) -> Any:
    from timm.data.auto_augment import rand_augment_transform

    if not recipe.startswith("rand"):
        raise ValueError(recipe)
    fill = tuple(min(255, round(255 * value)) for value in mean)
    hints = {"translate_const": int(side * 0.45), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    transform = rand_augment_transform(recipe, hints)
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's operation, with the black image that Pillow made of 0 bits before its version 13 refused them.

    timm asks for 0 bits at its full magnitude, which the usual recipe draws for 2 % of its operations.
    """
    from timm.data.auto_augment import posterize

    return posterize(image, bits) if bits >= 1 else Image.new(image.mode, image.size)


def _changed(
    images: np.ndarray,
    *,
    epoch: int,
    samples: np.ndarray,
    recipe: str,
    side: int,
    mean: tuple[float, ...],
    seed: int,
) -> np.ndarray:
    transform = _transform(recipe, side, mean)
    changed = np.empty_like(images)
    for place, (planes, sample) in enumerate(zip(images, samples, strict=True)):
        with drawn_from(SAMPLE, seed, epoch, int(sample)):
            picture = transform(Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0))))
        changed[place] = np.asarray(picture).transpose(2, 0, 1)
    return changed
