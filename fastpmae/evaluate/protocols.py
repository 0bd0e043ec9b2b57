"""`fastpmae-eval`: how good features are, by k-NN, linear probes, few labels, fine-tuning, or dense tasks."""

import dataclasses
import sys
import time
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastpmae.distributed.ranks import Ranks, join_ranks
from fastpmae.evaluate.backbone import find_backbone
from fastpmae.evaluate.cli import (
    NEIGHBOURS,
    Command,
    Finetune,
    Knn,
    LabelledCommon,
    Linear,
    Lowshot,
    Patches,
    Probe,
    read_command,
)
from fastpmae.evaluate.datasets import Labelled, check_readable, extract, needed, open_labelled
from fastpmae.evaluate.dense.arguments import Detect, Predict, Segment
from fastpmae.evaluate.dense.commands import run_detect, run_segment
from fastpmae.evaluate.dense.patches import run_patches
from fastpmae.evaluate.dense.predictions import run_predict
from fastpmae.evaluate.features import Pool
from fastpmae.evaluate.finetune import train_classifier
from fastpmae.evaluate.finetune_state import Setting
from fastpmae.evaluate.knn import check_neighbours, check_temperature, knn_ranked
from fastpmae.evaluate.linear import (
    Sweep,
    best_c,
    check_strengths,
    draw_few,
    held_out,
    logistic_regression,
    standardised,
    train_sweep,
)
from fastpmae.evaluate.metrics import Scores, rank, write_scores
from fastpmae.evaluate.recipe import PROBE, finetune_preset
from fastpmae.evaluate.result_files import ResultFolder, free_files, named_folder, place_of, stem_of
from fastpmae.run.images import source_notes
from fastpmae.run.malloc import tune_allocator
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.cli.terminal import tell
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.mixture import sources_named
from fastpmae_loaders.stores.cache import CacheSettings


class Evaluation:
    """Network, images and folder of one command, found before anything is computed; the first rank speaks.


    Args:
        training: the name of one that has a folder of its own.
    """

    def __init__(self, common: LabelledCommon, ranks: Ranks, training: str = ""):
        self.common = common
        self.began = time.monotonic()
        named = named_folder(common.out)
        self.progress = Progress(live=ranks.is_main)
        self.device = ranks.device
        cache = CacheSettings(common.cache, common.cache_size)
        val = None if common.val is None else sources_named(common.val)
        self.train, self.val = open_labelled(sources_named(common.train), val, cache)
        for images in (self.train, self.val):
            for note in source_notes(images.samples) if images else ():
                self.progress.tell(note)
        self.backbone = find_backbone(common.weights, common.network, image_size=common.image_size, heads=common.heads)
        for images in filter(None, (self.train, self.val)):
            check_readable(
                images, common.engine, image_size=self.backbone.image_size, batch_size=common.feature_batch,
                crop_ratio=common.crop_ratio,
            )  # fmt: skip
        place = named or place_of(common.weights)
        if training and named is None:
            place = place / "-".join(filter(None, [training, self.backbone.network]))
        self.results = ResultFolder(place, named=named is not None, lasts=bool(training), is_main=ranks.is_main)

    def features(self, images: Labelled, pools: tuple[Pool, ...]) -> list[Float[Tensor, "images dim"]]:
        """Frozen features of a set, on the device that computes with them."""
        common = self.common
        self.progress.phase(f"features of {images.samples.path}")
        found = extract(
            self.backbone.build(),
            self.backbone,
            images,
            pools,
            device=self.device,
            engine=common.engine,
            batch_size=common.feature_batch,
            crop_ratio=common.crop_ratio,
            workers=common.workers,
            progress=self.progress,
        )
        return [rows.to(self.device) for rows in found]

    def finish(self, name: str, scores: Scores, more: dict[str, Any]) -> None:
        """Print the figures, write the files, and say where they are."""
        backbone, network = self.backbone, self.backbone.network
        record = {
            "evaluation": name,
            "weights": self.common.weights,
            "source": backbone.source,
            "network": network,
            "image_size": backbone.image_size,
            "crop_ratio": self.common.crop_ratio,
            "train": self.train.describe(),
            "val": None if self.val is None else self.val.describe(),
            **more,
            "seconds": round(time.monotonic() - self.began, 1),
        }
        files = free_files(self.results.path, stem_of(name, network), record)
        write_scores(files, scores, self.train.names, record)
        path = self.results.called(files.figures)
        self.results.publish()
        tell(f"{files.stem}: top-1 {scores.top1:.2f} %, top-5 {scores.top5:.2f} % of {len(scores.labels):,} images")
        tell(f"wrote {path}, and beside it a row for each class (.csv) and the confusion matrix (.png)")


def run_knn(command: Knn, ranks: Ranks) -> None:
    """`fastpmae-eval knn`. Without a validation set every training image is left out once."""
    check_temperature(command.temperature or None)
    evaluation = Evaluation(command.common, ranks)
    train, val = evaluation.train, evaluation.val
    pools: tuple[Pool, ...] = ("class", "mean") if command.pool == "both" else (command.pool,)
    voters = len(train.labels) - (val is None)
    ks = command.k
    if ks == NEIGHBOURS and max(ks) > voters >= 1:
        ks = tuple(k for k in ks if k <= voters) or (voters,)
        evaluation.progress.tell(f"{voters} images vote, so k is {ks[0]}: --k chooses others")
    check_neighbours(ks, voters)
    train_features = evaluation.features(train, pools)
    val_features = train_features if val is None else evaluation.features(val, pools)
    labels = train.labels.to(evaluation.device)
    table, best = [], None
    evaluation.progress.phase("nearest neighbours")
    tell("pool    k      top-1   top-5")
    for pool, rows, others in zip(pools, train_features, val_features, strict=True):
        ranked = knn_ranked(
            rows,
            labels,
            others,
            ks,
            temperature=command.temperature or None,
            leave_one_out=val is None,
            progress=evaluation.progress,
        )
        for k, classes in ranked.items():
            scores = Scores(train.labels if val is None else val.labels, classes.cpu())
            table.append({"pool": pool, "k": k, **scores.figures()})
            tell(f"{pool:<6} {k:>4}   {scores.top1:6.2f}  {scores.top5:6.2f}")
            best = best or (scores, table[-1])
    assert best is not None
    more = {"temperature": command.temperature, "leave_one_out": val is None, "table": table}
    # The files show the first row, not the best one: that would be chosen on the images that are tested.
    evaluation.finish("knn", best[0], more | {"shown": {"pool": best[1]["pool"], "k": best[1]["k"]}})


def run_linear(command: Linear, ranks: Ranks) -> None:
    """`fastpmae-eval linear`."""
    if command.method == "logistic":
        check_strengths(command.c)
    evaluation = Evaluation(command.common, ranks)
    train, val = evaluation.train, needed(evaluation.val, evaluation.train)
    classes, seed = len(train.names), command.seed
    sweep = Sweep(
        command.rates,
        "adamw" if command.method == "adamw" else "sgd",
        command.epochs,
        command.step_images,
        command.weight_decay,
        seed,
    )
    (train_features,), (val_features,) = (evaluation.features(images, (command.pool,)) for images in (train, val))
    train_features, val_features = standardised(train_features, val_features)
    labels = train.labels.to(train_features.device)
    choices = command.c if command.method == "logistic" else command.rates

    def classifiers(rows: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        if command.method == "logistic":
            found = []
            with evaluation.progress.count(len(command.c), "strengths of c"):
                for c in command.c:
                    found.append(logistic_regression(rows, labels, classes, c))
                    evaluation.progress.advance()
            return found
        return list(zip(*train_sweep(rows, labels, classes, sweep, evaluation.progress), strict=True))

    def ranked(rows: Tensor, found: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [rank(rows.to(weight.dtype) @ weight + bias) for weight, bias in found]

    on_part: list[Scores] = []
    if command.choose_on == "held-out":
        part = held_out(train.labels, 0.1, seed)
        if not bool(part.any()):
            raise UserError("too few images of each class to hold a tenth out: choose with --choose-on val")
        found = classifiers(train_features[~part], labels[~part])
        on_part = [Scores(train.labels[part], classes) for classes in ranked(train_features[part], found)]
    on_val = [Scores(val.labels, classes) for classes in ranked(val_features, classifiers(train_features, labels))]
    best = max(range(len(choices)), key=lambda place: (on_part or on_val)[place].top1)
    name = "c" if command.method == "logistic" else "rate"
    table = [{name: choice, **scores.figures()} for choice, scores in zip(choices, on_val, strict=True)]
    tell(f"{name:>8}   top-1   top-5")
    for place, row in enumerate(table):
        tell(f"{row[name]:>8g}  {row['top1']:6.2f}  {row['top5']:6.2f}{'  <- chosen' if place == best else ''}")
    more = {"method": command.method, "pool": command.pool, "choose_on": command.choose_on, "table": table}
    more |= {"chosen": choices[best], "settings": dataclasses.asdict(sweep)}
    evaluation.finish(f"linear-{command.method}", on_val[best], more)


def run_lowshot(command: Lowshot, ranks: Ranks) -> None:
    """`fastpmae-eval lowshot`."""
    check_strengths(command.c)
    if command.draws < 1 or not command.shares:
        raise UserError(f"--draws {command.draws} must be at least 1, and --shares name at least one share")
    evaluation = Evaluation(command.common, ranks)
    train, val = evaluation.train, needed(evaluation.val, evaluation.train)
    for share in command.shares:
        draw_few(train.labels, share, 0)
    (train_features,), (val_features,) = (evaluation.features(images, (command.pool,)) for images in (train, val))
    table, first = [], None
    tell("share     images   logistic   1-NN")
    for share in command.shares:
        figures = []
        for draw in range(command.draws):
            few = draw_few(train.labels, share, command.seed + draw)
            rows, others = standardised(train_features[few], val_features)
            labels = train.labels[few].to(rows.device)
            c = best_c(rows, labels, len(train.names), command.c, command.seed + draw)
            weight, bias = logistic_regression(rows, labels, len(train.names), c)
            scores = Scores(val.labels, rank(others.double() @ weight + bias))
            nearest = knn_ranked(train_features[few], labels, val_features, (1,), best=1)[1].cpu()
            figures.append((scores.top1, scores.top5, Scores(val.labels, nearest).top1, c, len(few)))
            first = first or scores
        top1 = torch.tensor([row[0] for row in figures], dtype=torch.float64)
        row = {
            "share": share,
            "images": figures[0][4],
            "top1": top1.mean().item(),
            "top1_std": top1.std(correction=1).item() if len(top1) > 1 else None,
            "top5": sum(row[1] for row in figures) / len(figures),
            "nearest_top1": sum(row[2] for row in figures) / len(figures),
            "draws": [{"top1": row[0], "top5": row[1], "nearest_top1": row[2], "c": row[3]} for row in figures],
        }
        table.append(row)
        spread = f" ± {row['top1_std']:.2f}" if row["top1_std"] is not None else ""
        tell(f"{share:<8g} {row['images']:>7}   {row['top1']:6.2f}{spread}   {row['nearest_top1']:6.2f}")
    assert first is not None
    evaluation.finish(
        "lowshot",
        first,
        {"pool": command.pool, "seed": command.seed, "table": table, "shown": "the first share, first draw"},
    )


def run_training(command: Probe | Finetune, ranks: Ranks) -> None:
    """`fastpmae-eval probe` and `finetune`."""
    common, training = command.common, command.training
    name = "probe" if isinstance(command, Probe) else "finetune"
    if isinstance(command, Probe):
        command.config.check_used(PROBE, frozen=True)
    else:
        command.config.check_used(finetune_preset(command.preset), frozen=False)
    evaluation = Evaluation(common, ranks, name)
    tune_allocator(evaluation.device)
    val = needed(evaluation.val, evaluation.train)
    setting = Setting(
        evaluation.backbone,
        evaluation.train,
        val,
        evaluation.results.path,
        evaluation.device,
        common.engine,
        common.workers,
        common.crop_ratio,
        common.feature_batch,
        frozen=isinstance(command, Probe),
        deterministic=training.deterministic,
        tensorboard=training.tensorboard,
        wandb=training.wandb,
        upload=evaluation.results.address,
    )
    scores = train_classifier(
        setting, command.config, resume=training.resume, steps=training.steps, progress=evaluation.progress, ranks=ranks
    )
    # As it was carried out: of few images a probe takes fewer in a step.
    config = command.config.fitted(len(evaluation.train.labels), ranks.size) if setting.frozen else command.config
    if ranks.is_main:
        if training.steps is not None:
            tell(f"after step {training.steps:,} at most, as --steps says; --resume without it ends the training")
        told = {"finetune": dataclasses.asdict(config), "peak_lr": config.peak_lr, "steps": training.steps}
        evaluation.finish(name, scores, told)


def run_command(command: Command) -> None:
    """Evaluate as a command line says, on the ranks that torchrun has started where there are several.

    Raises:
        UserError: for what does not fit.
    """
    device = command.device if isinstance(command, Predict) else command.common.device
    with join_ranks(device) as ranks:
        if ranks.size > 1 and not isinstance(command, Probe | Finetune | Segment | Detect):
            name = type(command).__name__.lower()
            raise UserError(f"fastpmae-eval {name} is computed by one process: start it without torchrun")
        match command:
            case Knn():
                run_knn(command, ranks)
            case Linear():
                run_linear(command, ranks)
            case Lowshot():
                run_lowshot(command, ranks)
            case Probe() | Finetune():
                run_training(command, ranks)
            case Patches():
                run_patches(command, ranks)
            case Segment():
                run_segment(command, ranks)
            case Detect():
                run_detect(command, ranks)
            case Predict():
                run_predict(command)


def main() -> int:
    """`fastpmae-eval`."""
    return exit_with_sentence("fastpmae-eval", lambda: run_command(read_command(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(main())
