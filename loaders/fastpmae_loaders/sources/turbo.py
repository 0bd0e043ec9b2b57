"""libjpeg-turbo's decoder, called from compiled code."""

import ctypes

from llvmlite import ir
from numba import types

from fastpmae_loaders.jit.memory import operation
from fastpmae_loaders.sources.jpeg import TURBO_FLAGS, TURBO_RGB


@operation
def call_decoder(typingctx, function, handle, source, size, height, width, target):
    """Call `tjDecompress2` at the address `function`: a whole JPEG to uint8 [height, width, 3]. 0 is success.

    Its error also covers what libjpeg calls a warning: data that end too soon or make no sense.
    """

    def code(context, builder, signature, args):
        function, handle, source, size, height, width, target = args
        word, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        unsigned_long = ir.IntType(8 * ctypes.sizeof(ctypes.c_ulong))
        kind = ir.FunctionType(word, [pointer, pointer, unsigned_long, pointer, word, word, word, word, word])
        arguments = [
            *(builder.inttoptr(handle, pointer), builder.inttoptr(source, pointer)),
            builder.trunc(size, unsigned_long) if unsigned_long.width < 64 else size,
            *(builder.inttoptr(target, pointer), builder.trunc(width, word), word(0), builder.trunc(height, word)),
            *(word(TURBO_RGB), word(TURBO_FLAGS)),
        ]
        status = builder.call(builder.inttoptr(function, kind.as_pointer()), arguments)
        return builder.sext(status, ir.IntType(64))

    number = types.int64
    return number(number, number, number, number, number, number, number), code
