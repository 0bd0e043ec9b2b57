"""A handful of vector operations for numba, written in LLVM's portable vector instructions.

LLVM does not find these forms by itself in scalar loops, and they are what the resampling lives on: a sum
of products of 16-bit pairs is one instruction on every machine of today. All of it is integer arithmetic,
so every machine, with whichever vector width, gives the same bits.

Addresses are integers (`array.ctypes.data` plus an offset in bytes); nothing here checks bounds.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import PrimitiveModel
from numba.extending import intrinsic, register_model

from .compiled import kernel

WEIGHT_BITS = 14
"""Fraction bits of the fixed-point weights: 1.0 is 16384, so every bicubic weight fits 16 bits."""


class Vector(types.Type):
    """`lanes` integers of `bits` bits in one register."""

    def __init__(self, bits: int, lanes: int) -> None:
        self.bits = bits
        self.lanes = lanes
        super().__init__(name=f"Vector({bits}, {lanes})")


@register_model(Vector)
class _VectorModel(PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, _llvm(kind.bits, kind.lanes))


def _operation(define: Callable[..., Any]) -> Callable[..., Any]:
    """numba's `intrinsic`, whose first argument callers do not see and type checkers would ask for."""
    return intrinsic(define)


_BYTES = Vector(8, 16)
_SHORTS = Vector(16, 16)
_INTS = Vector(32, 8)


def _llvm(bits: int, lanes: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(bits), lanes)


def _pointer(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


def _shuffle(builder, first, second, places):
    mask = ir.Constant(_llvm(32, len(places)), places)
    return builder.shuffle_vector(first, second, mask)


def _zeros(bits: int, lanes: int):
    return ir.Constant(_llvm(bits, lanes), [0] * lanes)


def _splat(bits: int, lanes: int, value: int):
    return ir.Constant(_llvm(bits, lanes), [value] * lanes)


def _to_byte(builder, sums, lanes: int):
    """Weighted sums (with the rounding half already in) to int32 lanes between 0 and 255."""
    shifted = builder.ashr(sums, _splat(32, lanes, WEIGHT_BITS))
    low = builder.select(builder.icmp_signed(">", shifted, _zeros(32, lanes)), shifted, _zeros(32, lanes))
    top = _splat(32, lanes, 255)
    return builder.select(builder.icmp_signed("<", low, top), low, top)


@_operation
def load_bytes(typingctx, address):
    """16 bytes."""

    def code(context, builder, signature, args):
        return builder.load(_pointer(builder, args[0], _llvm(8, 16)), align=1)

    return _BYTES(types.int64), code


@_operation
def load_shorts(typingctx, address):
    """16 numbers of 16 bits."""

    def code(context, builder, signature, args):
        return builder.load(_pointer(builder, args[0], _llvm(16, 16)), align=2)

    return _SHORTS(types.int64), code


@_operation
def load_pair(typingctx, address):
    """One pair of 16-bit numbers, repeated eight times."""

    def code(context, builder, signature, args):
        pair = builder.load(_pointer(builder, args[0], ir.IntType(32)), align=2)
        one = builder.insert_element(ir.Constant(_llvm(32, 8), ir.Undefined), pair, ir.IntType(32)(0))
        return builder.bitcast(_shuffle(builder, one, one, [0] * 8), _llvm(16, 16))

    return _SHORTS(types.int64), code


@_operation
def rounding(typingctx):
    """Eight sums, begun at one half."""

    def code(context, builder, signature, args):
        return _splat(32, 8, 1 << (WEIGHT_BITS - 1))

    return _INTS(), code


@_operation
def rounding_half(typingctx):
    """Eight sums of which the first and last four will be added up: the first four begun at one half."""

    def code(context, builder, signature, args):
        half = 1 << (WEIGHT_BITS - 1)
        return ir.Constant(_llvm(32, 8), [half] * 4 + [0] * 4)

    return _INTS(), code


@_operation
def four_pixels(typingctx, pixels):
    """Bytes r0 g0 b0 r1 g1 b1 ... to 16-bit pairs r0 r1, g0 g1, b0 b1, 0 0, r2 r3, g2 g3, b2 b3, 0 0."""

    def code(context, builder, signature, args):
        places = [0, 3, 1, 4, 2, 5, 16, 16, 6, 9, 7, 10, 8, 11, 16, 16]
        return builder.zext(_shuffle(builder, args[0], _zeros(8, 16), places), _llvm(16, 16))

    return _SHORTS(_BYTES), code


def _interleave(start: int, first, second):
    def code(context, builder, signature, args):
        places = [place for lane in range(start, start + 8) for place in (lane, 16 + lane)]
        return builder.zext(_shuffle(builder, args[0], args[1], places), _llvm(16, 16))

    return _SHORTS(_BYTES, _BYTES), code


@_operation
def interleave_low(typingctx, first, second):
    """The first eight bytes of both, in pairs of 16-bit numbers."""
    return _interleave(0, first, second)


@_operation
def interleave_high(typingctx, first, second):
    """The last eight bytes of both, in pairs of 16-bit numbers."""
    return _interleave(8, first, second)


@_operation
def add_products(typingctx, sums, numbers, weights):
    """sums[i] + numbers[2i] * weights[2i] + numbers[2i+1] * weights[2i+1]."""

    def code(context, builder, signature, args):
        wide = _llvm(32, 16)
        product = builder.mul(builder.sext(args[1], wide), builder.sext(args[2], wide))
        even = _shuffle(builder, product, product, list(range(0, 16, 2)))
        odd = _shuffle(builder, product, product, list(range(1, 16, 2)))
        return builder.add(args[0], builder.add(even, odd))

    return _INTS(_INTS, _SHORTS, _SHORTS), code


@_operation
def store_pixel(typingctx, address, sums):
    """Add the two halves of `sums`, shift, clamp, and store four bytes (the fourth has no meaning)."""

    def code(context, builder, signature, args):
        low = _shuffle(builder, args[1], args[1], [0, 1, 2, 3])
        high = _shuffle(builder, args[1], args[1], [4, 5, 6, 7])
        pixel = builder.trunc(_to_byte(builder, builder.add(low, high), 4), _llvm(8, 4))
        builder.store(pixel, _pointer(builder, args[0], _llvm(8, 4)), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, _INTS), code


@_operation
def pack(typingctx, low, high):
    """Sixteen sums to sixteen bytes: shifted and clamped."""

    def code(context, builder, signature, args):
        both = _shuffle(builder, args[0], args[1], list(range(16)))
        return builder.trunc(_to_byte(builder, both, 16), _llvm(8, 16))

    return _BYTES(_INTS, _INTS), code


@_operation
def store_bytes(typingctx, address, pixels):
    """Store 16 bytes."""

    def code(context, builder, signature, args):
        builder.store(args[1], _pointer(builder, args[0], _llvm(8, 16)), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, _BYTES), code


@_operation
def store_planes(typingctx, address, plane, first, second, third):
    """Sixteen interleaved pixels (48 bytes) to 16 bytes in each of three planes `plane` bytes apart."""

    def code(context, builder, signature, args):
        address, plane, first, second, third = args
        pair = _shuffle(builder, first, second, list(range(32)))
        for channel in range(3):
            places = [3 * lane + channel for lane in range(16)]
            from_pair = [place if place < 32 else 0 for place in places]
            most = _shuffle(builder, pair, pair, from_pair)
            merge = [lane if place < 32 else 16 + place - 32 for lane, place in enumerate(places)]
            out = _shuffle(builder, most, third, merge)
            target = builder.add(address, builder.mul(plane, ir.IntType(64)(channel)))
            builder.store(out, _pointer(builder, target, _llvm(8, 16)), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, _BYTES, _BYTES, _BYTES), code


@_operation
def copy_bytes(typingctx, target, source, count):
    """memcpy."""

    def code(context, builder, signature, args):
        byte = ir.IntType(8)
        cgutils.raw_memcpy(builder, _pointer(builder, args[0], byte), _pointer(builder, args[1], byte), args[2], 1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), code


@_operation
def load_byte(typingctx, address):
    """One byte, as int64."""

    def code(context, builder, signature, args):
        return builder.zext(builder.load(_pointer(builder, args[0], ir.IntType(8))), ir.IntType(64))

    return types.int64(types.int64), code


@_operation
def store_byte(typingctx, address, value):
    """Store the low byte of an int64."""

    def code(context, builder, signature, args):
        byte = builder.trunc(args[1], ir.IntType(8))
        builder.store(byte, _pointer(builder, args[0], ir.IntType(8)))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), code


@_operation
def _fetch_add(typingctx, address):
    def code(context, builder, signature, args):
        number = ir.IntType(64)
        return builder.atomic_rmw("add", _pointer(builder, args[0], number), number(1), "monotonic")

    return types.int64(types.int64), code


@kernel
def fetch_add(counter):
    """Add one to int64 [1] in one indivisible step; its value before."""
    return _fetch_add(np.int64(counter.ctypes.data))


@_operation
def call_decoder(typingctx, function, source, size, height, width, target):
    """Call FFCV's `imdecode` at the address `function`: a whole JPEG to uint8 [height, width, 3]. 0 is success.

    Its error also covers what libjpeg calls a warning: data that end too soon or make no sense.
    """

    def code(context, builder, signature, args):
        function, source, size, height, width, target = args
        word, truth = ir.IntType(32), ir.IntType(8)
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(
            word, [pointer, ir.IntType(64), word, word, pointer, word, word, word, word, word, word, truth, truth]
        )
        h, w = builder.trunc(height, word), builder.trunc(width, word)
        arguments = [
            builder.inttoptr(source, pointer), size, h, w, builder.inttoptr(target, pointer),
            h, w, word(0), word(0), word(1), word(1), truth(0), truth(0),
        ]  # fmt: skip
        status = builder.call(builder.inttoptr(function, kind.as_pointer()), arguments)
        return builder.sext(status, ir.IntType(64))

    number = types.int64
    return number(number, number, number, number, number, number), code
