"""The images of a run: opened, identified, and turned into batches on the device with the next one on its way."""

import contextlib
from collections.abc import Generator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fastpmae.config import Config
from fastpmae.distributed.ranks import Ranks
from fastpmae.model.build import shape_of, view_settings, views_needed
from fastpmae.pretraining.data_wait import DeviceWait, HostWait, Wait
from fastpmae.run.images import counted
from fastpmae_kernels import photometric
from fastpmae_loaders import Batch, DaliSettings, PairedViews, Samples, uniforms
from fastpmae_loaders.engines.base import shown
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.machine import loader_threads

DROP_PATH = 0
"""Stochastic depth's own counters, beside those of views and masks."""

IMAGES_AHEAD = 512
"""With both views of 224 pixels 154 MB."""


def shared_out(config: Config, ranks: int) -> tuple[Config, list[str]]:
    """Settings whose --accumulate shares the batch out over this many ranks, and a remark where it is not as asked for.

    The next larger one is taken, so that a rank never computes more images at a time than it was asked to. With
    `--sinkhorn-over step`, or without pseudo labels, the numbers stay the same; else the micro-batches are others, and
    a run that was started with different ones refuses to be resumed.

    Raises:
        UserError: where no --accumulate does; it names numbers of ranks that fit.
    """
    batch, asked = config.optimizer.batch_size, config.optimizer.accumulate
    share, rest = divmod(batch, ranks)
    if rest or not share:
        fewer = next(number for number in range(min(ranks - 1, batch), 0, -1) if batch % number == 0)
        more = next((number for number in range(ranks + 1, min(4 * ranks, batch) + 1) if batch % number == 0), None)
        fit = f"{fewer} or {more} ranks do" if more else f"{fewer} rank{'s do' if fewer > 1 else ' does'}"
        sizes = " and ".join(str(size) for size in (ranks * share, ranks * (share + 1)) if size)
        raise UserError(
            f"--batch-size {batch} does not share out evenly over {ranks} ranks, whatever --accumulate is: {fit}, as "
            f"--batch-size {sizes} would on {ranks}"
        )
    fitting = next(number for number in range(min(asked, share), share + 1) if share % number == 0)
    if fitting == asked:
        return config, []
    return config.using(accumulate=fitting), [
        f"--accumulate {asked} does not share {batch} images out over {ranks} rank{'s' * (ranks > 1)}: it is {fitting} "
        f"here, with micro-batches of {share // fitting}"
    ]


def micro_batch_size(config: Config, ranks: Ranks) -> int:
    """Images that one rank computes at a time. Raises UserError where the batch cannot be shared out evenly."""
    config, _ = shared_out(config, ranks.size)
    return config.optimizer.batch_size // (ranks.size * config.optimizer.accumulate)


def batches_ahead(size: int, config: Config) -> int:
    """Batches that are made ahead: of small ones more, so that a few slow images do not make the loop wait.

    DALI may make them on the GPU, whose memory is worth more.
    """
    return 2 if config.data.loader == "dali" else min(max(2, -(-IMAGES_AHEAD // size)), 64)


def steps_in_epoch(images: Samples, config: Config, ranks: Ranks) -> int:
    """Steps of an epoch. Raises UserError when there is less than one batch, or it cannot be shared out evenly."""
    micro_batch_size(config, ranks)
    count = shown(images)
    if count < config.optimizer.batch_size:
        raise UserError(
            f"{images.path} holds {counted(images)}, less than one batch of {config.optimizer.batch_size}: "
            "choose a smaller --batch-size"
        )
    return count // config.optimizer.batch_size


def make_loader(images: Samples, config: Config, ranks: Ranks) -> PairedViews:
    """This rank's loader: micro-batches of the views that are needed, masks and folds."""
    size = micro_batch_size(config, ranks)
    return PairedViews(
        images,
        size,
        engine=config.data.loader,
        settings=view_settings(config),
        seed=config.run.seed,
        rank=ranks.rank,
        world_size=ranks.size,
        workers=loader_threads(config.efficiency.workers, ranks.local_size),
        ahead=batches_ahead(size, config),
        bad_fraction=config.data.bad_fraction,
        page_order=config.data.page_order == "on",
        drop_last=True,
        views=views_needed(config),
        augment_on="device" if config.efficiency.augment_on == "device" else "cpu",
        device=ranks.device,
        colour=photometric if config.efficiency.augment_on == "device" else None,
        dali=DaliSettings(config.data.dali_part, config.data.hw_decoder_load) if config.data.loader == "dali" else None,
    )


def stochastic_depth(config: Config, epoch: int, index: np.ndarray) -> Float[Tensor, "batch depth 2"] | None:
    """What each block's two branches are scaled by for each image, on the CPU: 0 where dropped, else 1 / (1 - rate).

    A function of (seed, epoch, sample, block) alone; the rate grows evenly from 0 in the first block.
    """
    if config.network.drop_path == 0:
        return None
    depth = shape_of(config.network).depth
    drawn = uniforms(config.run.seed, epoch, index, DROP_PATH, 2 * depth)
    rate = torch.linspace(0, config.network.drop_path, depth).view(1, depth, 1)
    return (torch.from_numpy(drawn).view(-1, depth, 2) >= rate).float() / (1 - rate)


class Prefetcher:
    """Micro-batches on the device; counts the time that it waited for them and how often an image did not decode.

    Args:
        bad_images: of this rank so far; an image counts each time, so that one that is bad counts once an epoch.
        wait: the clock; by default the device's own.
    """

    def __init__(
        self, loader: PairedViews, config: Config, device: torch.device, bad_images: int = 0, wait: Wait | None = None
    ):
        self.loader, self.config = loader, config
        on_gpu = device.type == "cuda"
        self.wait: Wait = wait or (DeviceWait(config.optimizer.accumulate) if on_gpu else HostWait())
        self.bad_images = bad_images
        self.unreported: list[int] = []

    def batches(
        self, step: int, steps_per_epoch: int
    ) -> Generator[tuple[Batch, Float[Tensor, "batch depth 2"] | None], None, None]:
        """The micro-batches from a step of the run on, epoch after epoch and without end."""
        accumulate = self.config.optimizer.accumulate
        while True:
            epoch, place = divmod(step, steps_per_epoch)
            with contextlib.closing(self.epoch(epoch, first_batch=place * accumulate)) as batches:
                for _ in range((steps_per_epoch - place) * accumulate):
                    yield next(batches)
            step = (epoch + 1) * steps_per_epoch

    def epoch(
        self, epoch: int, first_batch: int
    ) -> Generator[tuple[Batch, Float[Tensor, "batch depth 2"] | None], None, None]:
        """The micro-batches of an epoch from `first_batch` on, each with its stochastic depth."""
        self.wait.ask()
        self.loader.load_state_dict({**self.loader.state_dict(), "epoch": epoch, "batch": first_batch})
        for batch in self.loader:
            self.bad_images += len(batch.failed)
            self.unreported += batch.failed
            drop_path_scale = stochastic_depth(self.config, epoch, batch.samples)
            if drop_path_scale is not None:
                drop_path_scale = self.loader.transfer.carry(drop_path_scale)
            self.wait.have()
            yield batch, drop_path_scale
            self.wait.ask()

    def take_wait(self) -> float:
        """Seconds that the device has waited since the last call."""
        return self.wait.seconds()

    def take_failed(self) -> list[int]:
        """Samples that did not decode since the last call."""
        failed, self.unreported = self.unreported, []
        return failed
