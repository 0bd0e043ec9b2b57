"""Dequantisation and the inverse DCT of two blocks side by side: libjpeg's accurate one ("islow"), to the bit.

The numbers are of 16 bits and their products of 32, as in libjpeg-turbo's vector code, so that what a damaged file
drives out of their range comes out as there too. A block's row is eight lanes; the first pass treats all columns at
once, then rows and columns change places.

Sources: C. Loeffler, A. Ligtenberg, G. Moschytz, "Practical fast 1-D DCT algorithms with 11 multiplications" (ICASSP
1989), in the fixed-point form of the Independent JPEG Group (jidctint.c): constants of 13 bits, two more bits kept
between the passes.
"""

from llvmlite import ir
from numba import types

from fastpmae_loaders.jit.memory import call_library, operation, pointer_to
from fastpmae_loaders.jit.vectors import (
    AVX2,
    clamp,
    interleaved,
    saturated_shorts,
    shuffle,
    splat,
    vector_of,
    weighted_pairs,
)

_CONSTANT_BITS = 13
_KEPT_BITS = 2
# sums of the constants of the algorithm, as its two-term products need them; 0.541196100 is 4433, ...
_EVEN = ((4433 + 6270, 4433), (4433, 4433 - 15137))
_COMMON = ((9633 - 16069, 9633), (9633, 9633 - 3196))
_OUTER = ((2446 - 7373, -7373), (-7373, 12299 - 7373))
_INNER = ((16819 - 20995, -20995), (-20995, 25172 - 20995))

_LANES = 16


def _rotated(builder, first, second, weights):
    """Both sums of two terms that `weights` name: each of the lower lanes of each half, and of the upper."""
    pairs = interleaved(builder, first, second, 8)
    return [[weighted_pairs(builder, part, row) for part in pairs] for row in weights]


def _octets(builder, first, second):
    """Numbers of 16 bits to 8, saturated: of each half those of the first, then those of the second."""
    if AVX2:
        return call_library(builder, "llvm.x86.avx2.packsswb", vector_of(8, 2 * _LANES), first, second)
    both = shuffle(
        builder,
        first,
        second,
        [half * 8 + lane + which * 16 for half in (0, 1) for which in (0, 1) for lane in range(8)],
    )
    return builder.trunc(clamp(builder, both, -128, 127), vector_of(8, 2 * _LANES))


def _scaled(builder, number):
    """Each number of 16 bits, shifted left by the constants' bits, in 32: the lower lanes of each half, the upper."""
    nothing = splat(16, _LANES, 0)
    shift = splat(32, _LANES // 2, 16 - _CONSTANT_BITS)
    for part in interleaved(builder, nothing, number, 8):
        yield builder.ashr(builder.bitcast(part, vector_of(32, _LANES // 2)), shift)


def _pass(builder, rows, dropped_bits: int):
    """One pass over eight vectors, those that are not given being 0; what comes out has lost so many bits."""
    r = [*rows, *(8 - len(rows)) * [splat(16, _LANES, 0)]]
    tmp3, tmp2 = _rotated(builder, r[2], r[6], _EVEN)
    tmp0, tmp1 = list(_scaled(builder, builder.add(r[0], r[4]))), list(_scaled(builder, builder.sub(r[0], r[4])))
    z3, z4 = _rotated(builder, builder.add(r[7], r[3]), builder.add(r[5], r[1]), _COMMON)
    outer = _rotated(builder, r[7], r[1], _OUTER)
    inner = _rotated(builder, r[5], r[3], _INNER)

    def added(first, second, how=builder.add):
        return [how(a, b) for a, b in zip(first, second, strict=True)]

    even = (added(tmp0, tmp3), added(tmp1, tmp2), added(tmp1, tmp2, builder.sub), added(tmp0, tmp3, builder.sub))
    odd = (added(outer[1], z4), added(inner[1], z3), added(inner[0], z4), added(outer[0], z3))
    half, shift = splat(32, _LANES // 2, 1 << (dropped_bits - 1)), splat(32, _LANES // 2, dropped_bits)
    found = [None] * 8
    for place in range(4):
        rounded = added(even[place], [half, half])
        for target, how in ((place, builder.add), (7 - place, builder.sub)):
            sums = added(rounded, odd[place], how)
            found[target] = saturated_shorts(builder, *(builder.ashr(part, shift) for part in sums))
    return found


def _turned(builder, rows, size: int):
    """Rows become columns in each half: the highest bit of a row's number becomes the lowest of its lanes', and on."""
    for _ in range(3):
        middle = len(rows) // 2
        pairs = zip(rows[:middle], rows[middle:], strict=True)
        rows = [part for first, second in pairs for part in interleaved(builder, first, second, size)]
    return rows


def _store_rows(builder, columns, out, stride) -> None:
    """Eight columns of two blocks to eight rows of sixteen bytes, 128 added."""
    packed = [_octets(builder, columns[place], columns[place + 1]) for place in range(0, 8, 2)]
    for number, two_rows in enumerate(_turned(builder, packed, 16)):
        whole = builder.bitcast(builder.xor(two_rows, splat(8, 32, 128)), vector_of(64, 4))
        for row in range(2):
            target = builder.add(out, builder.mul(stride, ir.IntType(64)(2 * number + row)))
            line = shuffle(builder, whole, whole, [row, row + 2])
            builder.store(line, pointer_to(builder, target, vector_of(64, 2)), align=1)


def _transform(builder, coefficients, quantisation, out, stride, rows: int) -> None:
    """The IR of two blocks whose coefficients beyond the first `rows` rows and columns are all 0."""
    stored, numbers = [], []
    for row in range(rows):
        at = [builder.add(address, ir.IntType(64)(32 * row)) for address in (coefficients, quantisation)]
        loaded = [builder.load(pointer_to(builder, address, vector_of(16, 16)), align=2) for address in at]
        stored.append(loaded[0])
        numbers.append(builder.mul(*loaded))
    lines = _pass(builder, numbers, _CONSTANT_BITS - _KEPT_BITS)
    # libjpeg's short cut for blocks of the first row alone drops what goes beyond 16 bits instead of saturating it
    rest = stored[1]
    for row in stored[2:]:
        rest = builder.or_(rest, row)
    alone = _zero_halves(builder, rest)
    plain = builder.shl(numbers[0], splat(16, _LANES, _KEPT_BITS))
    lines = [builder.select(alone, plain, line) for line in lines]
    columns = _turned(builder, lines, 8)[:rows]
    _store_rows(builder, _pass(builder, columns, _CONSTANT_BITS + _KEPT_BITS + 3), out, stride)


def _zero_halves(builder, numbers):
    """For each lane, whether all of its half are 0."""
    words = builder.bitcast(numbers, vector_of(64, 4))
    other = shuffle(builder, words, words, [1, 0, 3, 2])
    zero = builder.icmp_unsigned("==", builder.or_(words, other), splat(64, 4, 0))
    wide = builder.sext(zero, vector_of(64, 4))
    return builder.icmp_unsigned("!=", builder.bitcast(wide, vector_of(16, 16)), splat(16, 16, 0))


def _two_blocks(rows: int):
    def code(context, builder, signature, args):
        coefficients, quantisation, out, stride = args
        _transform(builder, coefficients, quantisation, out, stride, rows)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64, types.int64), code


@operation
def two_blocks(typingctx, coefficients, quantisation, out, stride):
    """Two blocks' int16 [8, 2, 8], times uint16 [8, 2, 8], to eight rows of 16 bytes, `stride` bytes apart."""
    return _two_blocks(8)


@operation
def two_sparse_blocks(typingctx, coefficients, quantisation, out, stride):
    """The same of blocks without any coefficient beyond the first four rows and columns."""
    return _two_blocks(4)
