"""Semantic segmentation: a ViT under UPerNet, trained on crops and tested by sliding windows."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from fastpmae.distributed.batch_norm import over_ranks
from fastpmae.distributed.ranks import Ranks, mean_over_ranks, to_device
from fastpmae.evaluate.augment import START, drawn_from, take_over_drop_path
from fastpmae.evaluate.backbone import Backbone
from fastpmae.evaluate.datasets import half
from fastpmae.evaluate.dense.crops import segmentation_crop, whole_image
from fastpmae.evaluate.dense.labelled import IGNORE, Masked, Segmentation
from fastpmae.evaluate.dense.mask_pictures import Overlay, best_median_worst, write_overlays
from fastpmae.evaluate.dense.order import CROP, Place, drawn, fetched
from fastpmae.evaluate.dense.overlap import MaskScores, confusion_of
from fastpmae.evaluate.dense.pyramid import parameter_groups, size_multiple, tapped
from fastpmae.evaluate.dense.recipe import SegmentConfig
from fastpmae.evaluate.dense.training import Setting, Task, train_dense
from fastpmae.evaluate.dense.upernet import Segmenter, pixel_loss, upsampled
from fastpmae.evaluate.dense.weights import write_network
from fastpmae.evaluate.dense.windows import sliding_logits
from fastpmae.evaluate.finetune_state import describe_backbone
from fastpmae.run.signals import Stop
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.machine import loader_threads


@dataclass(frozen=True)
class Segmenting:
    """A network and what it needs besides to segment whole images."""

    model: Segmenter
    backbone: Backbone
    config: SegmentConfig
    device: torch.device

    @torch.inference_mode()
    def logits(
        self, planes: UInt8[Tensor, "3 rows columns"], height: int, width: int
    ) -> Float[Tensor, "1 classes height width"]:
        """What the network makes of an image that is resized for the test, at another size."""
        image = self.backbone.normalised(to_device(planes[None], self.device))
        config, patch_size = self.config, self.model.backbone.patch_size
        least = self.model.backbone.fixed_side or size_multiple(patch_size)
        with half(self.device):
            found = sliding_logits(
                lambda windows: self.model(windows)[0],
                image,
                window=config.crop_size,
                stride=max(1, int(config.crop_size * config.stride)),
                patch_size=patch_size,
                least=least,
            )
        return found if found.shape[-2:] == (height, width) else upsampled(found, (height, width))


def make_segmenter(backbone: Backbone, config: SegmentConfig, classes: int) -> Segmenter:
    """The network at its start, with stochastic depth that is set from outside.

    Raises:
        UserError: for a crop that the network's patches or the pyramid do not divide, or what is no plain ViT.
    """
    with drawn_from(START, config.seed):
        body = tapped(
            backbone,
            config.drop_path,
            relative=config.relative_positions,
            checkpointing=config.activation_checkpointing,
        )
        least = size_multiple(body.patch_size)
        if config.crop_size < least:
            raise UserError(f"--crop-size {config.crop_size}: at least {least} for patches of {body.patch_size} pixels")
        model = Segmenter(body, classes, config.channels, config.dropout)
    take_over_drop_path(model)
    return model


def train_segmenter(
    train: Segmentation,
    val: Segmentation,
    backbone: Backbone,
    config: SegmentConfig,
    setting: Setting,
    ranks: Ranks,
    *,
    resume: bool = False,
    steps: int | None = None,
    progress: Progress | None = None,
) -> tuple[MaskScores, Segmenting]:
    """Train, test, and leave `segmenter.safetensors` in the folder (see `train_dense`).

    Args:
        backbone: for images of `config.crop_size`.

    Returns:
        The last test's scores, and the network.

    Raises:
        UserError, RunError, Interrupted: as `train_dense`; and UserError for a batch of one image.
    """
    if config.micro_batch < 2:
        raise UserError(
            f"--batch-size {config.batch_size} with --accumulate {config.accumulate} computes one image at a time, and "
            "UPerNet normalises the mean of each image over the images: 2 at least"
        )
    model = make_segmenter(backbone, config, len(train.names)).to(setting.device)
    over_ranks(model, ranks.group, setting.device)
    segmenting = Segmenting(model, backbone, config, setting.device)

    def draw(place: Place) -> tuple[Tensor, Tensor]:
        pixels, mask = train.entries[place[1]].read()
        return segmentation_crop(pixels, mask, config, backbone.mean, drawn(CROP, config.seed, place))

    def loss(network: nn.Module, _: list[Place], examples: list[Any]) -> Float[Tensor, ""]:
        images, masks = (to_device(torch.stack(each), setting.device) for each in zip(*examples, strict=True))
        logits, auxiliary = network(backbone.normalised(images))
        total = pixel_loss(logits, masks, IGNORE)
        return total + config.auxiliary_weight * pixel_loss(auxiliary, masks, IGNORE)

    def evaluate(progress: Progress, stop: Stop) -> MaskScores | None:
        return evaluate_segmenter(segmenting, val, ranks, progress, stop, workers=setting.workers)

    told = {"segment": json.loads(json.dumps(dataclasses.asdict(config))), "classes": list(train.names)}
    record = {
        "segment": told["segment"],
        "backbone": describe_backbone(backbone),
        "train": train.describe(),
        "set": {"classes": list(train.names)},
    }
    parts = [model.pyramid, model.decoder, model.classify, model.auxiliary]
    task = Task(
        "segment",
        config,
        record,
        len(train),
        config.iterations,
        config.rate,
        model,
        parameter_groups(
            model.backbone, parts, lr=config.lr, weight_decay=config.weight_decay, layer_decay=config.layer_decay
        ),
        draw,
        loss,
        evaluate,
        lambda figures: f"mIoU {figures['miou']:.2f} %",
        lambda: write_network(setting.folder, "segment", model, backbone, told),
    )
    scores = train_dense(task, setting, resume=resume, steps=steps, progress=progress, ranks=ranks)
    return scores, segmenting


def evaluate_segmenter(
    segmenting: Segmenting,
    images: Segmentation,
    ranks: Ranks,
    progress: Progress,
    stop: Stop | None = None,
    *,
    workers: int = 0,
) -> MaskScores | None:
    """The scores on a set of images, which the ranks share; None where a signal came before the end."""
    segmenting.model.eval()
    classes, count = len(images.names), len(images)
    confusion = torch.zeros(classes, classes, dtype=torch.float64)
    by_image = torch.zeros(count, dtype=torch.float64)
    mine, stopped = range(ranks.rank, count, ranks.size), False
    read = _read_ahead(images.entries, mine, segmenting.config, loader_threads(workers, ranks.local_size))
    with progress.count(len(mine), "test images"):
        for number, planes, mask in read:
            stopped = stop is not None and bool(stop.signal)
            if stopped:
                break
            predicted = segmenting.logits(planes, *mask.shape)[0].argmax(dim=0)
            found = confusion_of(to_device(mask, segmenting.device), predicted, classes)
            confusion += found
            by_image[number] = MaskScores(found, 1).iou.nanmean()
            progress.advance()
    if ranks.max_over_ranks(stopped)[0]:
        return None
    confusion, by_image = (mean_over_ranks(each, ranks.group) * ranks.size for each in (confusion, by_image))
    return MaskScores(confusion.round().long(), count, by_image)


def _read_ahead(
    entries: Sequence[Masked], numbers: Sequence[int], config: SegmentConfig, workers: int
) -> Iterator[tuple[int, UInt8[Tensor, "3 rows columns"], Int[Tensor, "height width"]]]:
    """Test images, resized, with their masks, which keep their size."""

    def read(place: Place) -> tuple[Tensor, Tensor]:
        pixels, mask = entries[place[1]].read()
        return whole_image(pixels, config.short_side, config.long_side), torch.from_numpy(mask.astype("int16"))

    for places, examples in fetched(read, ([(0, number)] for number in numbers), workers):
        yield places[0][1], *examples[0]


def draw_segmentations(path: Path, segmenting: Segmenting, images: Segmentation, scores: MaskScores) -> None:
    """A picture of the best, a median and the worst of the tested images, by their own mIoU."""
    assert scores.by_image is not None
    segmenting.model.eval()
    shown = []
    for word, number in best_median_worst(scores.by_image.numpy()).items():
        entry, config = images.entries[number], segmenting.config
        pixels, mask = entry.read()
        logits = segmenting.logits(whole_image(pixels, config.short_side, config.long_side), *mask.shape)
        words = f"{word}: {scores.by_image[number]:.1f} %, {entry.name}"
        shown.append(Overlay(words, pixels, mask, logits[0].argmax(dim=0).cpu().numpy().astype(mask.dtype)))
    if shown:
        write_overlays(path, shown, images.names, f"{scores.figures()['miou']:.1f} % mIoU of {scores.images:,} images")
