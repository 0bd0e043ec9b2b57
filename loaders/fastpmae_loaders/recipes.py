"""How one view of an image is made: a frozen dataclass, the recipes of the field, and the numbers numba reads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.values import Typed, checked

RECIPE = np.dtype(
    [
        ("side", "i8"),
        ("shorter", "i8"),
        ("bilinear", "i8"),
        ("crop_key", "i8"),
        ("colour_key", "i8"),
        ("low", "f8"),
        ("high", "f8"),
        ("log_ratio_low", "f8"),
        ("log_ratio_high", "f8"),
        ("flip", "f8"),
        ("brightness", "f8"),
        ("contrast", "f8"),
        ("saturation", "f8"),
        ("hue", "f8"),
        ("jitter", "f8"),
        ("grayscale", "f8"),
        ("first_share", "f8"),
        ("first_blur", "f8"),
        ("first_solarise", "f8"),
        ("second_blur", "f8"),
        ("second_solarise", "f8"),
        ("sigma_low", "f8"),
        ("sigma_high", "f8"),
        ("solarise_threshold", "i8"),
    ]
)
"""A View as compiled code reads it."""

MOST_VIEWS = 64

Interpolation = Literal["bicubic", "bilinear"]


@dataclass(frozen=True)
class View(Typed):
    """One view of an image: a random crop, a flip, and colours; or, with `shorter`, the view of an evaluation.

    Attributes:
        size: side of the view, pixels.
        scale: smallest and largest share of the image's area in the crop.
        ratio: smallest and largest aspect ratio (width / height) of the crop.
        flip: probability of a left-right flip.
        jitter: largest change of brightness, contrast, saturation and hue; jitter_probability: how often.
        grayscale_probability: how often all colour goes.
        sigma: smallest and largest width of the blur, pixels.
        blur, solarise: their probabilities under the first and under the second of two recipes, between which
            each sample's coin chooses: `first_share` is the first one's probability.
        solarise_threshold: pixels from it on are inverted.
        shorter: 0, or the length that the image's shorter side is resized to before its centre is cut out:
            then nothing is random about the view but what the other attributes say.
        interpolation: "bicubic" (within 2 of 255 of Pillow's), or "bilinear" (Pillow's to the bit, except with engine
            "dali"); both antialiased.
        crop_of: the number of an earlier view of the list whose crop and flip this one shows too, at its own size and
            with its own colours; its scale, ratio and flip are then that view's. -1: a crop of its own. DINOv3's gram
            crops of the first global crop are `View(512, crop_of=0)`, without colours.
        colours_of: likewise the number of an earlier view whose draws of colours are this one's, with all that they
            are drawn from: `View(112, crop_of=0, colours_of=0)` is a tokenizer's smaller copy of the first view. They
            are applied at this view's own size.

    Raises:
        UserError: for numbers that make no view.
    """

    OF = "view: "
    size: int = 224
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_probability: float = 0.0
    grayscale_probability: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    blur: tuple[float, float] = (0.0, 0.0)
    solarise: tuple[float, float] = (0.0, 0.0)
    first_share: float = 1.0
    solarise_threshold: int = 128
    shorter: int = 0
    interpolation: Interpolation = "bicubic"
    crop_of: int = -1
    colours_of: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()

        def refuse(name: str, must: str) -> None:
            raise UserError(f"view: {name} = {getattr(self, name)!r} must be {must}")

        if not 2 <= self.size <= 4096:
            refuse("size", "between 2 and 4096 pixels")
        if not (self.shorter == 0 or self.size <= self.shorter <= 8 * 4096):
            refuse("shorter", f"0, or at least the view's {self.size} pixels and at most {8 * 4096}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            refuse("scale", "two shares of the image's area, 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            refuse("ratio", "two positive numbers, the smaller first")
        for name in ("flip", "jitter_probability", "grayscale_probability", "first_share"):
            if not 0 <= getattr(self, name) <= 1:
                refuse(name, "a probability between 0 and 1")
        for name in ("blur", "solarise"):
            if len(getattr(self, name)) != 2 or not all(0 <= p <= 1 for p in getattr(self, name)):
                refuse(name, "two probabilities between 0 and 1")
        if len(self.jitter) != 4 or not all(0 <= v <= 1 for v in self.jitter) or self.jitter[3] > 0.5:
            refuse("jitter", "four numbers between 0 and 1, the last (hue) at most 0.5")
        if not 0.05 <= self.sigma[0] <= self.sigma[1] <= 5:
            refuse("sigma", "two widths between 0.05 and 5 pixels, the smaller first")
        if not 0 <= self.solarise_threshold <= 255:
            refuse("solarise_threshold", "a pixel value between 0 and 255")
        if self.crop_of >= 0 and self.shorter:
            refuse("crop_of", "-1 in a view that shows an image's centre (shorter)")

    @property
    def coloured(self) -> bool:
        """Whether any sample's colours change."""
        return max(self.jitter_probability, self.grayscale_probability, *self.blur, *self.solarise) > 0


@checked
def mae_view(
    size: int = 224, scale: tuple[float, float] = (0.2, 1.0), interpolation: Interpolation = "bicubic"
) -> View:
    """MAE's: crop and flip (the simple view). SimMIM's is of scale (0.67, 1) and bilinear."""
    return View(size, scale, interpolation=interpolation)


@checked
def dino_global(
    which: Literal["coin", "t1", "t2"] = "coin",
    size: int = 224,
    scale: tuple[float, float] = (0.14, 1.0),
    interpolation: Interpolation = "bicubic",
    blur: Literal["paper", "code"] = "paper",
) -> View:
    """DINO's global crops: "t1" (always blurred), "t2" (seldom blurred, sometimes solarised), or either by a coin.

    DINO itself takes scale (0.4, 1) beside local crops; 0.14 is what its help advises without them.

    Args:
        blur: "paper", as DINO's and iBOT's code has it and the papers of DINOv2 and DINOv3 say; or "code", as the
            released code of those two runs: its GaussianBlur(p) leaves a share p of the crops alone (dinov2 and dinov3,
            data/transforms.py), so that "t1" is never blurred and "t2" nine times in ten. Local crops are the same.

    Raises:
        UserError: for another `which` or `blur`.
    """
    shares = {"coin": 0.5, "t1": 1.0, "t2": 0.0}
    blurs = {"paper": (1.0, 0.1), "code": (0.0, 0.9)}
    return View(
        size,
        scale,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_probability=0.8,
        grayscale_probability=0.2,
        blur=blurs[blur],
        solarise=(0.0, 0.2),
        first_share=shares[which],
        interpolation=interpolation,
    )


@checked
def dino_local(
    size: int = 96, scale: tuple[float, float] = (0.05, 0.4), interpolation: Interpolation = "bicubic"
) -> View:
    """DINO's local crops: small, as colourful as the global ones, every other one blurred."""
    return View(
        size,
        scale,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_probability=0.8,
        grayscale_probability=0.2,
        blur=(0.5, 0.5),
        interpolation=interpolation,
    )


@checked
def plain_view(size: int = 224, crop_ratio: float = 0.875, interpolation: Interpolation = "bicubic") -> View:
    """Evaluation's: the shorter side resized to `resized_side`, then the centre. Nothing is random.

    Raises:
        UserError: for a crop_ratio outside 0.1 ... 1.
    """
    if not 0.1 <= crop_ratio <= 1:
        raise UserError(f"crop_ratio = {crop_ratio} must be between 0.1 and 1")
    return View(size, flip=0.0, shorter=resized_side(size, crop_ratio), interpolation=interpolation)


def resized_side(size: int, crop_ratio: float) -> int:
    """The shorter side before the centre of `size` pixels is cut out: size / crop_ratio, rounded down.

    So have it timm's validation (transforms_imagenet_eval), MAE's and DeiT's; a pixel more moves every edge.
    """
    return math.floor(size / crop_ratio)


_CROP = ("scale", "ratio", "flip")
_COLOURS = (
    "jitter", "jitter_probability", "grayscale_probability", "sigma", "blur", "solarise", "first_share",
    "solarise_threshold",
)  # fmt: skip


def with_shared(views: Sequence[View]) -> tuple[View, ...]:
    """The views, with the settings of those whose crops and colours they share.

    Raises:
        UserError: where a view shares those of one that does not stand before it, or a crop that is none.
    """
    found: list[View] = []
    for number, view in enumerate(views):
        changes = {}
        for attribute, names in (("crop_of", _CROP), ("colours_of", _COLOURS)):
            other = getattr(view, attribute)
            if not -1 <= other < number or (attribute == "crop_of" and other >= 0 and found[other].shorter):
                raise UserError(
                    f"view {number}: {attribute} = {other} must be -1 or the number of an earlier view, counted from 0"
                    + (", that is a crop" if attribute == "crop_of" else "")
                )
            if other >= 0:
                changes |= {name: getattr(found[other], name) for name in names}
        found.append(replace(view, **changes) if changes else view)
    return tuple(found)


def recipes_of(views: Sequence[View]) -> np.ndarray:
    """The views as compiled code takes them: RECIPE [n]."""
    out = np.zeros(len(views), RECIPE)
    for number, (row, view) in enumerate(zip(out, with_shared(views), strict=True)):
        # a view draws its crop and its colours as the view of this number
        row["crop_key"] = number if view.crop_of < 0 else out[view.crop_of]["crop_key"]
        row["colour_key"] = number if view.colours_of < 0 else out[view.colours_of]["colour_key"]
        row["side"], row["shorter"], row["bilinear"] = view.size, view.shorter, view.interpolation == "bilinear"
        row["low"], row["high"] = view.scale
        # rounded, since maths libraries differ in the last bit of a logarithm
        row["log_ratio_low"], row["log_ratio_high"] = (round(math.log(limit), 12) for limit in view.ratio)
        row["flip"] = view.flip
        row["brightness"], row["contrast"], row["saturation"], row["hue"] = view.jitter
        row["jitter"], row["grayscale"] = view.jitter_probability, view.grayscale_probability
        row["first_share"] = view.first_share
        row["first_blur"], row["second_blur"] = view.blur
        row["first_solarise"], row["second_solarise"] = view.solarise
        row["sigma_low"], row["sigma_high"] = view.sigma
        row["solarise_threshold"] = view.solarise_threshold
    return out
