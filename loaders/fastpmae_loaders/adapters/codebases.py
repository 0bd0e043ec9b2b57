"""MAE and SdAE, DINO, iBOT, timm's `train.py`, lightly, LightlyTrain: what each takes for a loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastpmae_loaders.adapters.base import IMAGENET_MEAN, IMAGENET_STD, EpochAdapter
from fastpmae_loaders.batch import Batch
from fastpmae_loaders.blockwise import IBOTMasks, draw_patches
from fastpmae_loaders.engines.base import Samples
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.mixture import Mixture
from fastpmae_loaders.paired import PairedViews
from fastpmae_loaders.sources.places import Column
from fastpmae_loaders.values import checked


class MAELoader(EpochAdapter[tuple[Tensor, ...]]):
    """`(images, labels)` for MAE's and SdAE's `main_pretrain.py`: float32 [B, 3, S, S], normalised; int64 [B].

    Both draw their masks in the model. `masks="ours"` hands over the loader's too: `(images, labels, ids_shuffle)`,
    int64 [B, N], the visible patches and then the folds. It is what the models' `random_masking` else makes of noise.

    Contract: facebookresearch/mae and AbrahamYabo/SdAE, main_pretrain.py, engine_pretrain.py, models_mae.py.
    """

    @checked
    def __init__(self, loader: PairedViews, masks: Literal["theirs", "ours"] = "theirs", **normalising: Any) -> None:
        super().__init__(loader, **normalising)
        self.masks = masks

    def collate(self, batch: Batch, epoch: int) -> tuple[Tensor, ...]:
        """(images, labels), or with our masks (images, labels, ids_shuffle)."""
        images = self.normalised(batch.views[0])
        if self.masks == "theirs":
            return images, batch.label
        return images, batch.label, torch.cat([batch.visible, batch.folds], 1)


class DINOLoader(EpochAdapter[tuple[list[Tensor], Tensor]]):
    """`(images, labels)` for DINO's `main_dino.py`: a list of float32 [B, 3, S, S], the global crops first; int64 [B].

    Contract: facebookresearch/dino main_dino.py.
    """

    def collate(self, batch: Batch, epoch: int) -> tuple[list[Tensor], Tensor]:
        """(images, labels)."""
        return [self.normalised(view) for view in batch.views], batch.label


class IBOTLoader(EpochAdapter[tuple[list[Tensor], Tensor, list[Tensor]]]):
    """`(images, labels, masks)` for iBOT's `main_ibot.py`.

    images: a list of float32 [B, 3, S, S], the global crops first. labels: int64 [B]. masks: a list of bool
    [B, S/p, S/p], True where hidden, one for each global crop (iBOT draws one for local crops too and uses it nowhere).

    `masks=None` hides the loader's own folds in the first crop and as many patches, drawn as evenly, in the others.
    The first `global_crops` views are global, the others local; None takes as many as are as large as the first one.

    Contract: bytedance/ibot main_ibot.py, loader.py.
    """

    @checked
    def __init__(
        self,
        loader: PairedViews,
        masks: IBOTMasks | None = IBOTMasks(),  # noqa: B008, it is frozen
        patch_size: int | None = None,
        global_crops: int | None = None,
        **normalising: Any,
    ) -> None:
        super().__init__(loader, **normalising)
        self.masks = masks
        self.grid = grid_of(loader, patch_size, ours=masks is None)
        self.global_crops = count_globals(loader, global_crops)

    def collate(self, batch: Batch, epoch: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """(images, labels, masks)."""
        if self.masks is None:
            masks = own_masks(batch, epoch, self.loader.seed, self.global_crops, self.grid)
        else:
            masks = [
                self.masks.draw(self.loader.seed, epoch, batch.samples, crop, self.grid)
                for crop in range(self.global_crops)
            ]
        hidden = [self.loader.transfer.carry(torch.from_numpy(mask)) for mask in masks]
        return [self.normalised(view) for view in batch.views], batch.label, hidden


class TimmLoader(EpochAdapter[tuple[Tensor, Tensor]]):
    """`(input, target)` as timm's `PrefetchLoader` gives them: on the device, normalised, targets int64 [B].

    Args:
        loader: of one view; further ones are decoded for nothing.
        img_dtype: of the images.
        mixup: a `timm.data.Mixup`; it wants an even number of samples. `mixup_enabled` is its own.
        random_erasing: a `timm.data.random_erasing.RandomErasing`, called last. Both draw from the global
            generators, as they do in timm: they do not depend on the loader's seed, nor resume with it.

    Raises:
        UserError: for images without labels, and for a mixup that is made to collate samples.

    Contract: huggingface/pytorch-image-models timm/data/loader.py (PrefetchLoader), timm/data/mixup.py, train.py.
    """

    @checked
    def __init__(
        self,
        loader: PairedViews,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        img_dtype: torch.dtype = torch.float32,
        mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        random_erasing: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(loader, mean, std, img_dtype)
        if _lacks_labels(loader.samples, loader.indices):
            raise self._unlabelled()
        if type(mixup).__name__ == "FastCollateMixup":
            raise UserError("mixup is a FastCollateMixup, which collates samples: give a timm.data.Mixup")
        self.img_dtype = img_dtype
        self.mixup: Any = mixup
        self.random_erasing = random_erasing

    @property
    def mixup_enabled(self) -> bool:
        """Whether batches are mixed; timm's loop switches it off at `--mixup-off-epoch`."""
        return self.mixup is not None and self.mixup.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        if self.mixup is not None:
            self.mixup.mixup_enabled = enabled

    def collate(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        """(input, target); with mixup the targets are shares of the classes, float [B, classes].

        Raises:
            UserError: for an image of a set that has no label; what is no set was looked at before.
        """
        labels = self.loader.samples.label
        if isinstance(labels, Column) and len(batch) and labels[batch.samples].min() < 0:
            raise self._unlabelled()
        images, target = self.normalised(batch.views[0]), batch.label
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        return images if self.random_erasing is None else self.random_erasing(images), target

    def _unlabelled(self) -> UserError:
        return UserError(f"{self.loader.samples.path} holds images without a label; timm's train.py needs one for each")


def _lacks_labels(samples: Samples, indices: np.ndarray | None) -> bool:
    """Whether some of these images have no label; of a set the first alone is looked at, which opens one part."""
    if isinstance(samples, Mixture):
        # the images of a source without names have no label beside those of one with names
        every = np.arange(len(samples)) if indices is None else indices
        return any(
            (samples.class_names is not None and source.class_names is None) or _lacks_labels(source, own)
            for source, _, own in samples.by_source(every)
        )
    indices = np.arange(len(samples)) if indices is None else indices
    return bool(samples.label[indices[:1] if isinstance(samples.label, Column) else indices].min() < 0)


class LightlyLoader(EpochAdapter[tuple[list[Tensor], Tensor, list[str]]]):
    """`(views, labels, names)` for lightly's examples: a list of float32 [B, 3, S, S], int64 [B], a list of str.

    A name is the image's path below the folder that the loader reads, or its shard and its place there. A .beton holds
    no names: it is the sample's number then, as lightly names images of a data set that has no files.

    Contract: lightly-ai/lightly lightly/data/multi_view_collate.py, lightly/data/dataset.py, examples/pytorch.
    """

    def collate(self, batch: Batch, epoch: int) -> tuple[list[Tensor], Tensor, list[str]]:
        """(views, labels, names)."""
        return [self.normalised(view) for view in batch.views], batch.label, names_in(batch, self.loader)


class LightlyTrainLoader(EpochAdapter[dict[str, Any]]):
    """`{"filename": names, "views": [view, ...]}` for LightlyTrain's methods: a list of str, float32 [B, 3, S, S] each.

    Names are those of `LightlyLoader`. Lightning, which LightlyTrain trains with, calls `set_epoch`, and keeps the
    position in its checkpoints.

    Contract: lightly-ai/lightly-train src/lightly_train/types.py (Batch), _commands/train.py.
    """

    def collate(self, batch: Batch, epoch: int) -> dict[str, Any]:
        """The dictionary."""
        return {
            "filename": names_in(batch, self.loader),
            "views": [self.normalised(view) for view in batch.views],
        }


def names_in(batch: Batch, loader: PairedViews) -> list[str]:
    """What the samples of a batch are called: paths below the loader's folder, or numbers where there are no names."""
    samples = loader.samples
    name: Callable[[int], str] = getattr(samples, "name", str)
    return [name(int(sample)).removeprefix(f"{samples.path}/") for sample in batch.samples]


def own_masks(batch: Batch, epoch: int, seed: int, views: int, grid: tuple[int, int]) -> list[np.ndarray]:
    """The loader's folds as a mask of the first view, and as many patches of each other one: bool [B, H, W], True
    where hidden."""
    folds = batch.folds.cpu().numpy()
    first = np.zeros((len(folds), grid[0] * grid[1]), np.bool_)
    np.put_along_axis(first, folds, True, 1)
    wanted = np.full(len(folds), folds.shape[1])
    others = [draw_patches(seed, epoch, batch.samples, view, grid, wanted) for view in range(1, views)]
    return [first.reshape(-1, *grid), *others]


def grid_of(loader: PairedViews, patch_size: int | None, ours: bool) -> tuple[int, int]:
    """Rows and columns of patches in the first view; `ours` if the loader's own masks are to fit them."""
    size, own = loader.views[0].size, loader.settings.patch_size
    patch = own if patch_size is None else patch_size
    if patch < 1 or size % patch:
        raise UserError(f"patch_size = {patch} does not divide the first view's {size} pixels")
    if ours and patch != own:
        raise UserError(f"the loader's masks are of patches of {own} pixels: give its settings patch_size={patch}")
    return size // patch, size // patch


def count_globals(loader: PairedViews, wanted: int | None) -> int:
    """How many views are global: as many as wanted, or (None) those before the first one of another size.

    Raises:
        UserError: where so many views are not there, or not of one size, which the masks of one grid need.
    """
    sizes = [view.size for view in loader.views]
    alike = next((number for number, size in enumerate(sizes) if size != sizes[0]), len(sizes))
    if wanted is not None and not 1 <= wanted <= alike:
        raise UserError(f"global_crops = {wanted}: of the loader's views of {sizes} pixels the first {alike} are alike")
    return wanted or alike
