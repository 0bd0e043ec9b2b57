"""Everything random about a sample, as a pure function of (seed, epoch, sample index).

Each purpose has counters of its own, so that one more draw for one purpose shifts no other: a change of
the jitter leaves every mask as it was.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.jit.compiled import helper, kernel
from fastpmae_loaders.jit.elementary import exponential, round_half_even
from fastpmae_loaders.jit.philox import fill_uniforms, uniform_pair, words
from fastpmae_loaders.recipes import View, recipes_of
from fastpmae_loaders.settings import ViewSettings
from fastpmae_loaders.values import typed

# of one view: its purposes are 16 apart from the next view's
CROP: Final = 0
FLIP: Final = 1
JITTER_COIN: Final = 2
JITTER_FACTORS: Final = 3
JITTER_ORDER: Final = 4
GRAYSCALE: Final = 5
RECIPE_COIN: Final = 6
BLUR: Final = 7
SOLARISE: Final = 8
# of a sample, or of an epoch
MASK: Final = 10
EPOCH_ORDER: Final = 11
PAGE_ORDER: Final = 12
# views begin here, 16 purposes each
VIEWS: Final = 16
# purposes of callers start here and so never meet those above
CALLERS: Final = 1 << 16

# columns of `SampleDraws.choices`
ORDER: Final = 0  # four columns: which of brightness, contrast, saturation, hue comes first, second, ...
JITTER: Final = 4
GRAY: Final = 5
BLURRED: Final = 6
SOLARISED: Final = 7
FIRST_RECIPE: Final = 8
CHOICES: Final = 9
# columns of `SampleDraws.factors`: brightness, contrast, saturation, hue, and
SIGMA: Final = 4
FACTORS: Final = 5


class SampleDraws(NamedTuple):
    """What is drawn for B samples of n views each.

    boxes: int32 [B, n, 4], top, left, height, width of each view's crop in source pixels.
    flips: bool [B, n].
    factors: float64 [B, n, 5], brightness, contrast, saturation, hue, blur sigma (drawn even where unused).
    choices: uint8 [B, n, 9], the order of the four jitters, then coins: jitter, grayscale, blur, solarise, and
        whether the first of the view's two recipes is used.
    order: int64 [B, N], a permutation of the patches: the first V are visible, the rest are the folds. Without
        masks N is 0.
    """

    boxes: np.ndarray
    flips: np.ndarray
    factors: np.ndarray
    choices: np.ndarray
    order: np.ndarray


@helper
def draw_crop(seed, epoch, index, purpose, height, width, area_range, log_ratio, box):
    """One crop as torchvision's RandomResizedCrop.get_params draws it: ten tries, then the central fallback."""
    area = np.float64(height) * np.float64(width)
    for attempt in range(10):
        share, shape = uniform_pair(seed, epoch, index, purpose, 2 * attempt)
        wanted = area * (area_range[0] + share * (area_range[1] - area_range[0]))
        aspect = exponential(log_ratio[0] + shape * (log_ratio[1] - log_ratio[0]))
        w = round_half_even(np.sqrt(wanted * aspect))
        h = round_half_even(np.sqrt(wanted / aspect))
        if 0 < w <= width and 0 < h <= height:
            down, across = uniform_pair(seed, epoch, index, purpose, 2 * attempt + 1)
            box[0] = np.int64(down * (height - h + 1))
            box[1] = np.int64(across * (width - w + 1))
            box[2] = h
            box[3] = w
            return
    narrowest = exponential(log_ratio[0])
    widest = exponential(log_ratio[1])
    h = height
    w = width
    if width / height < narrowest:
        h = round_half_even(width / narrowest)
    elif width / height > widest:
        w = round_half_even(height * widest)
    box[0] = (height - h) // 2
    box[1] = (width - w) // 2
    box[2] = h
    box[3] = w


@helper
def draw_permutation(seed, epoch, index, purpose, out):
    """Fisher-Yates over a sample's patches; below 2^16 of them the bias is under 2^-16 of a chance."""
    count = out.shape[0]
    for i in range(count):
        out[i] = i
    drawn = words(seed, epoch, index, purpose, 0)
    for step in range(count - 1):
        if step % 4 == 0 and step:
            drawn = words(seed, epoch, index, purpose, step // 4)
        left = count - step
        j = step + np.int64((drawn[step % 4] * np.uint64(left)) >> np.uint64(32))
        out[step], out[j] = out[j], out[step]


@helper
def _between(u, strength):
    low = max(0.0, 1.0 - strength)
    return low + u * (1.0 + strength - low)


@helper
def draw_view(seed, epoch, index, view, height, width, recipe, box, flips, factors, choices):
    """Draw one view of one sample into its rows (see SampleDraws)."""
    first = VIEWS + 16 * recipe.crop_key
    if recipe.shorter > 0:
        box[0] = 0
        box[1] = 0
        box[2] = height
        box[3] = width
    else:
        scale = (recipe.low, recipe.high)
        log_ratio = (recipe.log_ratio_low, recipe.log_ratio_high)
        draw_crop(seed, epoch, index, first + CROP, height, width, scale, log_ratio, box)
    u, v = uniform_pair(seed, epoch, index, first + FLIP, 0)
    flips[view] = u < recipe.flip

    first = VIEWS + 16 * recipe.colour_key
    u, v = uniform_pair(seed, epoch, index, first + JITTER_COIN, 0)
    choices[JITTER] = u < recipe.jitter
    u, v = uniform_pair(seed, epoch, index, first + JITTER_FACTORS, 0)
    factors[0] = _between(u, recipe.brightness)
    factors[1] = _between(v, recipe.contrast)
    u, v = uniform_pair(seed, epoch, index, first + JITTER_FACTORS, 1)
    factors[2] = _between(u, recipe.saturation)
    factors[3] = recipe.hue * (2.0 * v - 1.0)
    draw_permutation(seed, epoch, index, first + JITTER_ORDER, choices[ORDER : ORDER + 4])

    u, v = uniform_pair(seed, epoch, index, first + GRAYSCALE, 0)
    choices[GRAY] = u < recipe.grayscale
    u, v = uniform_pair(seed, epoch, index, first + RECIPE_COIN, 0)
    by_first = u < recipe.first_share
    choices[FIRST_RECIPE] = by_first
    u, v = uniform_pair(seed, epoch, index, first + BLUR, 0)
    choices[BLURRED] = u < (recipe.first_blur if by_first else recipe.second_blur)
    factors[SIGMA] = recipe.sigma_low + v * (recipe.sigma_high - recipe.sigma_low)
    u, v = uniform_pair(seed, epoch, index, first + SOLARISE, 0)
    choices[SOLARISED] = u < (recipe.first_solarise if by_first else recipe.second_solarise)


@helper
def draw_sample(seed, epoch, index, height, width, recipes, boxes, flips, factors, choices, order):
    """Draw what is random about one sample into the rows given (see SampleDraws)."""
    for view in range(recipes.shape[0]):
        draw_view(
            seed, epoch, index, view, height, width, recipes[view], boxes[view], flips, factors[view], choices[view]
        )
    draw_permutation(seed, epoch, index, MASK, order)


@kernel
def _draw_samples(seed, epoch, index, height, width, recipes, boxes, flips, factors, choices, order):
    for i in range(index.shape[0]):
        draw_sample(
            seed, epoch, index[i], height[i], width[i], recipes, boxes[i], flips[i], factors[i], choices[i], order[i]
        )


def draw_samples(
    seed: int,
    epoch: int,
    index: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    settings: ViewSettings | Sequence[View],
    patches: int = 0,
) -> SampleDraws:
    """The draws of samples `index` [B] whose images are `height` by `width` pixels ([B] each).

    `settings` are those of the pair and its masks, or a list of views; then `patches` are those of the masks.
    """
    check_key(seed, epoch)
    if isinstance(settings, ViewSettings):
        recipes, patches = recipes_of(settings.views), settings.patches
    else:
        recipes = recipes_of(settings)
    count = len(index)
    draws = SampleDraws(
        np.zeros((count, len(recipes), 4), np.int32),
        np.zeros((count, len(recipes)), np.bool_),
        np.zeros((count, len(recipes), FACTORS), np.float64),
        np.zeros((count, len(recipes), CHOICES), np.uint8),
        np.zeros((count, patches), np.int64),
    )
    _draw_samples(
        seed,
        epoch,
        np.ascontiguousarray(index, np.int64),
        np.ascontiguousarray(height, np.int64),
        np.ascontiguousarray(width, np.int64),
        recipes,
        *draws,
    )
    return draws


def check_key(seed: int, epoch: int) -> None:
    """Refuse seeds and epochs that do not fit the generator's key and counter."""
    typed(seed, int, "seed", strict=True)
    typed(epoch, int, "epoch", strict=True)
    if not 0 <= seed < 2**63:
        raise UserError(f"seed {seed} must be between 0 and 2^63 - 1")
    if not 0 <= epoch < 2**32:
        raise UserError(f"epoch {epoch} must be between 0 and 2^32 - 1")


def uniforms(seed: int, epoch: int, index: np.ndarray, purpose: int, count: int) -> np.ndarray:
    """Random numbers of the caller's own for samples `index` [B]: float32 [B, count] in [0, 1).

    `purpose` (0 to 2^31 - 1) keeps two uses apart; the views' and the masks' own draws are never touched.
    """
    check_key(seed, epoch)
    if not 0 <= purpose < 2**31:
        raise UserError(f"purpose {purpose} must be between 0 and 2^31 - 1")
    out = np.empty((len(index), count), np.float32)
    fill_uniforms(seed, epoch, np.ascontiguousarray(index, np.int64), CALLERS + purpose, out)
    return out
