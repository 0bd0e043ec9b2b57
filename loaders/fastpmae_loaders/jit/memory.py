"""Bytes at addresses, as compiled code reads, writes, copies and counts them."""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from fastpmae_loaders.jit.compiled import helper, kernel


def operation(define: Callable[..., Any]) -> Callable[..., Any]:
    """numba's `intrinsic`, whose first argument callers do not see and type checkers would ask for."""
    return intrinsic(define)


def pointer_to(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


def call_library(builder, name: str, result, *arguments):
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@operation
def copy_bytes(typingctx, target, source, count):
    """memcpy."""

    def code(context, builder, signature, args):
        byte = ir.IntType(8)
        cgutils.raw_memcpy(builder, pointer_to(builder, args[0], byte), pointer_to(builder, args[1], byte), args[2], 1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), code


@operation
def move_bytes(typingctx, target, source, count):
    """memmove: both places may overlap."""

    def code(context, builder, signature, args):
        byte = ir.IntType(8)
        cgutils.raw_memmove(builder, pointer_to(builder, args[0], byte), pointer_to(builder, args[1], byte), args[2], 1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), code


@operation
def load_byte(typingctx, address):
    """One byte, as int64."""

    def code(context, builder, signature, args):
        return builder.zext(builder.load(pointer_to(builder, args[0], ir.IntType(8))), ir.IntType(64))

    return types.int64(types.int64), code


@operation
def load_int(typingctx, address):
    """One int32, as int64."""

    def code(context, builder, signature, args):
        return builder.sext(builder.load(pointer_to(builder, args[0], ir.IntType(32)), align=4), ir.IntType(64))

    return types.int64(types.int64), code


@operation
def store_byte(typingctx, address, value):
    """Store the low byte of an int64."""

    def code(context, builder, signature, args):
        byte = builder.trunc(args[1], ir.IntType(8))
        builder.store(byte, pointer_to(builder, args[0], ir.IntType(8)))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), code


@operation
def _fetch_add(typingctx, address):
    def code(context, builder, signature, args):
        number = ir.IntType(64)
        return builder.atomic_rmw("add", pointer_to(builder, args[0], number), number(1), "monotonic")

    return types.int64(types.int64), code


@kernel
def fetch_add(counter):
    """Add one to int64 [1] in one indivisible step; its value before."""
    return _fetch_add(np.int64(counter.ctypes.data))


@operation
def _byte_pointer(typingctx, address):
    def code(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.CPointer(types.uint8)(types.int64), code


_pread = types.ExternalFunction("pread", types.int64(types.int32, types.int64, types.uint64, types.int64))


@helper
def read_into(descriptor, target, size, start):
    """Read `size` bytes of an open file from byte `start` on into the memory at an address: whether all were there."""
    place = 0
    while place < size:
        count = _pread(np.int32(descriptor), target + place, np.uint64(size - place), start + place)
        if count <= 0:
            return False
        place += count
    return True


@helper
def view_at(address, side):
    """The memory at an address as uint8 [3, side, side]."""
    return carray(_byte_pointer(address), (3, side, side))


@helper
def bytes_at(address, count):
    """The memory at an address as uint8 [count]."""
    return carray(_byte_pointer(address), (count,))
