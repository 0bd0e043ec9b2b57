"""A tile of a matrix product for numba: three rows times four rows, all sums in registers.

Written in LLVM's portable vector instructions, since no scalar loop becomes this form: twelve sums of eight lanes,
three vectors of the first rows and one of the second fill AVX2's sixteen registers, and both sides are read as they
lie. Every product is summed in the same order, so equal rows give equal products. Addresses are integers; nothing here
checks bounds.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ROWS, COLUMNS, LANES = 3, 4, 8

_WORD = ir.IntType(64)
_VECTOR, _HALF = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.FloatType(), LANES // 2)


def _at(builder: Any, base: Any, offset: Any, kind: Any) -> Any:
    return builder.inttoptr(builder.add(base, offset), kind.as_pointer())


def _picked(builder: Any, one: Any, other: Any, *lanes: int) -> Any:
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))


def _paired(builder: Any, one: Any, other: Any) -> Any:
    """Neighbouring lanes added: two vectors become one."""
    return builder.fadd(_picked(builder, one, other, 0, 2, 4, 6), _picked(builder, one, other, 1, 3, 5, 7))


def _totals(builder: Any, sums: list[Any]) -> Any:
    """The lanes of four vectors added up, side by side."""
    half = [
        builder.fadd(_picked(builder, lanes, lanes, 0, 1, 2, 3), _picked(builder, lanes, lanes, 4, 5, 6, 7))
        for lanes in sums
    ]
    return _paired(builder, _paired(builder, *half[:2]), _paired(builder, *half[2:]))


def _tile(typingctx, a0, a1, a2, b0, b1, b2, b3, features, products, row_bytes):
    """products[r, c] = the sum over k of a_r[k] b_c[k], for rows of fp32 given by their addresses.

    `features` is a multiple of eight; rows of `products` lie `row_bytes` apart.
    """

    def code(context, builder, signature, args):
        ours, theirs, (features, products, row_bytes) = args[:ROWS], args[ROWS : ROWS + COLUMNS], args[ROWS + COLUMNS :]
        fuse = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fmuladd.v{LANES}f32"
        )
        zero, end = ir.Constant(_VECTOR, [0.0] * LANES), builder.shl(features, _WORD(2))
        before = builder.basic_block
        loop, after = builder.append_basic_block("features"), builder.append_basic_block("summed")
        builder.cbranch(builder.icmp_signed(">", end, _WORD(0)), loop, after)
        builder.position_at_end(loop)
        place = builder.phi(_WORD)
        running = [[builder.phi(_VECTOR) for _ in theirs] for _ in ours]
        mine = [builder.load(_at(builder, row, place, _VECTOR), align=4) for row in ours]
        following = [[] for _ in ours]
        for column, row in enumerate(theirs):
            other = builder.load(_at(builder, row, place, _VECTOR), align=4)
            for r in range(ROWS):
                following[r].append(builder.call(fuse, [mine[r], other, running[r][column]]))
        next_place = builder.add(place, _WORD(4 * LANES))
        place.add_incoming(_WORD(0), before)
        place.add_incoming(next_place, loop)
        builder.cbranch(builder.icmp_signed("<", next_place, end), loop, after)
        builder.position_at_end(after)
        for r in range(ROWS):
            sums = []
            for so_far, last in zip(running[r], following[r], strict=True):
                so_far.add_incoming(zero, before)
                so_far.add_incoming(last, loop)
                total = builder.phi(_VECTOR)
                total.add_incoming(zero, before)
                total.add_incoming(last, loop)
                sums.append(total)
            following[r] = sums
        for r in range(ROWS):
            there = _at(builder, products, builder.mul(row_bytes, _WORD(r)), _HALF)
            builder.store(_totals(builder, following[r]), there, align=4)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 10), code


tile: Any = intrinsic(_tile)
