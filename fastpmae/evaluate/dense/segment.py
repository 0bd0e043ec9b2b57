"""Semantic segmentation: a ViT under UPerNet, trained on crops and tested by sliding windows."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastpmae.distributed.batch_norm import over_ranks
from fastpmae.distributed.ranks import Ranks, mean_over_ranks, to_device
from fastpmae.evaluate.augment import START, drawn_from, take_over_drop_path
from fastpmae.evaluate.backbone import Backbone
from fastpmae.evaluate.dense.crops import segmentation_crop
from fastpmae.evaluate.dense.labelled import IGNORE, Segmentation
from fastpmae.evaluate.dense.mask_pictures import Overlay, best_median_worst, write_overlays
from fastpmae.evaluate.dense.order import CROP, Place, drawn
from fastpmae.evaluate.dense.overlap import MaskScores, confusion_of
from fastpmae.evaluate.dense.pyramid import parameter_groups, size_multiple, tapped
from fastpmae.evaluate.dense.recipe import SegmentConfig
from fastpmae.evaluate.dense.trained import TrainedSegmenter
from fastpmae.evaluate.dense.training import Setting, Task, train_dense
from fastpmae.evaluate.dense.upernet import Segmenter, pixel_loss
from fastpmae.evaluate.dense.weights import write_network
from fastpmae.evaluate.dense.whole_images import judge_images
from fastpmae.evaluate.finetune_state import describe_backbone
from fastpmae.run.signals import Stop
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import UserError


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
) -> tuple[MaskScores, TrainedSegmenter]:
    """Train, test, and leave `segmenter.safetensors` in the folder (see `train_dense`).

    Args:
        backbone: for images of `config.crop_size`.

    Returns:
        The last test's scores, and the network.

    Raises:
        UserError, RunError, Interrupted: as `train_dense`; and UserError for one class, or a batch of one image.
    """
    if len(train.names) < 2:
        raise UserError(f"{train.path} holds no two classes ({', '.join(train.names)}): there is nothing to tell apart")
    config.check_images()
    model = make_segmenter(backbone, config, len(train.names)).to(setting.device)
    over_ranks(model, ranks.group, setting.device)
    segmenter = TrainedSegmenter(model, backbone, config, setting.device, train.names)

    def draw(place: Place) -> tuple[Tensor, Tensor]:
        pixels, mask = train.entries[place[1]].read()
        return segmentation_crop(pixels, mask, config, backbone.mean, drawn(CROP, config.seed, place))

    def loss(network: nn.Module, _: list[Place], examples: list[Any]) -> Float[Tensor, ""]:
        images, masks = (to_device(torch.stack(each), setting.device) for each in zip(*examples, strict=True))
        logits, auxiliary = network(backbone.normalised(images))
        total = pixel_loss(logits, masks, IGNORE)
        return total + config.auxiliary_weight * pixel_loss(auxiliary, masks, IGNORE)

    def evaluate(progress: Progress, stop: Stop) -> MaskScores | None:
        return evaluate_segmenter(segmenter, val, ranks, progress, stop, workers=setting.workers)

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
    return scores, segmenter


def evaluate_segmenter(
    segmenter: TrainedSegmenter,
    images: Segmentation,
    ranks: Ranks,
    progress: Progress,
    stop: Stop | None = None,
    *,
    workers: int = 0,
) -> MaskScores | None:
    """The scores on a set of images, which the ranks share; None where a signal came before the end."""
    segmenter.model.eval()
    classes, count = len(images.names), len(images)
    confusion = torch.zeros(classes, classes, dtype=torch.float64)
    by_image = torch.zeros(count, dtype=torch.float64)

    def read(number: int) -> tuple[Tensor, Tensor]:
        pixels, mask = images.entries[number].read()
        return segmenter.resized(pixels), torch.from_numpy(mask.astype("int16"))

    def judge(number: int, example: tuple[Tensor, Tensor]) -> None:
        planes, mask = example
        predicted = segmenter.classes(planes, *mask.shape)
        found = confusion_of(to_device(mask, segmenter.device), predicted, classes)
        confusion.add_(found)
        by_image[number] = MaskScores(found, 1).iou.nanmean()

    if not judge_images(count, read, judge, ranks, progress, stop, workers=workers):
        return None
    whole, each = (mean_over_ranks(part, ranks.group) * ranks.size for part in (confusion, by_image))
    return MaskScores(whole.round().long(), count, each)


def draw_segmentations(segmenter: TrainedSegmenter, images: Segmentation, scores: MaskScores, path: Path) -> None:
    """A picture of the best, a median and the worst of the tested images, by their own mIoU."""
    assert scores.by_image is not None
    segmenter.model.eval()
    shown = []
    for word, number in best_median_worst(scores.by_image.numpy()).items():
        entry = images.entries[number]
        pixels, mask = entry.read()
        words = f"{word}: {scores.by_image[number]:.1f} %, {entry.name.rsplit('/', 1)[-1]}"
        shown.append(Overlay(words, pixels, segmenter(pixels), mask))
    write_overlays(path, shown, images.names, f"{scores.figures()['miou']:.1f} % mIoU of {scores.images:,} images")
