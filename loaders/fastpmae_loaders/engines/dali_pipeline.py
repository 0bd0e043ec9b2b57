"""The DALI graph: encoded bytes and a sample's draws in, all views of a sample out; one definition for CPU and GPU.

Nothing in it is random. Every number that is drawn for a sample is an input, and a step that a sample's coins leave
out is a branch that the sample does not enter. Importing this module needs DALI.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal

import numpy as np

from fastpmae_loaders.pixels.colour import RADIUS
from fastpmae_loaders.recipes import View
from fastpmae_loaders.sampling import BLURRED, GRAY, JITTER, ORDER, SIGMA, SOLARISED, SampleDraws

# untyped: the stubs that DALI carries leave half of what is used here out
fn: Any = import_module("nvidia.dali.fn")
math: Any = import_module("nvidia.dali.math")
types: Any = import_module("nvidia.dali.types")
pipeline_def: Any = import_module("nvidia.dali").pipeline_def

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = [0.2989, 0.587, 0.114]
FLOOR = 0.49995
"""What is taken off before DALI rounds to bytes, where the other engines cut the fraction off."""
BLENDS = 7
"""Places for a brightness, contrast, saturation or grayscale: three before the hue's turn, three after, the last."""


def _input(name: str, dtype: Any, ndim: int) -> Any:
    return fn.external_source(name=name, dtype=dtype, ndim=ndim)


@pipeline_def(enable_conditionals=True, exec_dynamic=True, prefetch_queue_depth=1)
def views_pipeline(
    views: Sequence[View], device: Literal["cpu", "gpu"], colours: bool, hw_decoder_load: float = 0.0
) -> tuple[Any, ...]:
    """All views, each uint8 [3, side, side], of samples fed by `data`, `raw`, `shape` and `view_inputs`.

    Build it with DALI's own arguments: batch_size (the most samples at once), num_threads, device_id (None for the
    CPU). With `colours` false the views are cropped, resized and mirrored only. A load between 0 and 1 asks for one
    more input on a GPU, `hardware`: whether a JPEG is for the decoder in hardware.
    """
    data = _input("data", types.UINT8, 1)
    shape = _input("shape", types.INT32, 1)
    if _input("raw", types.BOOL, 0):
        image = fn.reshape(data, shape=shape, layout="HWC")
        if device == "gpu":
            image = image.gpu()
    elif shares_decoders(device, hw_decoder_load):
        # by DALI's own share the first of a batch would go to the hardware, and a sample's pixels depend on its place
        if _input("hardware", types.BOOL, 0):
            image = _decoded(data, device, 1.0)
        else:
            image = _decoded(data, device, 0.0)
    else:
        image = _decoded(data, device, hw_decoder_load)
    outputs = []
    for number, view in enumerate(views):
        picture = image
        if not view.shorter:
            # cut out first: the resize of a region alone looks beyond its edges, which the other engines do not
            first, last = _input(f"first{number}", types.INT32, 1), _input(f"last{number}", types.INT32, 1)
            picture = fn.slice(image, start=first, end=last, axes=[0, 1])
        picture = fn.resize(
            picture,
            size=[view.size, view.size],
            roi_start=_input(f"start{number}", types.FLOAT, 1),
            roi_end=_input(f"end{number}", types.FLOAT, 1),
            interp_type=types.INTERP_LINEAR if view.interpolation == "bilinear" else types.INTERP_CUBIC,
            antialias=True,
        )
        if colours and view.coloured:
            picture = _coloured(picture, number, view.solarise_threshold)
        outputs.append(fn.transpose(picture, perm=[2, 0, 1]))
    return tuple(outputs)


def shares_decoders(device: str, hw_decoder_load: float) -> bool:
    """Whether some JPEGs are for the decoder in hardware and others are not."""
    return device == "gpu" and 0 < hw_decoder_load < 1


def _decoded(data: Any, device: str, hw_decoder_load: float) -> Any:
    return fn.decoders.image(
        data,
        device="mixed" if device == "gpu" else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        # nvJPEG's own way is faster, and not what every other decoder makes of half the colour channels
        jpeg_fancy_upsampling=True,
        hw_decoder_load=hw_decoder_load,
    )


def _coloured(picture: Any, number: int, threshold: int) -> Any:
    """DINO's order: the four jitters in the sample's own order, grayscale, blur, solarise."""
    for place in range(BLENDS):
        if place == 3:
            turn = _input(f"turn{number}", types.FLOAT, 0)
            if _input(f"turned{number}", types.BOOL, 0):
                picture = _turned(picture, turn)
        name = f"{number}_{place}"
        overall = _input(f"overall{name}", types.BOOL, 0)
        keep, rest = _input(f"keep{name}", types.FLOAT, 0), _input(f"rest{name}", types.FLOAT, 0)
        if _input(f"blended{name}", types.BOOL, 0):
            picture = _blended(picture, overall, keep, rest)
    sigma, window = _input(f"sigma{number}", types.FLOAT, 0), _input(f"window{number}", types.INT32, 0)
    if _input(f"blurred{number}", types.BOOL, 0):
        picture = fn.gaussian_blur(picture, sigma=sigma, window_size=window)
    if _input(f"solarised{number}", types.BOOL, 0):
        upside_down = [float(byte if byte < threshold else 255 - byte) for byte in range(256)]
        picture = fn.lookup_table(picture, keys=list(range(256)), values=upside_down, dtype=types.UINT8)
    return picture


def _blended(picture: Any, overall: Any, keep: Any, rest: Any) -> Any:
    """keep * picture + rest * luma, of each pixel, or its mean `overall`."""
    luma = fn.coord_transform(picture, M=LUMA, T=-FLOOR, dtype=types.UINT8)
    grey = fn.cast(luma, dtype=types.FLOAT)
    if overall:
        grey = fn.reductions.mean(grey, axes=[0, 1], keep_dims=True)
    return fn.cast(picture * keep + (grey * rest - FLOOR), dtype=types.UINT8)


def _turned(picture: Any, turn: Any) -> Any:
    """The hue turned by `turn` sixths of the circle (-3 to 3), as HSV has it.

    All in multiples of the spread between the largest and the smallest channel, so that nothing is divided: a
    channel is at its largest within one spread of its primary hue (red 0, green 2, blue 4), at its smallest from two
    on, and falls in between.
    """
    # torchvision's bytes are 255.999 times a number up to 1
    scaled = picture * (255.999 / 255)
    red, green, blue = scaled[:, :, 0:1], scaled[:, :, 1:2], scaled[:, :, 2:3]
    high = math.max(math.max(red, green), blue)
    low = math.min(math.min(red, green), blue)
    spread = high - low
    from_green = blue - red + 2.0 * spread
    from_blue = red - green + 4.0 * spread
    hue = from_blue + (green == high) * (from_green - from_blue)
    hue = hue + (red == high) * (green - blue - hue) + turn * spread
    primaries = types.Constant(np.array([[[0, 2, 4]]], np.float32), device="cpu")
    away = math.abs(hue - primaries * spread)
    away = math.min(away, math.abs(6.0 * spread - away))
    return fn.cast(math.clamp(high + spread - FLOOR - away, low - FLOOR, high - FLOOR), dtype=types.UINT8)


def view_inputs(
    views: Sequence[View], draws: SampleDraws, height: np.ndarray, width: np.ndarray, colours: bool
) -> dict[str, np.ndarray]:
    """The inputs that tell what becomes of B images of `height` by `width` pixels ([B] each): plain arrays [B, ...]."""
    found: dict[str, np.ndarray] = {}
    for number, view in enumerate(views):
        box = draws.boxes[:, number].astype(np.int32)
        if view.shorter:
            start, end = _middle(view, height, width)
        else:
            found[f"first{number}"], found[f"last{number}"] = box[:, :2], box[:, :2] + box[:, 2:]
            start, end = np.zeros((len(box), 2)), box[:, 2:].astype(np.float64)
        # a region whose end comes before its start is mirrored
        flipped = draws.flips[:, number]
        start[flipped, 1], end[flipped, 1] = end[flipped, 1], start[flipped, 1]
        found[f"start{number}"], found[f"end{number}"] = start.astype(np.float32), end.astype(np.float32)
        if colours and view.coloured:
            found |= _colour_inputs(number, draws.factors[:, number], draws.choices[:, number])
    return {name: np.ascontiguousarray(values) for name, values in found.items()}


def _middle(view: View, height: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where, in source pixels, the middle of the image lies whose shorter side is resized to `view.shorter`."""
    size = np.stack([height, width], 1).astype(np.int64)
    whole = np.maximum(view.shorter, view.shorter * size // size[:, ::-1])
    first, odd = np.divmod(whole - view.size, 2)
    # half a pixel goes to the even side, as Python rounds
    first += odd * (first % 2)
    scale = size / whole
    return first * scale, (first + view.size) * scale


def _colour_inputs(number: int, factors: np.ndarray, choices: np.ndarray) -> dict[str, np.ndarray]:
    count = len(factors)
    jitter = choices[:, JITTER] > 0
    overall, blended = np.zeros((2, BLENDS, count), np.bool_)
    keep, rest = np.zeros((2, BLENDS, count), np.float32)
    order = choices[:, ORDER : ORDER + 4]
    hue_at = (order == HUE).argmax(1)
    rows = np.arange(count)
    for turn in range(4):
        which = order[:, turn]
        place = np.where(turn < hue_at, turn, turn + 2)
        row = rows[which != HUE]
        place, which = place[row], which[row]
        factor = factors[row, which]
        blended[place, row] = jitter[row]
        overall[place, row] = which != SATURATION
        keep[place, row] = factor
        rest[place, row] = np.where(which == BRIGHTNESS, 0.0, 1.0 - factor)
    # a grayscale is a saturation of 0
    blended[-1] = choices[:, GRAY] > 0
    rest[-1] = 1
    found = {
        f"turned{number}": jitter,
        f"turn{number}": (factors[:, HUE] * 6).astype(np.float32),
        f"blurred{number}": choices[:, BLURRED] > 0,
        f"sigma{number}": factors[:, SIGMA].astype(np.float32),
        f"window{number}": 2 * np.clip(np.ceil(3 * factors[:, SIGMA]), 1, RADIUS).astype(np.int32) + 1,
        f"solarised{number}": choices[:, SOLARISED] > 0,
    }
    for place in range(BLENDS):
        found[f"overall{number}_{place}"] = overall[place]
        found[f"blended{number}_{place}"] = blended[place]
        found[f"keep{number}_{place}"] = keep[place]
        found[f"rest{number}_{place}"] = rest[place]
    return found
