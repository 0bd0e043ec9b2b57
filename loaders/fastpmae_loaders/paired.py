"""`PairedViews`: the training loader. One decode, two views or any others, visible patches, folds."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from types import TracebackType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastpmae_loaders.bad_samples import BadSamples
from fastpmae_loaders.batch import Batch, batch_of
from fastpmae_loaders.engines.base import (
    Job,
    Samples,
    Source,
    advice,
    by_page,
    check_whole,
    chosen,
    digest,
    identity,
    in_a_circle,
    make_job,
    shown,
)
from fastpmae_loaders.engines.dali_settings import DaliSettings, dali_of
from fastpmae_loaders.engines.names import DEFAULT_ENGINE
from fastpmae_loaders.engines.runner import Runner
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.folders import open_samples
from fastpmae_loaders.mixture import order_of
from fastpmae_loaders.order import Order, deal
from fastpmae_loaders.position import position_in
from fastpmae_loaders.recipes import MOST_VIEWS, View, with_shared
from fastpmae_loaders.sampling import check_key
from fastpmae_loaders.settings import ViewSettings
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.transfer import Sent, Transfer, device_named, pinned
from fastpmae_loaders.values import checked

Colour = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class PairedViews:
    """Batches of two views (or of `views`) and a mask, the same bits for the same (seed, epoch, sample) always.

    `batch_size` is that of one rank. Global batch b of an epoch is places b G ... (b + 1) G - 1 of the epoch's
    order, G = batch_size * world_size, and rank r shows the r-th part of them; in page order they are sorted by page
    before, so that few ranks read the same page. Without `drop_last` the last
    global batch may be short: it is shared out as evenly as it goes, and a rank may get an empty batch of it,
    so that all ranks see the same number of batches.

    `iter()` begins the loader's epoch anew, whatever became of the iteration before, and does not move on to the
    next epoch: call `set_epoch`. Only after `load_state_dict` it goes on from the position that was loaded, as in
    torchdata's StatefulDataLoader. The position counts the batches that were taken from the iteration begun last.
    Several iterations may run at once.

    Args:
        samples: a .beton file, a set of them, for the other engines also a folder of images or tar shards; or its path,
            or several paths, which are mixed, each with a weight behind it (`a.beton:0.7`).
        engine: "native" (no C library is needed), "ffcv", "dali", or "torch" (Pillow decodes).
        settings: the pair of views, and the masks.
        views: these views instead of the pair, as many as wanted, still with one decode a sample. The masks are
            those of the first; there are none where its size is no multiple of 16 and no settings say otherwise.
        indices: these samples alone, by their numbers, as torch's `Subset` has it; one may be named more than once.
            Their views are what they are without it.
        shuffle: a new order each epoch; otherwise the file's own, or that of the indices.
        page_order: shuffle page by page (see epoch_order); None does so of sets, and what is larger than memory.
        workers: threads; 0 is one, for code that takes it for a number of processes. torch's own threads stay as many.
        bad_fraction: above this share of samples that do not decode, of those tried so far, each counted once, the
            iteration stops.
        ahead: batches made before they are asked for.
        augment_on: "device" leaves the colours to `colour`, for whole batches on the device, once they are there:
            the CPU then decodes and crops alone.
        device: where batches are handed over, for the stream that is current then; with None they stay in the host's
            memory, and "device" above means the CPU. To a GPU a batch is copied, and its colours changed, while the one
            before is computed on: one more batch lies in its memory.
        pin_memory: make batches on the host where the system leaves them, so that a GPU's copy of them need not be
            waited for; None does so where `device` is a GPU.
        colour: (images uint8 [B, 3, S, S], factors [B, 5], choices [B, 9], solarise threshold) -> images; None
            takes `device_colour.change_colours`.
        dali: settings of engine "dali" alone.

    Raises:
        UserError: for arguments that do not fit, files that cannot be read, and too many bad images.
    """

    @checked
    def __init__(
        self,
        samples: Samples | Address | str | os.PathLike[str] | Sequence[str],
        batch_size: int,
        engine: str = DEFAULT_ENGINE,
        settings: ViewSettings | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
        bad_fraction: float = 0.01,
        page_order: bool | None = None,
        ahead: int = 2,
        views: Sequence[View] | None = None,
        augment_on: Literal["cpu", "device"] = "cpu",
        device: torch.device | str | None = None,
        colour: Colour | None = None,
        dali: DaliSettings | None = None,
        pin_memory: bool | None = None,
        indices: Sequence[int] | np.ndarray | Tensor | None = None,
    ) -> None:
        self.samples = open_samples(samples)
        self.indices = None if indices is None else chosen(self.samples, indices)
        self.count = shown(self.samples) if self.indices is None else len(self.indices)
        self.settings = settings or ViewSettings()
        self.views = self.settings.views if views is None else with_shared(views)
        if not 1 <= len(self.views) <= MOST_VIEWS:
            raise UserError(f"{len(self.views)} views make no batch: ask for 1 to {MOST_VIEWS}")
        size = self.views[0].size
        masked = settings is not None or size % self.settings.patch_size == 0
        self.settings = self.settings.of_size(size) if masked else self.settings
        self._fold_sizes = self.settings.fold_sizes if masked else ()
        if batch_size < 1:
            raise UserError(f"batch_size = {batch_size} must be at least 1")
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} must be at least 0 and below world_size {world_size}")
        if not 0 <= bad_fraction <= 1:
            raise UserError(f"bad_fraction = {bad_fraction} must be between 0 and 1")
        check_key(seed, 0)
        self.batch_size = batch_size
        self.global_batch = batch_size * world_size
        self.rank, self.world_size = rank, world_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.bad_fraction = bad_fraction
        self.workers = workers
        self.page_order = by_page(self.samples) if page_order is None else page_order
        if len(self) == 0:
            raise UserError(
                f"{self.samples.path}: {self.count} samples make no batch of {self.global_batch}; "
                "lower the batch size or set drop_last=False"
            )
        self._epoch = 0
        self._batch = 0
        self._resumed = False
        self._begun = 0
        self._order: tuple[tuple[int, bool], Order] | None = None
        self.device = device_named(device)
        self.transfer = Transfer(self.device or torch.device("cpu"))
        on_gpu = self.transfer.on_gpu
        self.pin_memory = pinned(pin_memory, on_gpu)
        self._colour = None
        if augment_on == "device" and any(view.coloured for view in self.views):
            from fastpmae_loaders.pixels.device_colour import change_colours

            self._colour = colour or change_colours
        elif colour is not None and augment_on == "cpu":
            raise UserError("colour= changes colours on the device: leave it out, or give augment_on='device' too")
        self._source = Source(
            self.samples,
            self.views,
            seed,
            self.settings.patches if masked else 0,
            self.settings.visible if masked else 0,
            colours=self._colour is None,
            workers=workers or 1,
            device=self.device,
            made_on_device=engine == "dali" and on_gpu,
            pin_memory=self.pin_memory,
            dali=dali_of(dali, engine),
            following=np.empty(0, np.int64) if self.indices is None else in_a_circle(self.indices, len(self.samples)),
        )
        self._bad = BadSamples(self.samples, self.count, bad_fraction, self._source.after)
        self._runner = Runner(self._source, engine, ahead)

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        whole, rest = divmod(self.count, self.global_batch)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def epoch(self) -> int:
        """The epoch whose views the next iteration shows."""
        return self._epoch

    @property
    def failed(self) -> list[int]:
        """Samples that did not decode so far, each once, in the order in which they were met."""
        return self._bad.failed

    # Digests for the position, made when one is first asked for.
    @cached_property
    def _images(self) -> int:
        return identity(self.samples)

    @cached_property
    def _indices(self) -> int:
        if self.indices is None or np.array_equal(self.indices, np.arange(len(self.samples))):
            return 0
        return digest(self.indices)

    @cached_property
    def _pages(self) -> int:
        # of a set the digest of its images says it all
        return self._images if hasattr(self.samples, "identity") else digest(np.asarray(self.samples.page_of))

    def set_epoch(self, epoch: int | np.integer) -> None:
        """Turn to an epoch's beginning, or keep the position within it that `load_state_dict` has just set."""
        epoch = int(epoch) if isinstance(epoch, np.integer) else epoch  # a position holds plain numbers
        check_key(self.seed, epoch)
        if epoch != self._epoch or not self._resumed:
            self._batch = 0
            self._resumed = False
        self._epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """The position, as plain integers, and what its order depends on: `images`, `indices` and `pages` are digests
        of the images' sizes, of `indices=` (0 without), and of what lies where on the disk (0 without a shuffle in page
        order)."""
        return {
            "epoch": self._epoch,
            "batch": self._batch,
            "seed": self.seed,
            "samples": self.count,
            "images": self._images,
            "indices": self._indices,
            "pages": self._pages if self.page_order and self.shuffle else 0,
            "global_batch": self.global_batch,
            "shuffle": int(self.shuffle),
            "page_order": int(self.page_order),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position: the next `iter()` continues there, bit for bit, also on another number of ranks.

        What a state of an earlier version lacks is not asked for.

        Raises:
            UserError: where the state is of other data, another seed or order, or falls within a batch.
        """
        found = position_in(state, self.state_dict(), lambda: self._pages)
        self._epoch, self._batch, self.page_order = found.epoch, min(found.batch, len(self)), found.page_order
        self._resumed = True
        # iterations that still run no longer move the position
        self._begun += 1

    def __iter__(self) -> "Iteration":
        check_whole(self.samples)
        if not self._resumed:
            self._batch = 0
        self._resumed = False
        self._begun += 1
        return Iteration(self, self._batch)

    def batch_of(self, index: Sequence[int] | np.ndarray) -> Batch:
        """The samples named, as the current epoch shows them; the position does not change.

        Raises:
            UserError: for samples that the file does not hold, or that do not decode.
        """
        wanted = np.array(index, np.int64)
        for sample in wanted[(wanted < 0) | (wanted >= len(self.samples))]:
            raise UserError(f"{self.samples.path} has no sample {sample}: it holds {len(self.samples)}, counted from 0")
        stream = self._runner.stream(lambda _: make_job(wanted, self._epoch, self._source), 0, 1)
        try:
            job = stream.take()
        finally:
            self._runner.end(stream)
        if job is None:
            raise UserError("the loader was closed")
        wrong = wanted[wanted != job.rows.index]
        if len(wrong):
            check_whole(self.samples, unchanged=True)
            raise UserError(
                f"{self.samples.path}: sample {wrong[0]} does not decode; {advice(self.samples, int(wrong[0]))}"
            )
        return self.transfer.take(self._send(job))

    def close(self) -> None:
        """End every iteration and its threads."""
        self._runner.close()

    def __enter__(self) -> "PairedViews":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def order(self, epoch: int) -> np.ndarray:
        """Sample indices of a whole epoch over all ranks: int64 [n]."""
        return self._order_of(epoch).places(0, self.count) % len(self.samples)

    def _order_of(self, epoch: int) -> Order:
        key = (epoch, self.page_order)
        if self._order is None or self._order[0] != key:
            self._order = key, order_of(self.samples, self.indices, self.seed, epoch, self.shuffle, self.page_order)
        return self._order[1]

    def share(self, number: int) -> slice:
        """As many places of an epoch's order as this rank's batch `number` shows; without page order just these."""
        start = number * self.global_batch
        count = min(self.global_batch, self.count - start)
        # all parts are equal unless the batch is short
        first, last = (start + count * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return slice(first, last)

    def samples_of(self, number: int) -> np.ndarray:
        """The samples of this rank's batch `number` in the loader's epoch: int64 [B]."""
        return self._keys(self._order_of(self._epoch), number) % len(self.samples)

    def _keys(self, order: Order, number: int) -> np.ndarray:
        if not (self.page_order and self.shuffle and self.world_size > 1):
            share = self.share(number)
            return order.places(share.start, share.stop)
        start = number * self.global_batch
        keys = order.places(start, min(start + self.global_batch, self.count))
        return keys[deal(self.samples.page_of[keys % len(self.samples)], self.rank, self.world_size)]

    def _job(self, order: Order, epoch: int, number: int) -> Job:
        return make_job((keys := self._keys(order, number)) % len(self.samples), epoch, self._source, keys)

    def _send(self, job: Job) -> Sent[Batch]:
        """The job's rows as a batch on its way to where it was asked for."""
        batch = batch_of(job, self._fold_sizes, [])
        # what DALI is still making on the GPU is waited for there
        return self.transfer.send(batch, None if self._colour is None else self._recoloured, before=job.wait)

    def _recoloured(self, batch: Batch) -> Batch:
        """The batch with its colours changed where it is."""
        assert self._colour is not None
        changed = [
            self._colour(images, batch.factors[:, number], batch.choices[:, number], view.solarise_threshold)
            if view.coloured
            else images
            for number, (view, images) in enumerate(zip(self.views, batch.views, strict=True))
        ]
        return replace(batch, views=tuple(changed))


class Iteration(Iterator[Batch]):
    """One pass over the rest of an epoch. Its threads end with it: at the end, on `close`, or when dropped."""

    def __init__(self, loader: PairedViews, start: int) -> None:
        self._loader = loader
        self._number = start
        self._turn = loader._begun
        self._closed = False
        self._next: tuple[Job, Sent[Batch]] | None = None
        order, epoch = loader._order_of(loader.epoch), loader.epoch
        self._epoch = epoch
        job_of, keys_of = partial(loader._job, order, epoch), partial(loader._keys, order)
        self._stream = loader._runner.stream(job_of, start, len(loader), keys_of)

    def __iter__(self) -> "Iteration":
        return self

    def __next__(self) -> Batch:
        loader = self._loader
        try:
            sent = self._next or self._sent(wait=True)
            self._next = None
            if sent is None or self._stream.closed:
                raise StopIteration
            job, on_its_way = sent
            failed = loader._bad.account(job)
            if loader.transfer.on_gpu:
                # what is not ready yet is sent when it is asked for: then the GPU has to wait for it anyway
                self._next = self._sent(wait=False)
        except BaseException:
            self.close()
            raise
        number = self._number
        self._number += 1
        if loader._begun == self._turn and loader._epoch == self._epoch:
            loader._batch = self._number
        return replace(loader.transfer.take(on_its_way), failed=failed, number=number)

    def _sent(self, wait: bool) -> tuple[Job, Sent[Batch]] | None:
        """The next job, and its batch on its way; None at the end, and without `wait` where it is not ready."""
        job = self._stream.take(wait)
        return None if job is None else (job, self._loader._send(job))

    def close(self) -> None:
        """End the threads. Harmless when done twice."""
        if not self._closed:
            self._loader._runner.end(self._stream)
            self._next = None
            self._closed = True

    def __del__(self) -> None:
        # Python passes over an interrupt that falls into here: after an epoch's end there is nothing left to do
        if hasattr(self, "_stream"):
            self.close()
