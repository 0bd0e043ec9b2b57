"""`fastpmae-eval segment` and `detect`, carried out."""

import dataclasses
import time
from functools import partial
from typing import Any

from fastpmae.distributed.ranks import Ranks
from fastpmae.evaluate.backbone import Backbone, find_backbone
from fastpmae.evaluate.datasets import needed
from fastpmae.evaluate.dense.arguments import Detect, Patches, Segment
from fastpmae.evaluate.dense.labelled import Detection, Segmentation
from fastpmae.evaluate.result_files import ResultFiles, ResultFolder, free_files, named_folder, place_of, stem_of
from fastpmae.run.checkpoint import newest_checkpoint
from fastpmae.run.malloc import tune_allocator
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.cli.terminal import tell
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.machine import loader_threads


class _Run:
    """Network, folder and clock of one command; the first rank speaks."""

    def __init__(self, command: Segment | Detect, ranks: Ranks, image_size: int):
        common = command.common
        self.command, self.common, self.ranks = command, common, ranks
        self.name = "segment" if isinstance(command, Segment) else "detect"
        self.began = time.monotonic()
        named = named_folder(common.out)
        self.progress = Progress(live=ranks.is_main)
        self.backbone: Backbone = find_backbone(
            common.weights, common.network, image_size=image_size, heads=common.heads, size_flag="--crop-size"
        )
        within = "-".join(filter(None, [self.name, self.backbone.network]))
        place = named or place_of(common.weights) / within
        self.results = ResultFolder(place, named=named is not None, lasts=True, is_main=ranks.is_main)
        self.folder = self.results.path
        tune_allocator(ranks.device)

    def setting(self) -> Any:
        from fastpmae.evaluate.dense.training import Setting

        training = self.command.training
        return Setting(
            self.folder,
            self.ranks.device,
            self.common.workers,
            training.deterministic,
            training.tensorboard,
            training.wandb,
            self.results.address,
        )

    def told(self, train: Segmentation | Detection, val: Segmentation | Detection) -> None:
        """Say what a user should know of how the files were understood."""
        for note in dict.fromkeys([*train.notes, *val.notes]):
            self.progress.tell(note)

    def steps_of(self, iterations: int) -> int:
        """How many steps of a training were done; says so where --steps ended it."""
        limit = self.command.training.steps
        if limit is None or limit >= iterations:
            return iterations
        # a resumed training may stand beyond --steps
        checkpoint, complaints = newest_checkpoint(self.folder)
        if checkpoint is None:
            raise UserError("; ".join([f"there is no sound checkpoint in {self.folder}", *complaints]))
        steps = checkpoint.progress["step"]
        if steps >= iterations:
            return iterations
        tell(f"after step {steps:,} of {iterations:,}, as --steps says; --resume without it ends the training")
        return steps

    def record(
        self, train: Segmentation | Detection, val: Segmentation | Detection, image_size: int, steps: int
    ) -> dict[str, Any]:
        """What a result says besides its figures.

        Args:
            image_size: of the test, in pixels.
            steps: of the training.
        """
        return {
            "evaluation": self.name,
            "weights": self.common.weights,
            "source": self.backbone.source,
            "network": self.backbone.network,
            "image_size": image_size,
            "train": train.describe(),
            "val": val.describe(),
            self.name: dataclasses.asdict(self.command.config),
            "steps": steps,
            "seconds": round(time.monotonic() - self.began, 1),
        }

    def files(self, record: dict[str, Any]) -> ResultFiles:
        return free_files(self.folder, stem_of(self.name, self.backbone.network), record)


def run_segment(command: Segment, ranks: Ranks) -> None:
    """`fastpmae-eval segment`."""
    from fastpmae.evaluate.dense.overlap import write_mask_scores
    from fastpmae.evaluate.dense.segment import draw_segmentations, train_segmenter
    from fastpmae.evaluate.dense.sets import open_segmentation

    common = command.common
    threads = loader_threads(common.workers, ranks.local_size)
    train, val = open_segmentation(common.train, common.val, common.classes, command.ignore, threads)
    val = needed(val, train)
    run = _Run(command, ranks, command.config.crop_size)
    run.told(train, val)
    scores, segmenter = train_segmenter(
        train, val, run.backbone, command.config, run.setting(), ranks,
        resume=command.training.resume, steps=command.training.steps, progress=run.progress,
    )  # fmt: skip
    if not ranks.is_main:
        return
    config = command.config
    record = run.record(train, val, config.crop_size, run.steps_of(config.iterations))
    bars = _yardsticks(command, run, train, val) if command.yardsticks else {}
    record["yardsticks"] = bars
    files, figures = run.files(record), scores.figures()
    write_mask_scores(files, scores, train.names, record, partial(draw_segmentations, segmenter, val, scores))
    run.results.publish()
    tell(
        f"{files.stem}: mIoU {figures['miou']:.2f} %, pixel accuracy {figures['pixel_accuracy']:.2f} %, class accuracy "
        f"{figures['class_accuracy']:.2f} % of {scores.images:,} images"
    )
    for name, miou in bars.items():
        tell(f"without a network, by {name}: mIoU {miou:.2f} %")
    tell(
        f"wrote {run.results.called(files.figures)}, and beside it a row for each class (.csv), the confusion matrix "
        "and pictures (.png)"
    )


def _yardsticks(command: Segment, run: _Run, train: Segmentation, val: Segmentation) -> dict[str, float]:
    """The mIoU of what needs no network, by name, in percent."""
    from fastpmae.evaluate.dense.patch_features import patch_network
    from fastpmae.evaluate.dense.patches import Probing, without_network

    device = run.ranks.device
    probing = Probing(Patches(command.common, ignore=command.ignore), train, val, device, run.progress)
    found = without_network(probing, patch_network(run.backbone, device))
    return {name: round(scores.figures()["miou"], 2) for name, scores in found}


def run_detect(command: Detect, ranks: Ranks) -> None:
    """`fastpmae-eval detect`."""
    from fastpmae.evaluate.dense.average_precision import write_box_scores
    from fastpmae.evaluate.dense.box_sets import open_detection
    from fastpmae.evaluate.dense.detect import draw_detections, train_detector

    common = command.common
    threads = loader_threads(common.workers, ranks.local_size)
    train, val = open_detection(common.train, common.val, common.classes, command.masks, threads)
    val = needed(val, train)
    run = _Run(command, ranks, 0)
    run.told(train, val)
    for remark in command.config.remarks(len(train)):
        run.progress.tell(remark)
    scores, detector = train_detector(
        train, val, run.backbone, command.config, run.setting(), ranks,
        masks={"auto": None, "on": True, "off": False}[command.masks],
        resume=command.training.resume, steps=command.training.steps, progress=run.progress,
    )  # fmt: skip
    if not ranks.is_main:
        return
    config = command.config
    record = run.record(train, val, config.test_short_side, run.steps_of(config.iterations_for(len(train))))
    files, figures = run.files(record), scores.figures()
    write_box_scores(files, scores, train.names, record, partial(draw_detections, detector, val, scores))
    run.results.publish()
    told = [f"{name.replace('_', ' ').replace('ap', 'AP')} {value:.2f} %" for name, value in figures.items()]
    tell(f"{files.stem}: {', '.join(told)} of {scores.images:,} images")
    tell(
        f"wrote {run.results.called(files.figures)}, and beside it a row for each class (.csv), precision by recall, "
        "and pictures (.png)"
    )
