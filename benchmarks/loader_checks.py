"""What a case's first batch must be before its speed counts.

Ours is compared, sample by sample, with Pillow's crop and torchvision's colours in the order drawn. Of the
baselines, whose random numbers are their own, shape, type, range and that rows and views differ is asked.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.loader_baselines import Task
from benchmarks.loader_cases import CHECKED, Shown, our_views
from fastpmae_loaders import Beton, View, draw_samples
from fastpmae_loaders.sampling import BLURRED, GRAY, JITTER, SIGMA, SOLARISED

FIRST_EPOCHS_SEED = 0


@dataclass(frozen=True)
class Evidence:
    """What leaves the process of a case for its check: form and figures of the batch, and its first samples."""

    shapes: tuple[tuple[int, ...], ...]
    types: tuple[str, ...]
    figures: tuple[tuple[float, float, float], ...]
    """Of each view: the smallest and the largest byte, and the mean."""
    samples: tuple[list[np.ndarray], ...]
    """Of each view the first images, [3, S, S]; of the ceiling one image [H, W, 3] for each."""
    index: list[int]
    epoch: int


def evidence(shown: Shown, case: str) -> Evidence:
    """The part of a batch that a check needs."""
    views = [view.cpu() for view in shown.views]
    rows = [view[None] if case == "decode-only" else view[:CHECKED] for view in views]
    return Evidence(
        tuple(tuple(view.shape) for view in views),
        tuple(str(view.dtype) for view in views),
        tuple((float(view.min()), float(view.max()), float(view.float().mean())) for view in views),
        tuple([row.numpy().copy() for row in part] for part in rows),
        [] if shown.index is None else shown.index[:CHECKED].tolist(),
        shown.epoch,
    )


@dataclass(frozen=True)
class Tolerance:
    """How far ours may lie from the reference, in bytes: the farthest and the mean distance, of crops and of colours.

    Colours multiply a crop's rounding, so for them the farthest is that of 999 in 1000 bytes.
    """

    farthest: float
    mean: float
    colour_farthest: float
    colour_mean: float


EXACT = Tolerance(2, 0.25, 6, 0.75)
OTHER_DECODER = Tolerance(80, 3.0, 100, 6.0)
"""DALI's decoder upsamples colours otherwise, and its hue is linear."""

FAST_DCT = 2.0
"""How far libjpeg-turbo's fast DCT lies from Pillow's accurate one on average, at most."""


def check(task: Task, found: Evidence) -> str:
    """What is wrong with a case's first batch; nothing where it passes."""
    if task.case == "decode-only":
        return _check_decoded(task, found)
    wrong = _check_form(task, found)
    if not wrong and task.case.startswith("ours"):
        return _check_ours(task, found)
    return wrong


def _check_form(task: Task, found: Evidence) -> str:
    expected = (task.batch, 3, task.side, task.side)
    if found.shapes != (expected, expected):
        return f"the views are {found.shapes}, not two of {expected}"
    if found.types != ("torch.uint8", "torch.uint8"):
        return f"the views are {found.types}, not uint8"
    for low, high, mean in found.figures:
        if low > 30 or high < 225 or not 40 < mean < 215:
            return f"a view's bytes lie between {low:.0f} and {high:.0f}, mean {mean:.1f}: no photographs"
    simple, complex = found.samples
    if any(np.array_equal(a, b) for a, b in zip(simple, complex, strict=True)):
        return "the two views of a sample are the same"
    if any(np.array_equal(a, b) for a, b in pairwise(simple)):
        return "two samples are the same"
    return ""


def _check_decoded(task: Task, found: Evidence) -> str:
    beton = Beton(task.beton)
    for index, (image,) in zip(found.index, found.samples, strict=True):
        expected = beton.decode(index)
        if image.shape != expected.shape:
            return f"sample {index} is {image.shape}, not {expected.shape}"
        mean = float(np.abs(image.astype(int) - expected).mean())
        if mean > FAST_DCT:
            return f"sample {index} lies {mean:.2f} from Pillow's on average"
    return "" if found.index else "no image was decoded"


def _check_ours(task: Task, found: Evidence) -> str:
    beton = Beton(task.beton)
    index = np.array(found.index)
    if len(index) < min(CHECKED, task.batch):
        return "the batch does not say which samples it shows"
    views = our_views(task.side, "geometry" not in task.case)
    draws = draw_samples(FIRST_EPOCHS_SEED, found.epoch, index, beton.height[index], beton.width[index], views)
    allowed = OTHER_DECODER if task.case == "ours-dali" else EXACT
    for row, sample in enumerate(found.index):
        pixels = beton.decode(sample)
        for number, view in enumerate(views):
            expected = reference_view(
                pixels, view, draws.boxes[row, number], bool(draws.flips[row, number]),
                draws.factors[row, number], draws.choices[row, number],
            )  # fmt: skip
            apart = np.abs(found.samples[number][row].astype(int) - expected)
            farthest, mean = float(apart.max()), float(apart.mean())
            limits = allowed.farthest, allowed.mean
            if view.coloured:
                farthest = float(np.quantile(apart, 0.999))
                limits = allowed.colour_farthest, allowed.colour_mean
            if farthest > limits[0] or mean > limits[1]:
                return f"view {number} of sample {sample} lies {farthest:.0f} from the reference, {mean:.2f} on average"
    return ""


def reference_view(
    pixels: np.ndarray, view: View, box: np.ndarray, flip: bool, factors: np.ndarray, choices: np.ndarray
) -> np.ndarray:
    """One view by Pillow and torchvision, int [3, S, S], from decoded pixels and one sample's row of the draws."""
    from torchvision.transforms.v2 import functional as F

    top, left, height, width = (int(number) for number in box)
    crop = Image.fromarray(pixels[top : top + height, left : left + width])
    small = crop.resize((view.size, view.size), Image.Resampling.BICUBIC)
    if flip:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()
    if view.coloured:
        names = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        operations = [partial(_with, name, float(factor)) for name, factor in zip(names, factors, strict=False)]
        for which in choices[:JITTER] if choices[JITTER] else ():
            image = operations[which](image)
        if choices[GRAY]:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        if choices[BLURRED]:
            image = F.gaussian_blur(image, [23, 23], [float(factors[SIGMA])] * 2)
        if choices[SOLARISED]:
            image = F.solarize(image, float(view.solarise_threshold))
    return image.numpy().astype(int)


def _with(operation, factor: float, image: Tensor) -> Tensor:
    return operation(image, factor)
