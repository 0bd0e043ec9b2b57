"""Memory that our decoder works in, for whichever thread needs it next."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from fastpmae_loaders.engines.second_opinion import Images
from fastpmae_loaders.native.decoder import Workspace, make_workspace, planes_size


class Workspaces:
    """Workspaces for the largest JPEG, and the largest coefficients, of a file: one for each thread that decodes."""

    def __init__(self, images: Images, modes: tuple[int, ...]) -> None:
        coded = np.isin(images.mode, modes)
        height, width, size = (np.where(coded, side, 0) for side in (images.height, images.width, images.size))
        self._sizes = int(height.max()), int(width.max()), int(size.max()), int(planes_size(height, width).max())
        self._idle: list[Workspace] = []

    @contextmanager
    def lend(self) -> Iterator[Workspace]:
        """One that no other thread has meanwhile."""
        try:
            work = self._idle.pop()
        except IndexError:
            work = make_workspace(*self._sizes)
        try:
            yield work
        finally:
            self._idle.append(work)
