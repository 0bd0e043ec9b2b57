"""Sixteen floats at once, for numba: what the colours of sixteen pixels are computed in.

They are added, multiplied, divided and compared as IEEE 754 says and in the order written, so every machine gives the
same bits. `a if a > b else b` becomes `larger(a, b)`: a choice for each of the sixteen.
"""

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import PrimitiveModel
from numba.extending import intrinsic, overload, register_model

LANES = 16


class Floats(types.Type):
    """LANES numbers of 32 bits."""

    def __init__(self) -> None:
        super().__init__(name="Floats")


FLOATS = Floats()
_KIND = ir.VectorType(ir.FloatType(), LANES)


@register_model(Floats)
class _FloatsModel(PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, _KIND)


class Counts(types.Type):
    """LANES sums of 32 bits."""

    def __init__(self) -> None:
        super().__init__(name="Counts")


COUNTS = Counts()
_WHOLE = ir.VectorType(ir.IntType(32), LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)


@register_model(Counts)
class _CountsModel(PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, _WHOLE)


def _operation(define: Any) -> Any:
    return intrinsic(define)


def _pointer(builder, address):
    return builder.inttoptr(address, _BYTES.as_pointer())


@_operation
def load(typingctx, address):
    """The sixteen bytes at an address."""

    def code(context, builder, signature, args):
        # by way of signed numbers: unsigned ones of 32 bits have no conversion of their own before AVX-512
        whole = builder.zext(builder.load(_pointer(builder, args[0]), align=1), _WHOLE)
        return builder.sitofp(whole, _KIND)

    return FLOATS(types.int64), code


@_operation
def store(typingctx, address, numbers):
    """Store whole numbers between 0 and 255 as bytes."""

    def code(context, builder, signature, args):
        whole = builder.fptosi(args[1], _WHOLE)
        # they are between the two anyway; that LLVM is told so saves it instructions
        for order, bound in ((">", 0), ("<", 255)):
            limit = ir.Constant(_WHOLE, [bound] * LANES)
            whole = builder.select(builder.icmp_signed(order, whole, limit), whole, limit)
        builder.store(builder.trunc(whole, _BYTES), _pointer(builder, args[0]), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, FLOATS), code


@_operation
def spread(typingctx, number):
    """One float32 in all places."""

    def code(context, builder, signature, args):
        nothing = ir.Constant(_KIND, ir.Undefined)
        one = builder.insert_element(nothing, args[0], ir.IntType(32)(0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return builder.shuffle_vector(one, nothing, mask)

    return FLOATS(types.float32), code


def _arithmetic(symbol, instruction: str) -> None:
    @_operation
    def compute(typingctx, a, b):
        def code(context, builder, signature, args):
            return getattr(builder, instruction)(*args)

        return FLOATS(FLOATS, FLOATS), code

    @overload(symbol)
    def both(a, b):
        if isinstance(a, Floats) and isinstance(b, Floats):
            return lambda a, b: compute(a, b)
        return None


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


@_operation
def whole(typingctx, numbers):
    """Without what stands behind the point."""

    def code(context, builder, signature, args):
        return _call(builder, "llvm.trunc.v16f32", _KIND, args[0])

    return FLOATS(FLOATS), code


def _call(builder, name: str, result, *arguments):
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@_operation
def larger(typingctx, a, b):
    """a where a > b, else b."""

    def code(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return FLOATS(FLOATS, FLOATS), code


@_operation
def smaller(typingctx, a, b):
    """a where a < b, else b."""

    def code(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("<", *args), *args)

    return FLOATS(FLOATS, FLOATS), code


@_operation
def where_equal(typingctx, a, b, this, other):
    """`this` where a == b, else `other`."""

    def code(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("==", args[0], args[1]), args[2], args[3])

    return FLOATS(FLOATS, FLOATS, FLOATS, FLOATS), code


@_operation
def where_negative(typingctx, number, this, other):
    """`this` where the sign of `number` is minus, else `other`."""

    def code(context, builder, signature, args):
        negative = builder.icmp_signed("<", builder.bitcast(args[0], _WHOLE), ir.Constant(_WHOLE, [0] * LANES))
        return builder.select(negative, args[1], args[2])

    return FLOATS(FLOATS, FLOATS, FLOATS), code


@_operation
def no_counts(typingctx):
    """Sixteen zeros."""

    def code(context, builder, signature, args):
        return ir.Constant(_WHOLE, [0] * LANES)

    return COUNTS(), code


@_operation
def count(typingctx, counts, numbers):
    """Counts with whole numbers added."""

    def code(context, builder, signature, args):
        return builder.add(args[0], builder.fptosi(args[1], _WHOLE))

    return COUNTS(COUNTS, FLOATS), code


@_operation
def total(typingctx, counts):
    """The sum of all sixteen."""

    def code(context, builder, signature, args):
        result = ir.IntType(64)(0)
        for lane in range(LANES):
            number = builder.extract_element(args[0], ir.IntType(32)(lane))
            result = builder.add(result, builder.sext(number, ir.IntType(64)))
        return result

    return types.int64(COUNTS), code


@_operation
def room(typingctx):
    """The address of sixteen bytes for each of three channels, on the stack, and zero."""

    def code(context, builder, signature, args):
        kind = ir.ArrayType(ir.IntType(8), 3 * LANES)
        place = cgutils.alloca_once(builder, kind)
        builder.store(ir.Constant(kind, None), place)
        return builder.ptrtoint(place, ir.IntType(64))

    return types.int64(), code
