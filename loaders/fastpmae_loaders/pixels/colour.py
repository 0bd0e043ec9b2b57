"""A view's colour operations on planar uint8 [3, H, W], in place.

Each follows torchvision's uint8-tensor operation of the same name and rounds to bytes where that one does.
Floats are added and multiplied in a fixed order without contraction, sums over an image are integers, so
every machine gives the same bits.
"""

from typing import Final

import numpy as np

from fastpmae_loaders.jit import floats as f
from fastpmae_loaders.jit import memory
from fastpmae_loaders.jit.compiled import helper, kernel
from fastpmae_loaders.jit.elementary import exponential
from fastpmae_loaders.jit.vectors import WEIGHT_BITS
from fastpmae_loaders.pixels.separable import weigh
from fastpmae_loaders.sampling import BLURRED, GRAY, JITTER, ORDER, SIGMA, SOLARISED

ONE = 1 << WEIGHT_BITS
RADIUS = 11
"""The blur has 23 taps."""
_ZERO = np.float32(0)
_TOP = np.float32(255)

# the four jitters as ORDER numbers them
BRIGHTNESS: Final = 0
CONTRAST: Final = 1
SATURATION: Final = 2
HUE: Final = 3


@helper
def change_colours(image, factors, choices, threshold, scratch):
    """DINO's order: jitter, grayscale, blur, solarise, each where its coin fell so (see SampleDraws)."""
    turns = np.int64(0)
    for turn in range(4):
        turns |= np.int64(choices[ORDER + turn]) << (2 * turn)
    count = 4 * np.int64(choices[JITTER])
    grey = np.int64(choices[GRAY])
    if count or grey:
        jitter(image, turns, count, (factors[0], factors[1], factors[2], factors[3]), grey)
    if choices[BLURRED]:
        blur(image, factors[SIGMA], scratch)
    if choices[SOLARISED]:
        solarise(image, threshold)


@helper
def _rounded(x):
    return f.whole(f.smaller(f.larger(f.spread(_ZERO), x), f.spread(_TOP)))


@helper
def _cut(x):
    """The same of what is never below 0."""
    return f.whole(f.smaller(x, f.spread(_TOP)))


@helper
def _luma(r, g, b):
    red = r * f.spread(np.float32(0.2989))
    green = g * f.spread(np.float32(0.587))
    return f.whole((red + green) + b * f.spread(np.float32(0.114)))


@helper
def _ramp(k):
    """How far a channel lies below the largest at hue distance k (in sixths of the circle): 0 to 1."""
    beyond = k - f.spread(np.float32(6))
    k = f.where_negative(beyond, k, beyond)
    low = f.smaller(k, f.spread(np.float32(4)) - k)
    return f.smaller(f.larger(f.spread(_ZERO), low), f.spread(np.float32(1)))


@helper
def _turn_hue(r, g, b, turn):
    zero, one, six = f.spread(_ZERO), f.spread(np.float32(1)), f.spread(np.float32(6))
    # so little above 1 that no byte can pass 255
    scale = f.spread(np.float32(255.999 / 255.0))
    high = f.larger(f.larger(r, g), b)
    low = f.smaller(f.smaller(r, g), b)
    spread = high - low
    part = one / f.where_equal(spread, zero, one, spread)
    from_red = (g - b) * part
    from_green = (b - r) * part + f.spread(np.float32(2))
    from_blue = (r - g) * part + f.spread(np.float32(4))
    h = f.where_equal(high, g, from_green, from_blue)
    h = f.where_equal(high, r, from_red, h)
    h = f.where_negative(h, h + six, h)
    h = h + turn
    beyond = h - six
    h = f.where_negative(beyond, h, beyond)
    r = f.whole((high - spread * _ramp(h + f.spread(np.float32(5)))) * scale)
    g = f.whole((high - spread * _ramp(h + f.spread(np.float32(3)))) * scale)
    b = f.whole((high - spread * _ramp(h + one)) * scale)
    return r, g, b


@kernel(error_model="numpy")
def _sweep(image, turns, start, stop, factors, mean, grey, counting):
    """One pass over the image: operations `start` to `stop` of `turns`, then grey if asked for.

    `turns` holds two bits an operation, the first lowest; `factors` are those of the four operations. `mean` is the
    mean luma that the contrast needs. Returns the sum of the luma after all that where `counting`, otherwise 0.
    """
    pixels = image.shape[1] * image.shape[2]
    brightness, contrast, saturation, hue = factors
    # a positive turn: 0 <= turn < 6
    turn = f.spread(np.float32((hue - np.floor(hue)) * 6.0))
    bright = f.spread(np.float32(brightness))
    contrasted = f.spread(np.float32(contrast))
    flat = f.spread(np.float32(mean) * np.float32(1.0 - contrast))
    saturated = f.spread(np.float32(saturation))
    grey_share = f.spread(np.float32(1.0 - saturation))
    counts = f.no_counts()
    begin, room = np.int64(image.ctypes.data), f.room()
    for i in range(0, pixels, f.LANES):
        at, plane = begin + i, np.int64(pixels)
        left = pixels - i
        if left < f.LANES:
            # the last few are worked on apart, beside zeros
            for channel in range(3):
                memory.copy_bytes(room + channel * f.LANES, at + channel * plane, left)
            at, plane = room, np.int64(f.LANES)
        r, g, b = f.load(at), f.load(at + plane), f.load(at + 2 * plane)
        for place in range(start, stop):
            which = (turns >> (2 * place)) & 3
            if which == BRIGHTNESS:
                r, g, b = _cut(r * bright), _cut(g * bright), _cut(b * bright)
            elif which == CONTRAST:
                r = _rounded(r * contrasted + flat)
                g = _rounded(g * contrasted + flat)
                b = _rounded(b * contrasted + flat)
            elif which == SATURATION:
                shade = _luma(r, g, b) * grey_share
                r = _rounded(r * saturated + shade)
                g = _rounded(g * saturated + shade)
                b = _rounded(b * saturated + shade)
            else:
                r, g, b = _turn_hue(r, g, b, turn)
        if grey:
            r = g = b = _luma(r, g, b)
        if counting:
            counts = f.count(counts, _luma(r, g, b))
        if stop > start or grey:
            f.store(at, r)
            f.store(at + plane, g)
            f.store(at + 2 * plane, b)
            if left < f.LANES:
                for channel in range(3):
                    memory.copy_bytes(begin + i + channel * pixels, room + channel * f.LANES, left)
    return f.total(counts)


@kernel
def jitter(image, turns, count, factors, grey):
    """The first `count` operations of `turns` (two bits each, the first lowest), then grey if asked for.

    `factors` are those of brightness, contrast, saturation and hue. Each operation rounds to bytes, and yet the image
    is gone over once, or twice where a contrast is among them: it asks for the mean of all pixels.
    """
    first = 0
    while first < count and (turns >> (2 * first)) & 3 != CONTRAST:
        first += 1
    mean = 0.0
    begin = 0
    if first < count:
        luma = _sweep(image, turns, np.int64(0), first, factors, 0.0, np.int64(0), np.int64(1))
        mean = luma / (image.shape[1] * image.shape[2])
        begin = first
    _sweep(image, turns, begin, count, factors, mean, np.int64(grey), np.int64(0))


@kernel
def brightness(image, factor):
    """Multiply by `factor`."""
    jitter(image, np.int64(BRIGHTNESS), np.int64(1), (factor, 1.0, 1.0, 0.0), np.int64(0))


@kernel
def contrast(image, factor):
    """Blend with the image's mean luma."""
    jitter(image, np.int64(CONTRAST), np.int64(1), (1.0, factor, 1.0, 0.0), np.int64(0))


@kernel
def saturation(image, factor):
    """Blend each pixel with its luma."""
    jitter(image, np.int64(SATURATION), np.int64(1), (1.0, 1.0, factor, 0.0), np.int64(0))


@kernel
def hue(image, factor):
    """Turn the hue by `factor` (-0.5 to 0.5) of the circle."""
    jitter(image, np.int64(HUE), np.int64(1), (1.0, 1.0, 1.0, factor), np.int64(0))


@kernel
def grayscale(image):
    """Each pixel's luma in all three channels."""
    jitter(image, np.int64(0), np.int64(0), (1.0, 1.0, 1.0, 0.0), np.int64(1))


@kernel
def solarise(image, threshold):
    """Turn bytes of `threshold` and above upside down."""
    flat = image.reshape(-1)
    bound = np.uint8(threshold)
    for i in range(flat.shape[0]):
        flat[i] = ~flat[i] if flat[i] >= bound else flat[i]


@kernel
def fill_taps(sigma, taps):
    """Weights of a 23-tap Gaussian in fixed point: taps[0] the middle's, taps[k] those k pixels away.

    taps is int16 [12, 2], each weight twice, the middle's once beside a zero. Returns the farthest k whose
    weight is not 0: a narrow blur looks no farther than it reaches.
    """
    total = 1.0
    for k in range(1, RADIUS + 1):
        total += 2.0 * exponential(max(-k * k / (2.0 * sigma * sigma), -600.0))
    reach = 0
    left = ONE
    for k in range(1, RADIUS + 1):
        share = exponential(max(-k * k / (2.0 * sigma * sigma), -600.0)) / total
        weight = np.int64(np.floor(share * ONE + 0.5))
        taps[k, 0] = weight
        taps[k, 1] = weight
        left -= 2 * weight
        if weight:
            reach = k
    taps[0, 0] = left
    taps[0, 1] = 0
    return reach


@helper
def _mirror(i, size):
    """The place that a place beyond the edge shows, the edge itself not repeated."""
    if size == 1:
        return 0
    while i < 0 or i >= size:
        i = -i if i < 0 else 2 * (size - 1) - i
    return i


@helper
def _fill_blur(taps, reach, side, first, weights):
    """The blur as tables of `resize.weigh`, the edges mirrored within them. Returns the pairs of weights."""
    pairs = min(reach + 1, (side + 1) // 2)
    for x in range(side):
        begin = min(max(x - reach, 0) // 2 * 2, (side + 1) // 2 * 2 - 2 * pairs)
        first[x] = begin
        at = 2 * pairs * x
        if x - 2 - reach >= 0 and x + reach < side and begin == first[x - 2] + 2:
            # amid the image two columns on is the same again
            for k in range(2 * pairs):
                weights[at + k] = weights[at - 4 * pairs + k]
        else:
            for k in range(2 * pairs):
                weights[at + k] = 0
            for k in range(-reach, reach + 1):
                weights[at + _mirror(x + k, side) - begin] += taps[abs(k), 0]
    return pairs


@kernel
def blur(image, sigma, scratch):
    """Gaussian blur of 23 taps, width `sigma` pixels, edges mirrored; rows first, then columns.

    `image` is uint8 [3, side, side], and `scratch` a Scratch for this side.
    """
    side = image.shape[1]
    reach = fill_taps(sigma, scratch.taps)
    if reach == 0:
        return
    pairs = _fill_blur(scratch.taps, reach, side, scratch.first_x, scratch.weights_x)
    tables = (scratch.first_x, scratch.weights_x, pairs, scratch.first_x, scratch.weights_x, pairs)
    start, plane = np.int64(image.ctypes.data), side * side
    weigh(start, side, plane, start + 3 * plane, np.int64(0), side, side, tables, image, scratch)
