"""The engine without FFCV: Pillow decodes, the same compiled function makes the views."""

import io

import numpy as np
from PIL import Image

from .beton import RAW, Beton
from .engine import ATTEMPTS, Job, Source
from .scratch import Scratch
from .vectors import fetch_add
from .views import fill_row


class TorchEngine:
    """Works wherever numba and Pillow do. Its pictures may differ from the FFCV engine's by the decoder alone."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._recipe = source.settings.recipe()

    def fill(self, job: Job, scratch: Scratch) -> int:
        """See Engine."""
        source, beton = self._source, self._source.beton
        done = 0
        while (row := fetch_add(job.counter)) < len(job.indices):
            index = int(job.indices[row])
            pixels = None
            for _ in range(min(ATTEMPTS, len(beton))):
                pixels = _decode(beton, index)
                if pixels is not None:
                    break
                index = (index + 1) % len(beton)
            if pixels is None:
                job.rows.index[row] = -1
            else:
                height, width = pixels.shape[:2]
                fill_row(
                    row, index, pixels.ctypes.data, height, width,
                    source.seed, job.epoch, self._recipe, source.shorter, scratch, job.rows,
                )  # fmt: skip
            done += 1
        return done


def _decode(beton: Beton, index: int) -> np.ndarray | None:
    """uint8 [H, W, 3], or None where the sample does not decode."""
    payload = beton.payload(index)
    shape = (int(beton.height[index]), int(beton.width[index]), 3)
    if beton.mode[index] == RAW:
        return payload.reshape(shape)
    try:
        with Image.open(io.BytesIO(payload.tobytes()), formats=("JPEG",)) as image:
            if image.size != (shape[1], shape[0]) or image.mode not in ("RGB", "L"):
                return None
            return np.ascontiguousarray(image.convert("RGB"))
    except Exception:  # Pillow raises nearly every kind there is on damaged data
        return None
