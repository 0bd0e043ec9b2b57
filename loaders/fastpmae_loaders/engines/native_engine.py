"""The engine without a C library: JPEGs decoded by compiled code of our own, as far as a sample's views show them.

What is not an ordinary JPEG, or not sound, is given to Pillow. The pictures are the torch engine's, to the bit.
"""

import ctypes

import numpy as np

from fastpmae_loaders.engines.base import ATTEMPTS, Job, Source, make_job
from fastpmae_loaders.engines.scratch import Scratch
from fastpmae_loaders.engines.second_opinion import images_of, second_opinion
from fastpmae_loaders.engines.views import draw_row, show_row
from fastpmae_loaders.engines.workspaces import Workspaces
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.jit.compiled import kernel
from fastpmae_loaders.jit.memory import bytes_at, fetch_add, read_into
from fastpmae_loaders.native.coefficients import unpack
from fastpmae_loaders.native.decoder import decode
from fastpmae_loaders.sources.beton import COEFFICIENTS, JPG, RAW, Beton
from fastpmae_loaders.sources.turbo import call_decoder


@kernel
def _fill(counter, indices, images, following, descriptor, second, seed, epoch, recipes, colours, work, scratch, out):
    """Rows of a batch until none is left to take; how many were done here."""
    count = images.mode.shape[0]
    target = np.int64(scratch.decoded.ctypes.data)
    stored = np.int64(scratch.stored.ctypes.data)
    done = 0
    while True:
        row = fetch_add(counter)
        if row >= indices.shape[0]:
            return done
        done += 1
        index = indices[row]
        shown = False
        for _ in range(min(ATTEMPTS, count)):
            height, width, mode = images.height[index], images.width[index], images.mode[index]
            size = np.int64(images.size[index])
            if read_into(descriptor, stored, size, np.int64(images.pointer[index])):
                # before the pixels: only what the views show is decoded
                draw_row(row, index, height, width, seed, epoch, recipes, scratch, out)
                data = bytes_at(stored, size)
                pixels = target
                if mode == RAW:
                    pixels = stored
                    shown = True
                elif mode == COEFFICIENTS:
                    shown = unpack(data, height, width, out.boxes[row], target, work)
                else:
                    shown = decode(data, height, width, out.boxes[row], target, work)
                    shown = shown or call_decoder(second, 0, stored, size, height, width, target) == 0
                if shown:
                    show_row(row, pixels, height, width, recipes, colours, scratch, out)
                    break
            index = following[index] if following.shape[0] else (index + 1) % count
        if not shown:
            out.index[row] = -1


class NativeEngine:
    """Runs compiled code from the loader's threads, several at once on the same batch."""

    threads = None

    def __init__(self, source: Source) -> None:
        if not isinstance(source.samples, Beton):
            raise UserError(
                f"{source.samples.path}: the native engine reads .beton files alone; write one with fastpmae-write, or "
                "use engine='torch'"
            )
        self._source = source
        self._recipes = source.recipes()
        self._images = images_of(source.samples)
        self._descriptor = source.samples.descriptor
        self._second = int(ctypes.cast(second_opinion, ctypes.c_void_p).value or 0)
        self._workspaces = Workspaces(self._images, (JPG, COEFFICIENTS))
        # on an empty batch, so that what is compiled is there before the threads are
        self.fill(make_job(np.zeros(0, np.int64), 0, source), source.scratch())

    def fill(self, job: Job, scratch: Scratch) -> int:
        """See Engine."""
        source = self._source
        with self._workspaces.lend() as work:
            return _fill(
                job.counter, job.indices, self._images, source.following, self._descriptor, self._second,
                source.seed, job.epoch, self._recipes, source.colours, work, scratch, job.rows,
            )  # fmt: skip

    def close(self) -> None:
        """Nothing is held."""
