"""Chroma made as wide and as high as luma, and YCbCr made RGB: libjpeg's "fancy" upsampling, to the bit.

32 pixels at a time, those of even columns and those of odd ones apart, as 16 numbers of 16 bits each.

Source: the Independent JPEG Group's jdsample.c (a triangle filter: 3/4 of the nearer sample, 1/4 of the other, rounded
up and down by turns) and jdcolor.c (ITU-R BT.601 in 16-bit fixed point).
"""

from llvmlite import ir
from numba import types

from fastpmae_loaders.jit.memory import call_library, operation, pointer_to
from fastpmae_loaders.jit.vectors import (
    AVX2,
    SHORTS,
    clamp,
    interleaved,
    saturated_shorts,
    shuffle,
    splat,
    vector_of,
    weighted_pairs,
)

PIXELS = 32
_LANES = 16
_FOUR = types.UniTuple(SHORTS, 4)


def _load(builder, address, offset: int = 0):
    """Sixteen bytes as numbers of 16 bits."""
    at = builder.add(address, ir.IntType(64)(offset)) if offset else address
    return builder.zext(builder.load(pointer_to(builder, at, vector_of(8, 16)), align=1), vector_of(16, 16))


def _even_odd(builder, address):
    """32 bytes: those at even places and those at odd ones."""
    both = builder.load(pointer_to(builder, address, vector_of(16, 16)), align=1)
    return builder.and_(both, splat(16, 16, 255)), builder.lshr(both, splat(16, 16, 8))


def _three_and_one(builder, near, far):
    return builder.add(builder.mul(near, splat(16, 16, 3)), far)


def _rounded(builder, number, bias: int, bits: int):
    return builder.lshr(builder.add(number, splat(16, 16, bias)), splat(16, 16, bits))


def _for_both(one):
    """From (builder, addresses of a chroma component's rows) -> (even, odd) to an operation for both components."""

    def code(context, builder, signature, args):
        middle = len(args) // 2
        found = [part for rows in (args[:middle], args[middle:]) for part in one(builder, *rows)]
        return context.make_tuple(builder, signature.return_type, found)

    return code


@operation
def chroma(typingctx, blue, red):
    """32 samples of each chroma component as they are: even and odd ones of Cb, even and odd ones of Cr."""
    return _FOUR(types.int64, types.int64), _for_both(_even_odd)


def _across(builder, row):
    before, here, behind = (_load(builder, row, offset) for offset in (-1, 0, 1))
    even = _rounded(builder, _three_and_one(builder, here, before), 1, 2)
    return even, _rounded(builder, _three_and_one(builder, here, behind), 2, 2)


@operation
def chroma_across(typingctx, blue, red):
    """The same from 16 samples of a component that is half as wide, and the ones on both sides of them."""
    return _FOUR(types.int64, types.int64), _for_both(_across)


def _both_ways(builder, near, far):
    before, here, behind = (
        _three_and_one(builder, _load(builder, near, offset), _load(builder, far, offset)) for offset in (-1, 0, 1)
    )
    even = _rounded(builder, _three_and_one(builder, here, before), 8, 4)
    return even, _rounded(builder, _three_and_one(builder, here, behind), 7, 4)


@operation
def chroma_both_ways(typingctx, near_blue, far_blue, near_red, far_red):
    """The same where it is half as high, too: of the nearer row and the other."""
    return _FOUR(types.int64, types.int64, types.int64, types.int64), _for_both(_both_ways)


def _down(bias: int):
    def one(builder, near, far):
        pairs = zip(_even_odd(builder, near), _even_odd(builder, far), strict=True)
        return [_rounded(builder, _three_and_one(builder, *pair), bias, 2) for pair in pairs]

    return _for_both(one)


@operation
def chroma_down(typingctx, near_blue, far_blue, near_red, far_red):
    """The same where it is half as high alone: the upper one of two rows."""
    return _FOUR(types.int64, types.int64, types.int64, types.int64), _down(1)


@operation
def chroma_down_lower(typingctx, near_blue, far_blue, near_red, far_red):
    """The lower one of two rows."""
    return _FOUR(types.int64, types.int64, types.int64, types.int64), _down(2)


def _share(builder, number, factor: int):
    """number * factor / 65536, rounded; number within +-255, and factor of 16 bits."""
    twice = builder.add(number, number)
    if AVX2:
        high = call_library(builder, "llvm.x86.avx2.pmulh.w", vector_of(16, 16), twice, splat(16, 16, factor))
    else:
        wide = vector_of(32, 16)
        product = builder.mul(builder.sext(twice, wide), splat(32, 16, factor))
        high = builder.trunc(builder.ashr(product, splat(32, 16, 16)), vector_of(16, 16))
    return builder.ashr(builder.add(high, splat(16, 16, 1)), splat(16, 16, 1))


def _green(builder, blue, red):
    """-0.34414 blue - 0.71414 red, both shares rounded together."""
    sums = [
        builder.add(weighted_pairs(builder, pairs, (-22554, 18734)), splat(32, 8, 1 << 15))
        for pairs in interleaved(builder, blue, red, 8)
    ]
    both = saturated_shorts(builder, *(builder.ashr(part, splat(32, 8, 16)) for part in sums))
    # what is left of 0.71414 to 1 was added above
    return builder.sub(both, red)


def _bytes(builder, even, odd):
    """Even and odd numbers, clamped, to 32 bytes."""
    low, high = (clamp(builder, number, 0, 255) for number in (even, odd))
    return builder.bitcast(builder.or_(low, builder.shl(high, splat(16, 16, 8))), vector_of(8, 32))


def _interleave(builder, out, planes) -> None:
    """Three times 32 bytes to 96 of pixels, stored."""
    for part in range(3):
        # within each half 16 bytes of its 48
        found = None
        for channel, plane in enumerate(planes):
            picked = [(16 * part + place) // 3 if (16 * part + place) % 3 == channel else 255 for place in range(16)]
            if AVX2:
                mask = ir.Constant(vector_of(8, 32), 2 * picked)
                piece = call_library(builder, "llvm.x86.avx2.pshuf.b", vector_of(8, 32), plane, mask)
            else:
                places = [32 if place == 255 else half * 16 + place for half in (0, 1) for place in picked]
                piece = shuffle(builder, plane, splat(8, 32, 0), places)
            found = piece if found is None else builder.or_(found, piece)
        for half in range(2):
            target = builder.add(out, ir.IntType(64)(48 * half + 16 * part))
            line = shuffle(builder, found, found, list(range(16 * half, 16 * half + 16)))
            builder.store(line, pointer_to(builder, target, vector_of(8, 16)), align=1)


@operation
def store_pixels(typingctx, out, luma, chroma):
    """32 samples of luma at an address, and what the operations above make of chroma, to 32 pixels."""

    def code(context, builder, signature, args):
        out, luma, chroma = args
        samples = [builder.extract_value(chroma, place) for place in range(4)]
        centred = [builder.sub(number, splat(16, 16, 128)) for number in samples]
        planes = [[], [], []]
        for light, blue, red in zip(_even_odd(builder, luma), centred[:2], centred[2:], strict=True):
            # 1.40200 and 1.77200 less the 1 and the 2 that are added whole
            more_red = builder.add(red, _share(builder, red, 26345))
            more_blue = builder.add(builder.add(blue, blue), _share(builder, blue, -14942))
            for plane, change in zip(planes, (more_red, _green(builder, blue, red), more_blue), strict=True):
                plane.append(builder.add(light, change))
        _interleave(builder, out, [_bytes(builder, *plane) for plane in planes])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, _FOUR), code


@operation
def store_gray(typingctx, out, luma):
    """32 samples of luma to 32 gray pixels."""

    def code(context, builder, signature, args):
        light = builder.load(pointer_to(builder, args[1], vector_of(8, 32)), align=1)
        _interleave(builder, args[0], 3 * [light])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), code
