"""A scan's bytes without what JPEG stuffs them with, from one restart marker to the next."""

from llvmlite import ir
from numba import types

from fastpmae_loaders.jit.compiled import helper
from fastpmae_loaders.jit.memory import call_library, operation, pointer_to
from fastpmae_loaders.jit.vectors import splat, vector_of
from fastpmae_loaders.native.huffman import SLACK

STEP = 32
"""Bytes that are copied at a time, and may be written past the end of what is copied."""


@operation
def _copy_and_find(typingctx, target, source):
    """Copy 32 bytes; how many of them stand before the first FF, 32 where there is none."""

    def code(context, builder, signature, args):
        kind = vector_of(8, STEP)
        content = builder.load(pointer_to(builder, args[1], kind), align=1)
        builder.store(content, pointer_to(builder, args[0], kind), align=1)
        marks = builder.bitcast(builder.icmp_unsigned("==", content, splat(8, STEP, 255)), ir.IntType(STEP))
        wide = builder.or_(builder.zext(marks, ir.IntType(64)), ir.IntType(64)(1 << STEP))
        return call_library(builder, "llvm.cttz.i64", ir.IntType(64), wide, ir.IntType(1)(1))

    return types.int64(types.int64, types.int64), code


@helper(_nrt=False)
def copy_segment(data, at, target):
    """Copy a scan's data from `at` on up to the next marker: (bytes copied, the marker or -1 for none, where it ends).

    `target` uint8 [n + SLACK + STEP]; what is copied has SLACK zeros behind it.
    """
    stop, count, code = len(data), 0, -1
    source, copy = data.ctypes.data, target.ctypes.data
    while at < stop:
        if at + STEP <= stop:
            clean = _copy_and_find(copy + count, source + at)
            count += clean
            at += clean
            if clean == STEP:
                continue
        elif data[at] != 0xFF:
            target[count] = data[at]
            count += 1
            at += 1
            continue
        # at an FF: of the data where 00 follows
        if at + 1 >= stop:
            at = stop
            break
        at += 2
        if data[at - 1] != 0:
            code = int(data[at - 1])
            break
        target[count] = 0xFF
        count += 1
    target[count : count + SLACK] = 0
    return count, code, at
