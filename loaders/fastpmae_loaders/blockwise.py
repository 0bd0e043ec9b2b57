"""Masks of other codebases: rectangles of patches as BEiT, iBOT and DINOv2 draw them, or iBOT's single patches.

Every mask is a function of (seed, epoch, sample, view), as the views are. DINOv2 also balances the masks of a batch
against each other, so there it is a function of the batch's samples too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.jit.compiled import kernel
from fastpmae_loaders.jit.elementary import exponential, round_half_even
from fastpmae_loaders.jit.philox import uniform_pair
from fastpmae_loaders.sampling import CALLERS, check_key, draw_permutation
from fastpmae_loaders.values import Typed

# half of the purposes below the callers'; the views' own begin far lower
MASKS: Final = CALLERS // 2
# of one view's mask: its purposes are 4 apart from the next view's
RATIO: Final = 0
BLOCKS: Final = 1
PATCHES: Final = 2
TURN: Final = 3


@kernel
def _fill_blocks(seed, epoch, index, purpose, wanted, smallest, largest, log_aspect, masks):
    for row in range(index.shape[0]):
        mask = masks[row]
        height, width = mask.shape
        masked = 0
        attempt = 0
        added = 1
        while masked < wanted[row] and added > 0:
            room = min(wanted[row] - masked, largest)
            added = 0
            for _ in range(10):
                share, shape = uniform_pair(seed, epoch, index[row], purpose, 2 * attempt)
                down, across = uniform_pair(seed, epoch, index[row], purpose, 2 * attempt + 1)
                attempt += 1
                area = smallest + share * (room - smallest)
                aspect = exponential(log_aspect[0] + shape * (log_aspect[1] - log_aspect[0]))
                h = round_half_even(np.sqrt(area * aspect))
                w = round_half_even(np.sqrt(area / aspect))
                if h >= height or w >= width:
                    continue
                top = np.int64(down * (height - h + 1))
                left = np.int64(across * (width - w + 1))
                block = mask[top : top + h, left : left + w]
                fresh = h * w - block.sum()
                if 0 < fresh <= room:
                    block[:] = True
                    added = fresh
                    break
            masked += added


@kernel
def _fill_patches(seed, epoch, index, purpose, wanted, masks):
    order = np.empty(masks.shape[1], np.int64)
    for row in range(index.shape[0]):
        draw_permutation(seed, epoch, index[row], purpose, order)
        masks[row, order[: wanted[row]]] = True


@kernel
def _complete(seed, epoch, index, purpose, wanted, masks):
    order = np.empty(masks.shape[1], np.int64)
    for row in range(index.shape[0]):
        missing = wanted[row] - masks[row].sum()
        draw_permutation(seed, epoch, index[row], purpose, order)
        for patch in order:
            if missing > 0 and not masks[row, patch]:
                masks[row, patch] = True
                missing -= 1


@kernel
def _fill_pairs(seed, epoch, index, purpose, out):
    for row in range(index.shape[0]):
        out[row, 0], out[row, 1] = uniform_pair(seed, epoch, index[row], purpose, 0)


def _pairs(seed: int, epoch: int, index: np.ndarray, purpose: int) -> np.ndarray:
    """Two numbers in [0, 1) for each sample: float64 [B, 2]."""
    out = np.empty((len(index), 2))
    _fill_pairs(seed, epoch, index, purpose, out)
    return out


def draw_blocks(
    seed: int,
    epoch: int,
    index: np.ndarray,
    view: int,
    grid: tuple[int, int],
    wanted: np.ndarray,
    smallest: float,
    largest: float = math.inf,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """Rectangles until `wanted` [B] patches are masked or ten rectangles in a row do not fit: bool [B, H, W].

    A rectangle's area is drawn between `smallest` and what is still wanted (at most `largest`), its height over width
    log-uniformly within `aspect`. It fits when it is less high and wide than the grid, covers something new, and no
    more than is still wanted; so at most `wanted` patches are masked, and often a few less.

    The rule is BEiT's (Bao et al. 2022, section 2.2; `masking_generator.py` of its release: 75 patches, smallest 16).
    """
    check_key(seed, epoch)
    masks = np.zeros((len(index), *grid), np.bool_)
    _fill_blocks(
        seed,
        epoch,
        np.ascontiguousarray(index, np.int64),
        MASKS + 4 * view + BLOCKS,
        np.ascontiguousarray(wanted, np.float64),
        float(smallest),
        float(largest),
        # rounded, since maths libraries differ in the last bit of a logarithm
        (round(math.log(aspect[0]), 12), round(math.log(aspect[1]), 12)),
        masks,
    )
    return masks


def draw_patches(
    seed: int, epoch: int, index: np.ndarray, view: int, grid: tuple[int, int], wanted: np.ndarray
) -> np.ndarray:
    """Exactly `wanted` [B] patches anywhere, all choices alike: bool [B, H, W]."""
    check_key(seed, epoch)
    masks = np.zeros((len(index), grid[0] * grid[1]), np.bool_)
    purpose = MASKS + 4 * view + PATCHES
    index, wanted = np.ascontiguousarray(index, np.int64), np.ascontiguousarray(wanted, np.int64)
    _fill_patches(seed, epoch, index, purpose, wanted, masks)
    return masks.reshape(-1, *grid)


@dataclass(frozen=True)
class IBOTMasks(Typed):
    """iBOT's masks; the names and defaults are those of its command line (bytedance/ibot, main_ibot.py, loader.py).

    Attributes:
        pred_ratio: share of the patches that is masked. Of several, each mask takes one, all alike.
        pred_ratio_var: the share is drawn within this of pred_ratio; one number, or one for each ratio.
        pred_shape: "block", rectangles (at most the share), or "rand", single patches (exactly the share).
        pred_start_epoch: before this epoch nothing is masked.
        pred_aspect_ratio: least and greatest height over width of a rectangle.

    Raises:
        UserError: for numbers that make no masks.
    """

    OF = "masks: "
    pred_ratio: float | Sequence[float] = 0.3
    pred_ratio_var: float | Sequence[float] = 0.0
    pred_shape: Literal["block", "rand"] = "block"
    pred_start_epoch: int = 0
    pred_aspect_ratio: tuple[float, float] = (0.3, 1 / 0.3)

    def __post_init__(self) -> None:
        super().__post_init__()
        ratios = self._ratios()
        if not ratios or not all(0 <= spread <= ratio <= ratio + spread <= 1 for ratio, spread in ratios):
            raise UserError(
                f"masks: pred_ratio = {self.pred_ratio} with pred_ratio_var = {self.pred_ratio_var} must be shares "
                "of the patches, each variance at most its ratio"
            )
        low, high = self.pred_aspect_ratio
        if not 0 < low <= high:
            raise UserError(f"masks: pred_aspect_ratio = {self.pred_aspect_ratio} must be two positive numbers")

    def _ratios(self) -> list[tuple[float, float]]:
        """(ratio, variance) of each choice."""
        ratios = [self.pred_ratio] if isinstance(self.pred_ratio, int | float) else list(self.pred_ratio)
        spreads = [self.pred_ratio_var] if isinstance(self.pred_ratio_var, int | float) else list(self.pred_ratio_var)
        if len(spreads) == 1:
            spreads = spreads * len(ratios)
        if len(spreads) != len(ratios):
            raise UserError(
                f"masks: pred_ratio_var = {self.pred_ratio_var} must be one number, or one for each of the "
                f"{len(ratios)} ratios"
            )
        return list(zip(ratios, spreads, strict=True))

    def draw(self, seed: int, epoch: int, index: np.ndarray, view: int, grid: tuple[int, int]) -> np.ndarray:
        """The masks of one view of samples `index` [B]: bool [B, H, W], True where masked."""
        check_key(seed, epoch)
        index = np.ascontiguousarray(index, np.int64)
        if epoch < self.pred_start_epoch:
            return np.zeros((len(index), *grid), np.bool_)
        which, within = _pairs(seed, epoch, index, MASKS + 4 * view + RATIO).T
        ratios = np.array(self._ratios(), np.float64)
        ratio, spread = ratios[(which * len(ratios)).astype(np.int64)].T
        wanted = (ratio + (2 * within - 1) * spread) * (grid[0] * grid[1])
        if self.pred_shape == "rand":
            return draw_patches(seed, epoch, index, view, grid, wanted.astype(np.int64))
        smallest = (min(grid) // 3) ** 2
        return draw_blocks(seed, epoch, index, view, grid, wanted, smallest, aspect=self.pred_aspect_ratio)


class Balanced(NamedTuple):
    """DINOv2's masks of a batch. masks: bool [V B, N], view after view. upperbound: at most so many are masked."""

    masks: np.ndarray
    upperbound: int


@dataclass(frozen=True)
class DINOv2Masks(Typed):
    """DINOv2's masks: some crops of a batch masked by shares that cover a range evenly, the others not at all.

    The names and defaults are those of its configuration (facebookresearch/dinov2, ssl_default_config.yaml, and
    data/collate.py, data/masking.py, train/train.py for the rule): of C crops, n = int(C mask_sample_probability) are
    masked, the i-th of them by a share within the i-th of n equal parts of mask_ratio_min_max; which crop gets which
    is random.

    Raises:
        UserError: for numbers that make no masks.
    """

    OF = "masks: "
    mask_ratio_min_max: tuple[float, float] = (0.1, 0.5)
    mask_sample_probability: float = 0.5
    min_num_patches: int = 4
    min_aspect: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.mask_ratio_min_max
        if not 0 <= low <= high <= 1:
            raise UserError(f"masks: mask_ratio_min_max = {self.mask_ratio_min_max} must be two shares of the patches")
        if not 0 <= self.mask_sample_probability <= 1:
            raise UserError(f"masks: mask_sample_probability = {self.mask_sample_probability} must be a probability")
        if self.min_num_patches < 1 or not 0 < self.min_aspect <= 1:
            raise UserError(
                f"masks: min_num_patches = {self.min_num_patches} must be at least 1 and min_aspect = "
                f"{self.min_aspect} above 0 and at most 1"
            )

    def draw(self, seed: int, epoch: int, index: np.ndarray, views: int, grid: tuple[int, int]) -> Balanced:
        """The masks of views 0 ... `views` - 1 of a batch of samples `index` [B]."""
        check_key(seed, epoch)
        index = np.ascontiguousarray(index, np.int64)
        draws = [_pairs(seed, epoch, index, MASKS + 4 * view + TURN) for view in range(views)]
        turns, within = np.concatenate(draws).T
        count = int(len(turns) * self.mask_sample_probability)
        # float32, as theirs: a bound that is a whole number of patches must not fall on its other side
        bounds: Tensor = torch.linspace(*self.mask_ratio_min_max, count + 1, dtype=torch.float32, device="cpu")
        most = np.array([int(grid[0] * grid[1] * bound) for bound in bounds[1:]], np.int64)
        crops = np.argsort(turns, kind="stable")[:count]
        wanted = np.zeros(len(turns))
        wanted[crops] = self._wanted(grid[0] * grid[1], bounds.double().numpy(), within[crops], most)
        # theirs is 0.5 * size // patch * size // patch, worked off from left to right
        largest = grid[0] // 2 * grid[1]
        aspect = (self.min_aspect, 1 / self.min_aspect)
        masks = [
            self._finished(
                seed,
                epoch,
                index,
                view,
                part,
                draw_blocks(seed, epoch, index, view, grid, part, self.min_num_patches, largest, aspect),
            )
            for view, part in enumerate(np.split(wanted, views))
        ]
        return Balanced(np.concatenate(masks).reshape(-1, grid[0] * grid[1]), int(most.sum()))

    def _wanted(self, patches: int, edges: np.ndarray, within: np.ndarray, most: np.ndarray) -> np.ndarray:
        """How many patches of each masked crop are to be hidden: a share drawn within its part of the range."""
        return np.floor(patches * (edges[:-1] + within * (edges[1:] - edges[:-1])))

    def _finished(
        self, seed: int, epoch: int, index: np.ndarray, view: int, wanted: np.ndarray, masks: np.ndarray
    ) -> np.ndarray:
        """Masks [B, H, W] of rectangles as they are handed over."""
        return masks


@dataclass(frozen=True)
class DINOv3Masks(DINOv2Masks, Typed):
    """DINOv3's masks: DINOv2's, of which the i-th hides exactly the upper bound of its part of the range: what the
    rectangles leave is made up for by single patches.

    The names and defaults are those of its configuration (facebookresearch/dinov3, ssl_default_config.yaml, and
    data/collate.py, data/masking.py for the rule).

    Attributes:
        mask_random_circular_shift: move each mask around the edges of the grid.
    """

    mask_random_circular_shift: bool = False

    def _wanted(self, patches: int, edges: np.ndarray, within: np.ndarray, most: np.ndarray) -> np.ndarray:
        return most

    def _finished(
        self, seed: int, epoch: int, index: np.ndarray, view: int, wanted: np.ndarray, masks: np.ndarray
    ) -> np.ndarray:
        flat = masks.reshape(len(masks), -1)
        _complete(seed, epoch, index, MASKS + 4 * view + PATCHES, wanted.astype(np.int64), flat)
        if not self.mask_random_circular_shift:
            return masks
        turns = (_pairs(seed, epoch, index, MASKS + 4 * view + RATIO) * masks.shape[1:]).astype(np.int64)
        return np.stack([np.roll(mask, tuple(turn), (0, 1)) for mask, turn in zip(masks, turns, strict=True)])
