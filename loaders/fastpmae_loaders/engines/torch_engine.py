"""The engine without FFCV: Pillow decodes, the same compiled function makes the views."""

import io

import numpy as np

from fastpmae_loaders.engines.base import ATTEMPTS, Job, Samples, Source
from fastpmae_loaders.engines.scratch import Scratch
from fastpmae_loaders.engines.views import draw_row, show_row
from fastpmae_loaders.jit.memory import fetch_add
from fastpmae_loaders.native.coefficients import unpack_pixels
from fastpmae_loaders.sources.beton import COEFFICIENTS, JPG, RAW
from fastpmae_loaders.sources.pictures import decode_jpeg, decode_upright


class TorchEngine:
    """Works wherever numba and Pillow do. Its pictures are the FFCV engine's, to the bit."""

    threads = None

    def __init__(self, source: Source) -> None:
        self._source = source
        self._recipes = source.recipes()

    def fill(self, job: Job, scratch: Scratch) -> int:
        """See Engine."""
        source, samples = self._source, self._source.samples
        done = 0
        while (row := fetch_add(job.counter)) < len(job.indices):
            index, key, rows = int(job.indices[row]), int(job.keys[row]), job.rows
            for _ in range(min(ATTEMPTS, len(samples))):
                height, width = int(samples.height[index]), int(samples.width[index])
                draw_row(row, key, height, width, source.seed, job.epoch, self._recipes, scratch, rows)
                # of coefficients as far as the views show them, and so with the native engine's verdict on damage
                pixels = decode(samples, index, rows.boxes[row])
                if pixels is not None:
                    show_row(row, pixels.ctypes.data, height, width, self._recipes, source.colours, scratch, rows)
                    rows.index[row], job.label[row] = index, samples.label[index]
                    break
                index = key = source.after(index)
            else:
                rows.index[row] = -1
            done += 1
        return done

    def close(self) -> None:
        """Nothing is held."""


def decode(samples: Samples, index: int, boxes: np.ndarray | None = None) -> np.ndarray | None:
    """A sample's uint8 [H, W, 3], upright, of the size that `samples` promises; None where it cannot be had.

    Of coefficients only what `boxes` int32 [m, 4] cover need be there, where they are given.
    """
    height, width = int(samples.height[index]), int(samples.width[index])
    try:
        payload = samples.payload(index)
        if samples.mode[index] == RAW:
            return payload.reshape(height, width, 3)
        if samples.mode[index] == COEFFICIENTS:
            return unpack_pixels(payload, height, width, boxes)
        if samples.mode[index] == JPG:
            return decode_jpeg(payload.tobytes(), height, width)
        return decode_upright(io.BytesIO(payload.tobytes()), height, width)
    except Exception:  # a file that has gone; and Pillow raises nearly every kind there is on damaged data
        return None
