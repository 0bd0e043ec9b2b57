"""DINOv2, DINOv3 and CAPI, which count iterations and no epochs: what each takes for a loader without end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastpmae_loaders.adapters.base import Adapter, Handed
from fastpmae_loaders.adapters.codebases import count_globals, grid_of, own_masks
from fastpmae_loaders.batch import Batch
from fastpmae_loaders.blockwise import DINOv2Masks, DINOv3Masks
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.multiblock import CAPIMasks
from fastpmae_loaders.paired import PairedViews
from fastpmae_loaders.values import checked

if TYPE_CHECKING:  # the loaders alone need numpy, numba, torch and Pillow, no more
    from jaxtyping import Bool


class IterationAdapter(Adapter[Handed]):
    """An adapter without end and without a length. `start_iter` is the iteration that a run goes on with: the loader is
    put where it stood then.

    Raises:
        UserError: for a negative start.
    """

    @checked
    def __init__(self, loader: PairedViews, start_iter: int = 0, **normalising: Any) -> None:
        super().__init__(loader, **normalising)
        if start_iter < 0:
            raise UserError(f"start_iter = {start_iter} must be an iteration of a run, counted from 0")
        if start_iter:
            epoch, batch = divmod(start_iter, len(loader))
            self.load_state_dict({**loader.state_dict(), "epoch": epoch, "batch": batch})

    def __iter__(self) -> Iterator[Handed]:
        while not self._closed:
            yield from self._pass()


class DINOv2Loader(IterationAdapter[dict[str, Any]]):
    """The dictionaries of DINOv2's `collate_data_and_cast`, without end and without a length.

    collated_global_crops: [2 B, 3, S, S], float16 by default, the first crop of every sample before the second.
    collated_local_crops: [L B, 3, s, s] likewise. collated_masks: bool [2 B, N], True where hidden.
    mask_indices_list: int64 [M], where the hidden patches are in the flattened masks. masks_weight: float32 [M], one
    over the number of them in their crop. upperbound: int, at least M. n_masked_patches: int64 [1], M.

    `start_iter` is the iteration that the run goes on with: the loader is put where it stood then.
    The first `global_crops` views are global, two as in DINOv2, and the others local, also where they are as large.
    `masks=None` hides the loader's own folds in the first crop and as many patches, drawn as evenly, in the second.

    Contract: facebookresearch/dinov2 dinov2/data/collate.py, masking.py, samplers.py, dinov2/train/train.py,
    ssl_meta_arch.py.
    """

    @checked
    def __init__(
        self,
        loader: PairedViews,
        masks: DINOv2Masks | None = DINOv2Masks(),  # noqa: B008, it is frozen
        patch_size: int | None = None,
        start_iter: int = 0,
        dtype: torch.dtype = torch.float16,
        global_crops: int | None = 2,
        **normalising: Any,
    ) -> None:
        super().__init__(loader, start_iter, dtype=dtype, **normalising)
        self.masks = masks
        self.grid = grid_of(loader, patch_size, ours=masks is None)
        self.global_crops = count_globals(loader, global_crops)

    def collate(self, batch: Batch, epoch: int) -> dict[str, Any]:
        """The dictionary."""
        crops = [self.normalised(view) for view in batch.views]
        hidden, upperbound = self._hidden(batch, epoch)
        # on the host, since the device would have to be waited for to know how many there are
        counts = hidden.sum(1)
        places = hidden.flatten().nonzero().flatten()
        weights = (1 / counts.clamp(min=1).to(torch.float32)).repeat_interleave(counts)
        carry = self.loader.transfer.carry
        return {
            "collated_global_crops": torch.cat(crops[: self.global_crops]),
            "collated_local_crops": torch.cat(crops[self.global_crops :] or [crops[0][:0]]),
            "collated_masks": carry(hidden),
            "mask_indices_list": carry(places),
            "masks_weight": carry(weights),
            "upperbound": upperbound,
            # written by the device: a list would be copied to it, and the copy waited for
            "n_masked_patches": torch.full((1,), len(places), dtype=torch.int64, device=batch.label.device),
        }

    def _hidden(self, batch: Batch, epoch: int) -> tuple[Bool[Tensor, "crops patches"], int]:
        seed, samples = self.loader.seed, batch.samples
        if self.masks is not None:
            drawn = self.masks.draw(seed, epoch, samples, self.global_crops, self.grid)
            return torch.from_numpy(drawn.masks), drawn.upperbound
        masks = np.concatenate(own_masks(batch, epoch, seed, self.global_crops, self.grid))
        return torch.from_numpy(masks).flatten(1), int(masks.sum())


class DINOv3Loader(DINOv2Loader):
    """The dictionaries of DINOv3's `collate_data_and_cast`: DINOv2's, in bfloat16 by default, with DINOv3's masks.

    With `gram_crops`, the last so many views are `collated_gram_teacher_crops`: one for each global crop, as
    `View(512, crop_of=0), View(512, crop_of=1)`.

    Contract: facebookresearch/dinov3 dinov3/data/collate.py, masking.py, dinov3/train/train.py, ssl_meta_arch.py.
    """

    @checked
    def __init__(
        self,
        loader: PairedViews,
        masks: DINOv3Masks | None = DINOv3Masks(),  # noqa: B008, it is frozen
        patch_size: int | None = None,
        start_iter: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        global_crops: int | None = 2,
        gram_crops: int = 0,
        **normalising: Any,
    ) -> None:
        super().__init__(loader, masks, patch_size, start_iter, dtype, global_crops, **normalising)
        views = len(loader.views)
        if gram_crops not in (0, self.global_crops) or self.global_crops + gram_crops > views:
            raise UserError(
                f"gram_crops = {gram_crops}: of {views} views there are {self.global_crops} global crops, and a gram "
                "crop for each of them or none"
            )
        self.gram_crops = gram_crops

    def collate(self, batch: Batch, epoch: int) -> dict[str, Any]:
        """The dictionary."""
        others = len(batch.views) - self.gram_crops
        collated = super().collate(replace(batch, views=batch.views[:others]), epoch)
        if self.gram_crops:
            gram = [self.normalised(view) for view in batch.views[others:]]
            collated["collated_gram_teacher_crops"] = torch.cat(gram)
        return collated


class CAPILoader(IterationAdapter[dict[str, Tensor]]):
    """The dictionaries of CAPI's `collate_data_and_cast`, without end and without a length.

    images: [B, 3, S, S], bfloat16 by default. visible_indices: int64 [B V], the patches that are seen, counted through
    the batch (N an image). predict_indices: int64 [B P], those of the hidden ones that are predicted.

    `start_iter` is the iteration that the run goes on with: the loader is put where it stood then.

    Contract: facebookresearch/capi data.py (collate_data_and_cast), train_capi.py.
    """

    @checked
    def __init__(
        self,
        loader: PairedViews,
        masks: CAPIMasks = CAPIMasks(),  # noqa: B008, it is frozen
        patch_size: int | None = None,
        start_iter: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        **normalising: Any,
    ) -> None:
        super().__init__(loader, start_iter, dtype=dtype, **normalising)
        self.masks = masks
        self.grid = grid_of(loader, patch_size, ours=False)

    def collate(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """The dictionary."""
        drawn = self.masks.draw(self.loader.seed, epoch, batch.samples, self.grid)
        first = self.grid[0] * self.grid[1] * np.arange(len(batch))[:, None]
        carry = self.loader.transfer.carry
        return {
            "images": self.normalised(batch.views[0]),
            "visible_indices": carry(torch.from_numpy((drawn.visible + first).ravel())),
            "predict_indices": carry(torch.from_numpy((drawn.predicted + first).ravel())),
        }
