"""Object detection: a ViT under Faster or Mask R-CNN, trained on boxes (and masks) and tested by COCO's AP."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from fastpmae.distributed.batch_norm import over_ranks
from fastpmae.distributed.ranks import Ranks, to_device
from fastpmae.evaluate.augment import START, drawn_from, take_over_drop_path
from fastpmae.evaluate.backbone import Backbone
from fastpmae.evaluate.dense.average_precision import PACKAGE, BoxScores, Found, average_precision
from fastpmae.evaluate.dense.box_pictures import Sight, draw_boxes
from fastpmae.evaluate.dense.extra import imported
from fastpmae.evaluate.dense.labelled import Detection
from fastpmae.evaluate.dense.mask_pictures import best_median_worst
from fastpmae.evaluate.dense.matches import matches_of
from fastpmae.evaluate.dense.order import CROP, PROPOSALS, Place, drawn
from fastpmae.evaluate.dense.pyramid import parameter_groups, size_multiple, tapped
from fastpmae.evaluate.dense.rcnn import Detector
from fastpmae.evaluate.dense.recipe import DetectConfig
from fastpmae.evaluate.dense.scenes import Scene, detection_scene
from fastpmae.evaluate.dense.trained import TrainedDetector
from fastpmae.evaluate.dense.training import Setting, Task, train_dense
from fastpmae.evaluate.dense.weights import write_network
from fastpmae.evaluate.dense.whole_images import judge_images
from fastpmae.evaluate.finetune_state import describe_backbone
from fastpmae.run.signals import Stop
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import UserError


def make_detector(backbone: Backbone, config: DetectConfig, classes: int, *, masks: bool) -> Detector:
    """The network at its start, with stochastic depth that is set from outside.

    Raises:
        UserError: for what is no plain ViT, or has relative positions, which are for images of one size.
    """
    with drawn_from(START, config.seed):
        body = tapped(backbone, config.drop_path, checkpointing=config.activation_checkpointing)
        if body.fixed_side is not None:
            raise UserError(
                f"{backbone.source} has relative positions, for images of {body.fixed_side} pixels a side alone: a "
                "detector sees images of many sizes, and wants a plain ViT"
            )
        model = Detector(body, classes, config, masks=masks)
    take_over_drop_path(model)
    return model


def train_detector(
    train: Detection,
    val: Detection,
    backbone: Backbone,
    config: DetectConfig,
    setting: Setting,
    ranks: Ranks,
    *,
    masks: bool | None = None,
    resume: bool = False,
    steps: int | None = None,
    progress: Progress | None = None,
) -> tuple[BoxScores, TrainedDetector]:
    """Train, test, and leave `detector.safetensors` in the folder (see `train_dense`).

    Args:
        masks: learn the objects' outlines too; None where the training set has them.

    Returns:
        The last test's scores, and the network.

    Raises:
        UserError, RunError, Interrupted: as `train_dense`; and UserError where masks are wanted of a set without
            outlines, or faster-coco-eval is not installed.
    """
    imported("faster_coco_eval", PACKAGE)
    if masks and not train.has_outlines:
        raise UserError(f"--masks on: {train.path} has boxes alone, without the outlines of objects")
    masks = train.has_outlines if masks is None else masks
    check_labels(train)
    model = make_detector(backbone, config, len(train.names), masks=masks).to(setting.device)
    model.share(ranks.group)
    over_ranks(model, ranks.group, setting.device)
    detector = TrainedDetector(model, backbone, config, setting.device, train.names)
    multiple = size_multiple(model.backbone.patch_size)

    def draw(place: Place) -> Scene:
        return detection_scene(train.entries[place[1]], config, drawn(CROP, config.seed, place), masks=masks)

    def loss(network: nn.Module, places: list[Place], scenes: list[Any]) -> Float[Tensor, ""]:
        sizes = [(scene.image.shape[1], scene.image.shape[2]) for scene in scenes]
        # positions are interpolated to the padded size, which therefore is that of all ranks' images
        height, width = ranks.max_over_ranks(*(max(extents) for extents in zip(*sizes, strict=True)))
        height, width = (-(-extent // multiple) * multiple for extent in (height, width))
        images = torch.zeros(len(scenes), 3, height, width, device=setting.device)
        for place, (scene, size) in enumerate(zip(scenes, sizes, strict=True)):
            images[place, :, : size[0], : size[1]] = backbone.normalised(to_device(scene.image[None], setting.device))[
                0
            ]
        targets = [{name: to_device(each, setting.device) for name, each in scene.target.items()} for scene in scenes]
        keys = [drawn(PROPOSALS, config.seed, place).integers(2**62, size=2).tolist() for place in places]
        model.set_keys(*zip(*keys, strict=True))
        losses = network(images, sizes, targets)
        return torch.stack(list(losses.values())).sum()

    def evaluate(progress: Progress, stop: Stop) -> BoxScores | None:
        return evaluate_detector(detector, val, ranks, progress, stop, workers=setting.workers)

    told = {"detect": json.loads(json.dumps(dataclasses.asdict(config))), "classes": list(train.names), "masks": masks}
    record = {
        "detect": told["detect"],
        "backbone": describe_backbone(backbone),
        "train": train.describe(),
        "set": {"classes": list(train.names), "masks": masks},
    }
    task = Task(
        "detect",
        config,
        record,
        len(train),
        config.iterations_for(len(train)),
        lambda step: config.rate(step, len(train)),
        model,
        parameter_groups(
            model.backbone,
            model.new_parts,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        ),
        draw,
        loss,
        evaluate,
        lambda figures: f"AP {figures.get('ap', 0):.2f} %, AP50 {figures.get('ap50', 0):.2f} %",
        lambda: write_network(setting.folder, "detect", model, backbone, told),
    )
    scores = train_dense(task, setting, resume=resume, steps=steps, progress=progress, ranks=ranks)
    return scores, detector


def check_labels(images: Detection) -> None:
    """Raise UserError for labels and boxes that would end the training later, or be learnt as background."""
    classes = len(images.names)
    if not classes or not len(images):
        raise UserError(f"{images.path} holds {len(images)} images of {classes} classes: nothing to learn")
    for entry in images.entries:
        objects = entry.objects
        if len(objects) and not (int(objects.labels.min()) >= 1 and int(objects.labels.max()) <= classes):
            raise UserError(f"{images.path}: {entry.name} has a class beyond 1 ... {classes}")
        sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
        if not ((sides > 0).all() and np.isfinite(objects.boxes).all()):  # a corner that is no number, too
            raise UserError(f"{images.path}: {entry.name} has a box without an extent")


def evaluate_detector(
    detector: TrainedDetector,
    images: Detection,
    ranks: Ranks,
    progress: Progress,
    stop: Stop | None = None,
    *,
    workers: int = 0,
) -> BoxScores | None:
    """The scores on a set of images, which the ranks share; None where a signal came before the end."""
    detector.model.eval()
    answers: dict[int, Found] = {}

    def judge(number: int, planes: UInt8[Tensor, "3 rows columns"]) -> None:
        entry = images.entries[number]
        answers[number] = detector.found(planes, entry.height, entry.width)

    def read(number: int) -> UInt8[Tensor, "3 rows columns"]:
        return detector.resized(images.entries[number].read())

    if not judge_images(len(images), read, judge, ranks, progress, stop, workers=workers):
        return None
    if ranks.group is not None:
        shares: list[Any] = [None] * ranks.size
        dist.all_gather_object(shares, answers, ranks.group)
        answers = {number: found for share in shares for number, found in share.items()}
    found = [answers[number] for number in range(len(images))]
    by_image = [matches_of(entry.objects, each).f1 for entry, each in zip(images.entries, found, strict=True)]
    scores = ranks.broadcast_from_main(lambda: average_precision(images, found))
    return dataclasses.replace(scores, by_image=np.array(by_image))


def draw_detections(detector: TrainedDetector, images: Detection, scores: BoxScores, path: Path) -> None:
    """A picture of the best, a median and the worst of the tested images, by the F1 of what is drawn."""
    assert scores.by_image is not None
    detector.model.eval()
    shown = []
    for word, number in best_median_worst(scores.by_image).items():
        entry = images.entries[number]
        pixels = entry.read()
        words = f"{word}: F1 {scores.by_image[number]:.1f} %, {entry.name.rsplit('/', 1)[-1]}"
        shown.append(Sight(words, pixels, detector(pixels), entry.objects))
    draw_boxes(path, shown, images.names, f"AP50 {scores.boxes.get('ap50', 0):.1f} % of {scores.images:,} images")
