"""How one view of an image is made: a frozen dataclass, the recipes of the field, and the numbers numba reads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from .errors import UserError

RECIPE = np.dtype(
    [
        ("side", "i8"),
        ("shorter", "i8"),
        ("bilinear", "i8"),
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
class View:
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

    Raises:
        UserError: for numbers that make no view.
    """

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

    def __post_init__(self) -> None:
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
        if self.interpolation not in get_args(Interpolation):
            refuse("interpolation", f"one of {', '.join(get_args(Interpolation))}")

    @property
    def coloured(self) -> bool:
        """Whether any sample's colours change."""
        return max(self.jitter_probability, self.grayscale_probability, *self.blur, *self.solarise) > 0


def mae_view(
    size: int = 224, scale: tuple[float, float] = (0.2, 1.0), interpolation: Interpolation = "bicubic"
) -> View:
    """MAE's: crop and flip (the simple view). SimMIM's is of scale (0.67, 1) and bilinear."""
    return View(size, scale, interpolation=interpolation)


def dino_global(
    which: Literal["coin", "t1", "t2"] = "coin",
    size: int = 224,
    scale: tuple[float, float] = (0.14, 1.0),
    interpolation: Interpolation = "bicubic",
) -> View:
    """DINO's global crops: "t1" (always blurred), "t2" (seldom blurred, sometimes solarised), or either by a coin.

    DINO itself takes scale (0.4, 1) beside local crops; 0.14 is what its help advises without them.

    Raises:
        UserError: for another `which`.
    """
    shares = {"coin": 0.5, "t1": 1.0, "t2": 0.0}
    if which not in shares:
        raise UserError(f"view: which = {which!r} must be one of coin, t1, t2")
    return View(
        size,
        scale,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_probability=0.8,
        grayscale_probability=0.2,
        blur=(1.0, 0.1),
        solarise=(0.0, 0.2),
        first_share=shares[which],
        interpolation=interpolation,
    )


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


def plain_view(size: int = 224, crop_ratio: float = 0.875, interpolation: Interpolation = "bicubic") -> View:
    """Evaluation's: the shorter side resized to size / crop_ratio, then the centre. Nothing is random.

    Raises:
        UserError: for a crop_ratio outside 0.1 ... 1.
    """
    if not 0.1 <= crop_ratio <= 1:
        raise UserError(f"crop_ratio = {crop_ratio} must be between 0.1 and 1")
    return View(size, flip=0.0, shorter=round(size / crop_ratio), interpolation=interpolation)


def recipes_of(views: Sequence[View]) -> np.ndarray:
    """The views as compiled code takes them: RECIPE [n]."""
    out = np.zeros(len(views), RECIPE)
    for row, view in zip(out, views, strict=True):
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
