"""The complex view's colour operations on planar uint8 [3, H, W], in place.

Each follows torchvision's uint8-tensor operation of the same name and rounds to bytes where that one does.
Floats are added and multiplied in a fixed order without contraction, sums over an image are integers, so
every machine gives the same bits.
"""

import numpy as np

from . import vectors as v
from .compiled import helper, kernel
from .elementary import exponential
from .vectors import WEIGHT_BITS

ONE = 1 << WEIGHT_BITS
RADIUS = 11
"""The blur has 23 taps."""
_ZERO = np.float32(0)
_TOP = np.float32(255)


@helper
def _byte(x):
    low = x if x > _ZERO else _ZERO
    return np.uint8(low if low < _TOP else _TOP)


@helper
def _luma(r, g, b):
    red = np.float32(r) * np.float32(0.2989)
    green = np.float32(g) * np.float32(0.587)
    return (red + green) + np.float32(b) * np.float32(0.114)


@kernel
def brightness(image, factor):
    """Multiply by `factor`."""
    flat = image.reshape(-1)
    f = np.float32(factor)
    for i in range(flat.shape[0]):
        flat[i] = _byte(np.float32(flat[i]) * f)


@kernel
def contrast(image, factor):
    """Blend with the image's mean luma."""
    flat = image.reshape(3, -1)
    red, green, blue = flat[0], flat[1], flat[2]
    total = np.int64(0)
    for i in range(red.shape[0]):
        total += np.int64(np.int32(_luma(red[i], green[i], blue[i])))
    f = np.float32(factor)
    rest = np.float32(total / red.shape[0]) * np.float32(1.0 - factor)
    every = image.reshape(-1)
    for i in range(every.shape[0]):
        every[i] = _byte(np.float32(every[i]) * f + rest)


@kernel
def saturation(image, factor):
    """Blend each pixel with its luma."""
    flat = image.reshape(3, -1)
    red, green, blue = flat[0], flat[1], flat[2]
    f = np.float32(factor)
    rest = np.float32(1.0 - factor)
    for i in range(red.shape[0]):
        grey = np.float32(np.int32(_luma(red[i], green[i], blue[i]))) * rest
        red[i] = _byte(np.float32(red[i]) * f + grey)
        green[i] = _byte(np.float32(green[i]) * f + grey)
        blue[i] = _byte(np.float32(blue[i]) * f + grey)


@helper
def _ramp(k):
    """How far a channel lies below the largest at hue distance k (in sixths of the circle): 0 to 1."""
    k = k - np.float32(6) if k >= np.float32(6) else k
    back = np.float32(4) - k
    low = k if k < back else back
    low = low if low > _ZERO else _ZERO
    return low if low < np.float32(1) else np.float32(1)


@kernel(error_model="numpy")
def hue(image, factor):
    """Turn the hue by `factor` (-0.5 to 0.5) of the circle."""
    flat = image.reshape(3, -1)
    red, green, blue = flat[0], flat[1], flat[2]
    # a positive turn: 0 <= turn < 6
    turn = np.float32((factor - np.floor(factor)) * 6.0)
    one = np.float32(1)
    six = np.float32(6)
    scale = np.float32(255.999 / 255.0)
    for i in range(red.shape[0]):
        r = np.float32(red[i])
        g = np.float32(green[i])
        b = np.float32(blue[i])
        high = r if r > g else g
        high = high if high > b else b
        low = r if r < g else g
        low = low if low < b else b
        spread = high - low
        part = one / (spread if spread > _ZERO else one)
        from_red = (g - b) * part
        from_green = (b - r) * part + np.float32(2)
        from_blue = (r - g) * part + np.float32(4)
        h = from_green if high == g else from_blue
        h = from_red if high == r else h
        h = h + six if h < _ZERO else h
        h = h + turn
        h = h - six if h >= six else h
        red[i] = _byte((high - spread * _ramp(h + np.float32(5))) * scale)
        green[i] = _byte((high - spread * _ramp(h + np.float32(3))) * scale)
        blue[i] = _byte((high - spread * _ramp(h + one)) * scale)


@kernel
def grayscale(image):
    """Each pixel's luma in all three channels."""
    flat = image.reshape(3, -1)
    red, green, blue = flat[0], flat[1], flat[2]
    for i in range(red.shape[0]):
        grey = np.uint8(np.int32(_luma(red[i], green[i], blue[i])))
        red[i] = grey
        green[i] = grey
        blue[i] = grey


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
def _blur_slowly(plane, taps, reach, columnwise, between):
    height, width = plane.shape
    for y in range(height):
        for x in range(width):
            total = np.int64(ONE // 2) + np.int64(plane[y, x]) * taps[0, 0]
            for k in range(1, reach + 1):
                if columnwise:
                    a, b = plane[_mirror(y - k, height), x], plane[_mirror(y + k, height), x]
                else:
                    a, b = plane[y, _mirror(x - k, width)], plane[y, _mirror(x + k, width)]
                total += (np.int64(a) + np.int64(b)) * taps[k, 0]
            between[y * width + x] = total >> WEIGHT_BITS
    for y in range(height):
        for x in range(width):
            plane[y, x] = between[y * width + x]


@helper
def _blur_line(upper, lower, taps, reach, width, out):
    """One line of a blur: `upper` and `lower` hold the addresses of the lines k away on either side."""
    x = 0
    while x < width:
        x = min(x, width - 16)
        sum0 = v.rounding()
        sum1 = v.rounding()
        for k in range(reach + 1):
            w = v.load_pair(taps + 4 * k)
            a = v.load_bytes(upper[k] + x)
            b = v.load_bytes(lower[k] + x)
            sum0 = v.add_products(sum0, v.interleave_low(a, b), w)
            sum1 = v.add_products(sum1, v.interleave_high(a, b), w)
        v.store_bytes(out + x, v.pack(sum0, sum1))
        x += 16


@kernel
def blur(image, sigma, scratch):
    """Gaussian blur of 23 taps, width `sigma` pixels, edges mirrored; rows first, then columns.

    `scratch` is a Scratch for this side: uint8 [3, side, side].
    """
    height, width = image.shape[1], image.shape[2]
    taps = scratch.taps
    reach = fill_taps(sigma, taps)
    if reach == 0:
        return
    between = scratch.mixed
    if width < 16:
        for channel in range(3):
            _blur_slowly(image[channel], taps, reach, False, between)
            _blur_slowly(image[channel], taps, reach, True, between)
        return
    strip = scratch.strip
    upper, lower = scratch.upper, scratch.lower
    middle = np.int64(strip.ctypes.data) + RADIUS
    weights = np.int64(taps.ctypes.data)
    target = np.int64(between.ctypes.data)
    for channel in range(3):
        plane = image[channel]
        start = np.int64(plane.ctypes.data)
        for k in range(reach + 1):
            upper[k] = middle - k
            lower[k] = middle + k
        for y in range(height):
            v.copy_bytes(middle, start + y * width, np.int64(width))
            for k in range(1, reach + 1):
                strip[RADIUS - k] = plane[y, _mirror(-k, width)]
                strip[RADIUS + width - 1 + k] = plane[y, _mirror(width - 1 + k, width)]
            _blur_line(upper, lower, weights, reach, width, target + y * width)
        for y in range(height):
            for k in range(reach + 1):
                upper[k] = target + _mirror(y - k, height) * width
                lower[k] = target + _mirror(y + k, height) * width
            _blur_line(upper, lower, weights, reach, width, start + y * width)
