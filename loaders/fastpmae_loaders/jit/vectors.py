"""A handful of vector operations for numba, written in LLVM's portable vector instructions.

LLVM does not find these forms by itself in scalar loops, and they are what the resampling lives on: a sum
of products of 16-bit pairs is one instruction on every machine of today. All of it is integer arithmetic,
so every machine, with whichever vector width, gives the same bits.

Addresses are integers (`array.ctypes.data` plus an offset in bytes); nothing here checks bounds.
"""

import numba
from llvmlite import ir
from numba import types
from numba.core.codegen import get_host_cpu_features
from numba.core.datamodel import PrimitiveModel
from numba.extending import register_model

from fastpmae_loaders.jit.memory import call_library, operation, pointer_to

WEIGHT_BITS = 14
"""Fraction bits of the fixed-point weights: 1.0 is 16384, so every bicubic weight fits 16 bits."""

_FEATURES: str | None = getattr(numba.config, "CPU_FEATURES", None)
AVX2 = "+avx2" in (get_host_cpu_features() if _FEATURES is None else _FEATURES)
"""Whether to pack by AVX2's own instructions: LLVM's portable form crosses the register's halves twice for nothing."""


class Vector(types.Type):
    """`lanes` integers of `bits` bits in one register."""

    def __init__(self, bits: int, lanes: int) -> None:
        self.bits = bits
        self.lanes = lanes
        super().__init__(name=f"Vector({bits}, {lanes})")


@register_model(Vector)
class _VectorModel(PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, vector_of(kind.bits, kind.lanes))


BYTES = Vector(8, 16)
TWICE = Vector(8, 32)
SHORTS = Vector(16, 16)
INTS = Vector(32, 8)


def vector_of(bits: int, lanes: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(bits), lanes)


def shuffle(builder, first, second, places):
    mask = ir.Constant(vector_of(32, len(places)), places)
    return builder.shuffle_vector(first, second, mask)


def zeros(bits: int, lanes: int):
    return ir.Constant(vector_of(bits, lanes), [0] * lanes)


def splat(bits: int, lanes: int, value: int):
    return ir.Constant(vector_of(bits, lanes), [value] * lanes)


def _to_byte(builder, sums, lanes: int):
    """Weighted sums (with the rounding half already in) to int32 lanes between 0 and 255."""
    shifted = builder.ashr(sums, splat(32, lanes, WEIGHT_BITS))
    low = builder.select(builder.icmp_signed(">", shifted, zeros(32, lanes)), shifted, zeros(32, lanes))
    top = splat(32, lanes, 255)
    return builder.select(builder.icmp_signed("<", low, top), low, top)


def interleaved(builder, first, second, size: int):
    """The lower lanes of each half of two vectors by turns, and the upper ones; `size` lanes to a half."""
    low = [half * size + lane + which * 2 * size for half in (0, 1) for lane in range(size // 2) for which in (0, 1)]
    return tuple(shuffle(builder, first, second, [place + start for place in low]) for start in (0, size // 2))


def weighted_pairs(builder, pairs, weights):
    """a * weights[0] + b * weights[1] of each pair a, b of 16 bits, in 32 bits."""
    constant = ir.Constant(vector_of(16, 16), list(weights) * 8)
    if AVX2:
        return call_library(builder, "llvm.x86.avx2.pmadd.wd", vector_of(32, 8), pairs, constant)
    products = builder.mul(builder.sext(pairs, vector_of(32, 16)), builder.sext(constant, vector_of(32, 16)))
    even, odd = (shuffle(builder, products, products, list(range(start, 16, 2))) for start in (0, 1))
    return builder.add(even, odd)


def saturated_shorts(builder, low, high):
    """Eight sums of 32 bits each to 16 bits: of each half the first ones, then the second ones."""
    if AVX2:
        return call_library(builder, "llvm.x86.avx2.packssdw", vector_of(16, 16), low, high)
    both = clamp(builder, shuffle(builder, low, high, _HALVES), -(1 << 15), (1 << 15) - 1)
    return builder.trunc(both, vector_of(16, 16))


@operation
def load_shorts(typingctx, address):
    """16 numbers of 16 bits."""

    def code(context, builder, signature, args):
        return builder.load(pointer_to(builder, args[0], vector_of(16, 16)), align=2)

    return SHORTS(types.int64), code


@operation
def load_pair(typingctx, address):
    """One pair of 16-bit numbers, repeated eight times."""

    def code(context, builder, signature, args):
        pair = builder.load(pointer_to(builder, args[0], ir.IntType(32)), align=2)
        one = builder.insert_element(ir.Constant(vector_of(32, 8), ir.Undefined), pair, ir.IntType(32)(0))
        return builder.bitcast(shuffle(builder, one, one, [0] * 8), vector_of(16, 16))

    return SHORTS(types.int64), code


@operation
def rounding(typingctx):
    """Eight sums, begun at one half."""

    def code(context, builder, signature, args):
        return splat(32, 8, 1 << (WEIGHT_BITS - 1))

    return INTS(), code


@operation
def two_rows(typingctx, first, second):
    """16 bytes of each of two rows."""

    def code(context, builder, signature, args):
        first, second = (builder.load(pointer_to(builder, address, vector_of(8, 16)), align=1) for address in args)
        return shuffle(builder, first, second, list(range(32)))

    return TWICE(types.int64, types.int64), code


def _pixel_pair(start: int):
    def code(context, builder, signature, args):
        zero = 32
        places = []
        for row in (0, 16):
            for channel in range(3):
                at = row + start + channel
                places += [at, zero, at + 3, zero]
            places += [zero] * 4
        spread = shuffle(builder, args[0], zeros(8, 32), places)
        return builder.bitcast(spread, vector_of(16, 16))

    return SHORTS(TWICE), code


@operation
def first_pixels(typingctx, rows):
    """Of both rows' r0 g0 b0 r1 g1 b1 ... the 16-bit pairs r0 r1, g0 g1, b0 b1, 0 0."""
    return _pixel_pair(0)


@operation
def next_pixels(typingctx, rows):
    """Of both rows' r0 g0 b0 r1 g1 b1 ... the 16-bit pairs r2 r3, g2 g3, b2 b3, 0 0."""
    return _pixel_pair(6)


def _turned(builder, rows):
    """Four registers of 2 x 4 pairs to the first, the second, the third and the fourth pairs of all of them."""
    a, b, c, d = (builder.bitcast(row, vector_of(32, 8)) for row in rows)
    low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    first, last = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    for half in (low, high):
        ab, cd = shuffle(builder, a, b, half), shuffle(builder, c, d, half)
        yield shuffle(builder, ab, cd, first)
        yield shuffle(builder, ab, cd, last)


def _store_turned(builder, address, step: int, rows, count: int) -> None:
    for place, pairs in enumerate(list(_turned(builder, rows))[:count]):
        target = builder.add(address, ir.IntType(64)(step * place))
        builder.store(pairs, pointer_to(builder, target, vector_of(32, 8)), align=4)


@operation
def store_columns(typingctx, address, first, second, third, fourth):
    """Pixel pairs of rows 0 and 4, 1 and 5, 2 and 6, 3 and 7: store rows 0 to 7 of red, of green, of blue."""

    def code(context, builder, signature, args):
        _store_turned(builder, args[0], 32, args[1:], 3)
        return context.get_dummy_value()

    return types.none(types.int64, SHORTS, SHORTS, SHORTS, SHORTS), code


@operation
def store_plane_columns(typingctx, address, first, second, third, fourth):
    """The same of one plane's four pairs: store rows 0 to 7 of each, 96 bytes apart."""

    def code(context, builder, signature, args):
        _store_turned(builder, args[0], 96, args[1:], 4)
        return context.get_dummy_value()

    return types.none(types.int64, SHORTS, SHORTS, SHORTS, SHORTS), code


@operation
def store_row_pairs(typingctx, address, stride, first, second, third, fourth):
    """Sums of eight rows in each of four columns, shifted and clamped, to 16-bit pairs of rows.

    Rows 0 and 1 of the four columns go to `address`, rows 2 and 3 `stride` bytes on, and so forth.
    """

    def code(context, builder, signature, args):
        address, stride, *columns = args
        a, b, c, d = (builder.ashr(sums, splat(32, 8, WEIGHT_BITS)) for sums in columns)
        # rows 0 to 3 of both columns, then rows 4 to 7
        left = builder.bitcast(_clamped_shorts(builder, a, b), vector_of(32, 8))
        right = builder.bitcast(_clamped_shorts(builder, c, d), vector_of(32, 8))
        first = shuffle(builder, left, right, [0, 2, 8, 10, 4, 6, 12, 14])
        second = shuffle(builder, left, right, [1, 3, 9, 11, 5, 7, 13, 15])
        for place in range(4):
            rows = (first, second)[place % 2]
            half = [0, 1, 2, 3] if place < 2 else [4, 5, 6, 7]
            target = builder.add(address, builder.mul(stride, ir.IntType(64)(place)))
            builder.store(shuffle(builder, rows, rows, half), pointer_to(builder, target, vector_of(32, 4)), align=4)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, INTS, INTS, INTS, INTS), code


_HALVES = [*range(4), *range(8, 12), *range(4, 8), *range(12, 16)]
"""The order in which AVX2 packs two registers of eight: half by half."""


def clamp(builder, numbers, low: int, high: int):
    kind = numbers.type
    bits, lanes = kind.element.width, kind.count
    for limit, order in ((low, ">"), (high, "<")):
        bound = splat(bits, lanes, limit)
        numbers = builder.select(builder.icmp_signed(order, numbers, bound), numbers, bound)
    return numbers


def _clamped_shorts(builder, first, second):
    """Eight ints each to sixteen shorts between 0 and 255, in the order _HALVES."""
    if AVX2:
        packed = call_library(builder, "llvm.x86.avx2.packusdw", vector_of(16, 16), first, second)
        top = splat(16, 16, 255)
        return builder.select(builder.icmp_unsigned("<", packed, top), packed, top)
    return builder.trunc(clamp(builder, shuffle(builder, first, second, _HALVES), 0, 255), vector_of(16, 16))


def _interleave_halves(builder, first, second, start: int):
    """Of each half of 16 bytes of both, the eight from `start` on, by turns."""
    places = [half + start + lane + 32 * which for half in (0, 16) for lane in range(8) for which in (0, 1)]
    return shuffle(builder, first, second, places)


@operation
def interleave_rows(typingctx, upper, lower):
    """32 bytes of each of two rows, by turns: those that stand first in their half of 16, and those that stand last."""

    def code(context, builder, signature, args):
        a, b = (builder.load(pointer_to(builder, address, vector_of(8, 32)), align=1) for address in args)
        both = [_interleave_halves(builder, a, b, start) for start in (0, 8)]
        return context.make_tuple(builder, signature.return_type, both)

    return types.UniTuple(TWICE, 2)(types.int64, types.int64), code


def _widen(start: int):
    def code(context, builder, signature, args):
        return builder.bitcast(_interleave_halves(builder, args[0], zeros(8, 32), start), vector_of(16, 16))

    return SHORTS(TWICE), code


@operation
def widen_low(typingctx, numbers):
    """The bytes that stand first in each half, as 16-bit numbers."""
    return _widen(0)


@operation
def widen_high(typingctx, numbers):
    """The bytes that stand last in each half, as 16-bit numbers."""
    return _widen(8)


@operation
def store_halves(typingctx, address, first, second, third, fourth):
    """32 sums, as `widen_low` and `widen_high` of `interleave_rows` order them, to 32 bytes, shifted and clamped."""

    def code(context, builder, signature, args):
        address, *sums = args
        a, b, c, d = (builder.ashr(sum, splat(32, 8, WEIGHT_BITS)) for sum in sums)
        if AVX2:
            low = call_library(builder, "llvm.x86.avx2.packssdw", vector_of(16, 16), a, b)
            high = call_library(builder, "llvm.x86.avx2.packssdw", vector_of(16, 16), c, d)
            clamped = call_library(builder, "llvm.x86.avx2.packuswb", vector_of(8, 32), low, high)
        else:
            # halves of four: 0 4 of each sum belong side by side
            low = shuffle(builder, a, b, list(range(16)))
            high = shuffle(builder, c, d, list(range(16)))
            places = [half + part * 8 + lane for half in (0, 4) for part in range(4) for lane in range(4)]
            clamped = builder.trunc(clamp(builder, shuffle(builder, low, high, places), 0, 255), vector_of(8, 32))
        builder.store(clamped, pointer_to(builder, address, vector_of(8, 32)), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, INTS, INTS, INTS, INTS), code


@operation
def store_clamped(typingctx, address, first, second, third, fourth):
    """32 sums to 32 bytes, shifted and clamped."""

    def code(context, builder, signature, args):
        address, *sums = args
        a, b, c, d = (builder.ashr(sum, splat(32, 8, WEIGHT_BITS)) for sum in sums)
        if AVX2:
            low = call_library(builder, "llvm.x86.avx2.packssdw", vector_of(16, 16), a, b)
            high = call_library(builder, "llvm.x86.avx2.packssdw", vector_of(16, 16), c, d)
            mixed = builder.bitcast(
                call_library(builder, "llvm.x86.avx2.packuswb", vector_of(8, 32), low, high), vector_of(32, 8)
            )
            clamped = builder.bitcast(shuffle(builder, mixed, mixed, [0, 4, 1, 5, 2, 6, 3, 7]), vector_of(8, 32))
        else:
            low = shuffle(builder, a, b, list(range(16)))
            high = shuffle(builder, c, d, list(range(16)))
            both = shuffle(builder, low, high, list(range(32)))
            clamped = builder.trunc(clamp(builder, both, 0, 255), vector_of(8, 32))
        builder.store(clamped, pointer_to(builder, address, vector_of(8, 32)), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, INTS, INTS, INTS, INTS), code


@operation
def add_products(typingctx, sums, numbers, weights):
    """sums[i] + numbers[2i] * weights[2i] + numbers[2i+1] * weights[2i+1]."""

    def code(context, builder, signature, args):
        wide = vector_of(32, 16)
        product = builder.mul(builder.sext(args[1], wide), builder.sext(args[2], wide))
        even = shuffle(builder, product, product, list(range(0, 16, 2)))
        odd = shuffle(builder, product, product, list(range(1, 16, 2)))
        return builder.add(args[0], builder.add(even, odd))

    return INTS(INTS, SHORTS, SHORTS), code


@operation
def pack(typingctx, low, high):
    """Sixteen sums to sixteen bytes: shifted and clamped."""

    def code(context, builder, signature, args):
        both = shuffle(builder, args[0], args[1], list(range(16)))
        return builder.trunc(_to_byte(builder, both, 16), vector_of(8, 16))

    return BYTES(INTS, INTS), code
