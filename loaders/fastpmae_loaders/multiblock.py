"""I-JEPA's multi-block masks and CAPI's inverse blocks, as their released code draws them.

Both are places in an image's row of patches, int64, and functions of (seed, epoch, sample); I-JEPA's blocks have one
size for a whole global batch, which is a function of (seed, epoch, batch).
"""

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from fastpmae_loaders.blockwise import MASKS
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.jit.compiled import kernel
from fastpmae_loaders.jit.elementary import exponential
from fastpmae_loaders.jit.philox import uniform_pair
from fastpmae_loaders.recipes import MOST_VIEWS
from fastpmae_loaders.sampling import check_key, draw_permutation
from fastpmae_loaders.values import Typed

# behind the purposes of blockwise.py, 4 for each view
CAPI: Final = MASKS + 4 * MOST_VIEWS
PREDICTED: Final = CAPI + 1
SIZES: Final = CAPI + 2
# one for each block of an image from here on
PLACES: Final = CAPI + 3


@kernel
def _draw_pair(seed, epoch, index, purpose, out):
    out[0], out[1] = uniform_pair(seed, epoch, index, purpose, 0)


@kernel
def _fill_multiblock(seed, epoch, index, target_size, context_size, min_keep, overlap, targets, contexts):
    for row in range(index.shape[0]):
        high, wide = target_size
        for block in range(targets.shape[1]):
            mask = targets[row, block]
            down, across = uniform_pair(seed, epoch, index[row], PLACES + block, 0)
            top, left = np.int64(down * (mask.shape[0] - high)), np.int64(across * (mask.shape[1] - wide))
            mask[top : top + high, left : left + wide] = True
        high, wide = context_size
        for block in range(contexts.shape[1]):
            mask = contexts[row, block]
            attempt = 0
            while True:
                purpose = PLACES + targets.shape[1] + block
                down, across = uniform_pair(seed, epoch, index[row], purpose, attempt)
                top, left = np.int64(down * (mask.shape[0] - high)), np.int64(across * (mask.shape[1] - wide))
                mask[:] = False
                mask[top : top + high, left : left + wide] = True
                # after every twenty tries one target less is kept out of the context
                kept_out = 0 if overlap else max(targets.shape[1] - attempt // 20, 0)
                for other in range(kept_out):
                    mask &= ~targets[row, other]
                if mask.sum() > min_keep:
                    break
                attempt += 1


@kernel
def _fill_inverse_blocks(seed, epoch, index, visible, log_low, log_high, roll, masks, predicted):
    height, width = masks.shape[1:]
    for row in range(index.shape[0]):
        shape, down = uniform_pair(seed, epoch, index[row], CAPI, 0)
        across, turn = uniform_pair(seed, epoch, index[row], CAPI, 1)
        other_turn, _ = uniform_pair(seed, epoch, index[row], CAPI, 2)
        aspect = exponential(log_low + shape * (log_high - log_low))
        high = min(np.int64(np.ceil(np.sqrt(visible * aspect))), height)
        wide = min(np.int64(np.ceil(np.sqrt(visible / aspect))), width)
        # a side that the grid has cut short, which of no square grid it does, is made up for by the other
        wide = min(max(wide, -(-visible // max(high, 1))), width)
        high = max(high, -(-visible // max(wide, 1)))
        top, left = np.int64(down * (height - high + 1)), np.int64(across * (width - wide + 1))
        turn_down = np.int64(turn * height) if roll else 0
        turn_across = np.int64(other_turn * width) if roll else 0
        mask = masks[row]
        mask[:] = True
        # a block of ceilings holds a few patches too many: of its last row
        for number in range(visible):
            y, x = top + number // wide, left + number % wide
            mask[(y + turn_down) % height, (x + turn_across) % width] = False
        # which of the hidden patches are predicted, in the order of the draw
        order = np.empty(height * width - visible, np.int64)
        draw_permutation(seed, epoch, index[row], PREDICTED, order)
        hidden = np.flatnonzero(mask)
        for number in range(predicted.shape[1]):
            predicted[row, number] = hidden[order[number]]


class MultiBlock(NamedTuple):
    """I-JEPA's `masks_enc` and `masks_pred`: for each block of an image int64 [B, n], the patches of it."""

    contexts: list[np.ndarray]
    targets: list[np.ndarray]


@dataclass(frozen=True)
class IJEPAMasks(Typed):
    """I-JEPA's masks: a few blocks to predict, and a large one to see, out of which those are cut.

    The names are those of its configurations and the defaults their ViT-H/14's (facebookresearch/ijepa, configs,
    src/masks/multiblock.py for the rule). As there, one number decides of a target's size and of its aspect, a block
    never touches the grid's last row and column, a context that keeps `min_keep` patches or fewer is drawn anew, and
    all masks of a batch are cut to the length of the shortest.

    Attributes:
        enc_mask_scale, pred_mask_scale: smallest and largest share of the patches in a context and in a target.
        aspect_ratio: smallest and largest height over width of a target; contexts are square.
        num_enc_masks, num_pred_masks: contexts and targets of an image.
        min_keep: a mask holds more patches than this.
        allow_overlap: leave the targets in the context.

    Raises:
        UserError: for numbers that make no masks.
    """

    OF = "masks: "
    enc_mask_scale: tuple[float, float] = (0.85, 1.0)
    pred_mask_scale: tuple[float, float] = (0.15, 0.2)
    aspect_ratio: tuple[float, float] = (0.75, 1.5)
    num_enc_masks: int = 1
    num_pred_masks: int = 4
    min_keep: int = 10
    allow_overlap: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("enc_mask_scale", "pred_mask_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise UserError(f"masks: {name} = {getattr(self, name)} must be two shares of the patches")
        if not 0 < self.aspect_ratio[0] <= self.aspect_ratio[1]:
            raise UserError(f"masks: aspect_ratio = {self.aspect_ratio} must be two positive numbers")
        for name in ("num_enc_masks", "num_pred_masks"):
            if not 1 <= getattr(self, name) <= 64:
                raise UserError(f"masks: {name} = {getattr(self, name)} must be between 1 and 64")
        if self.min_keep < 0:
            raise UserError(f"masks: min_keep = {self.min_keep} must be 0 or more")

    def sizes(self, seed: int, epoch: int, batch: int, grid: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the targets, and those of the contexts, of global batch `batch` of an epoch.

        Raises:
            UserError: where such blocks of such a grid hold `min_keep` patches or fewer.
        """
        check_key(seed, epoch)
        drawn = np.empty(2)
        _draw_pair(seed, epoch, batch, SIZES, drawn)
        target = _size(float(drawn[0]), self.pred_mask_scale, self.aspect_ratio, grid)
        context = _size(float(drawn[1]), self.enc_mask_scale, (1.0, 1.0), grid)
        for name, (high, wide) in (("target", target), ("context", context)):
            if high * wide <= self.min_keep:
                raise UserError(
                    f"masks: a {name} of {high} x {wide} patches of a grid of {grid[0]} x {grid[1]} holds no more than "
                    f"min_keep = {self.min_keep}"
                )
        return target, context

    def draw(self, seed: int, epoch: int, batch: int, index: np.ndarray, grid: tuple[int, int]) -> MultiBlock:
        """The masks of samples `index` [B], which are (part of) the global batch `batch` of an epoch.

        Raises:
            UserError: see `sizes`.
        """
        target, context = self.sizes(seed, epoch, batch, grid)
        count = len(index)
        targets = np.zeros((count, self.num_pred_masks, *grid), np.bool_)
        contexts = np.zeros((count, self.num_enc_masks, *grid), np.bool_)
        index = np.ascontiguousarray(index, np.int64)
        _fill_multiblock(seed, epoch, index, target, context, self.min_keep, self.allow_overlap, targets, contexts)
        return MultiBlock(_places(contexts), _places(targets))


def _size(
    drawn: float, scale: tuple[float, float], aspect: tuple[float, float], grid: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns of a block: the same number decides of its share of the patches and of its shape."""
    patches = int(grid[0] * grid[1] * (scale[0] + drawn * (scale[1] - scale[0])))
    shape = aspect[0] + drawn * (aspect[1] - aspect[0])
    high, wide = round(math.sqrt(patches * shape)), round(math.sqrt(patches / shape))
    return min(high, grid[0] - 1), min(wide, grid[1] - 1)


def _places(masks: np.ndarray) -> list[np.ndarray]:
    """Bool [B, n, H, W] to n arrays int64 [B, m]: the first m places of each, as many as the smallest has."""
    flat = masks.reshape(*masks.shape[:2], -1)
    shortest = int(flat.sum(2).min(initial=flat.shape[2]))
    places = np.argsort(~flat, axis=2, kind="stable")[:, :, :shortest]
    return [np.ascontiguousarray(places[:, number]) for number in range(places.shape[1])]


class InverseBlock(NamedTuple):
    """CAPI's masks of a batch.

    masks: bool [B, H, W], True where hidden. visible: int64 [B, V], the patches that are seen. predicted: int64 [B, P],
    some of the hidden ones. Both count from 0 in each image; CAPI's `visible_indices` and `predict_indices` are
    `(x + H * W * np.arange(B)[:, None]).ravel()` of them.
    """

    masks: np.ndarray
    visible: np.ndarray
    predicted: np.ndarray


@dataclass(frozen=True)
class CAPIMasks(Typed):
    """CAPI's masks: all is hidden but one block, which is then moved around the image's edges.

    The names and defaults are those of its configuration (facebookresearch/capi, default_pretrain_config.yaml, and
    InverseBlockMasking and collate_data_and_cast in data.py for the rule): exactly `int(N mask_ratio)` patches are
    hidden.

    Attributes:
        mask_ratio: share of the patches that is hidden.
        prediction_subsampling: share of the hidden patches that is predicted.
        roll: move the block around the edges.
        min_aspect, max_aspect: height over width of the block; None is one over `min_aspect`.

    Raises:
        UserError: for numbers that make no masks.
    """

    OF = "masks: "
    mask_ratio: float = 0.65
    prediction_subsampling: float = 0.05
    roll: bool = True
    min_aspect: float = 0.5
    max_aspect: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask_ratio <= 1 or not 0 <= self.prediction_subsampling <= 1:
            raise UserError(
                f"masks: mask_ratio = {self.mask_ratio} and prediction_subsampling = {self.prediction_subsampling} "
                "must be shares of the patches"
            )
        if not 0 < self.min_aspect <= (self.max_aspect or 1 / self.min_aspect):
            raise UserError(f"masks: min_aspect = {self.min_aspect} must be above 0 and at most max_aspect")

    def draw(self, seed: int, epoch: int, index: np.ndarray, grid: tuple[int, int]) -> InverseBlock:
        """The masks of samples `index` [B]."""
        check_key(seed, epoch)
        index = np.ascontiguousarray(index, np.int64)
        patches = grid[0] * grid[1]
        hidden = int(patches * self.mask_ratio)
        visible = patches - hidden
        masks = np.ones((len(index), *grid), np.bool_)
        predicted = np.empty((len(index), int(hidden * self.prediction_subsampling)), np.int64)
        # rounded, since maths libraries differ in the last bit of a logarithm
        low = round(max(math.log(self.min_aspect), math.log(max(visible, 1) / grid[1] ** 2)), 12)
        high = round(
            min(math.log(self.max_aspect or 1 / self.min_aspect), math.log(grid[0] ** 2 / (visible + 1e-5))), 12
        )
        _fill_inverse_blocks(seed, epoch, index, visible, low, high, self.roll, masks, predicted)
        flat = masks.reshape(len(index), -1)
        seen = np.argsort(flat, axis=1, kind="stable")[:, :visible]
        return InverseBlock(masks, np.ascontiguousarray(seen), predicted)
