"""`PlainViews`: every image once, in the file's order, as evaluation shows it."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastpmae_loaders.engines.base import Samples, Source, advice, check_whole, chosen, make_job
from fastpmae_loaders.engines.names import DEFAULT_ENGINE
from fastpmae_loaders.engines.runner import Runner
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.folders import open_samples
from fastpmae_loaders.order import FileOrder, ListedOrder
from fastpmae_loaders.recipes import Interpolation, plain_view
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.transfer import pinned
from fastpmae_loaders.values import checked


class PlainViews:
    """Shorter side resized to image_size / crop_ratio, rounded down, with an antialiased filter, then the centre.

    Yields (images uint8 [B, 3, S, S], label int64 [B], index int64 [B]); the last batch may be short.

    Args:
        workers: threads; 0 is one.
        ahead: batches made before they are asked for.
        pin_memory: make the images where the system leaves them, so that a GPU's copy of them need not be waited for.
        interpolation: the filter (see `View`).
        indices: these samples alone, in this order.

    Raises:
        UserError: for arguments that do not fit, and for an image that does not decode, naming it: a feature
            of another image in its place would be a silent error.
    """

    @checked
    def __init__(
        self,
        samples: Samples | Address | str | os.PathLike[str] | Sequence[str],
        batch_size: int,
        image_size: int = 224,
        crop_ratio: float = 0.875,
        engine: str = DEFAULT_ENGINE,
        workers: int = 2,
        ahead: int = 2,
        pin_memory: bool = False,
        interpolation: Interpolation = "bicubic",
        indices: Sequence[int] | np.ndarray | torch.Tensor | None = None,
    ) -> None:
        self.samples = open_samples(samples)
        order = FileOrder(len(self.samples))
        self._order = order if indices is None else ListedOrder(chosen(self.samples, indices))
        if batch_size < 1:
            raise UserError(f"batch_size = {batch_size} must be at least 1")
        if not 2 <= image_size <= 4096:
            raise UserError(f"image_size = {image_size} must be between 2 and 4096")
        self.batch_size = batch_size
        view = plain_view(image_size, crop_ratio, interpolation)
        self._source = Source(self.samples, (view,), 0, workers=workers or 1, pin_memory=pinned(pin_memory, False))
        self._runner = Runner(self._source, engine, ahead)

    def __len__(self) -> int:
        """Batches."""
        return -(-len(self._order) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        check_whole(self.samples)

        def job(number: int):
            start = number * self.batch_size
            stop = min(start + self.batch_size, len(self._order))
            return make_job(self._order.places(start, stop), 0, self._source)

        stream = self._runner.stream(job, 0, len(self))
        try:
            while (done := stream.take()) is not None:
                wrong = np.flatnonzero(done.indices != done.rows.index)
                if len(wrong):
                    check_whole(self.samples, unchanged=True)
                    sample = int(done.indices[wrong[0]])
                    raise UserError(
                        f"{self.samples.path}: sample {sample} does not decode; {advice(self.samples, sample)}"
                    )
                yield done.views[0], done.tensors["label"], done.tensors["index"]
        finally:
            self._runner.end(stream)

    def close(self) -> None:
        """End every iteration and its threads."""
        self._runner.close()

    def __enter__(self) -> "PlainViews":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
