"""The job behind `make train`: demo images, a .beton of them, a short pretraining, and what came of it."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float, Int, UInt8
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastpmae.config import Config
from fastpmae.distributed.ranks import choose_device
from fastpmae.evaluate.features import Network, load_encoder, pooled, whole_tokens
from fastpmae.evaluate.knn import knn_accuracy
from fastpmae.model.build import pixel_epochs
from fastpmae.model.vit import Encoder
from fastpmae.photographs import PHOTOGRAPHS, write_demo_images
from fastpmae.presets import PRESETS
from fastpmae.run.folder import folder_of
from fastpmae.run.log import read_rows
from fastpmae.run.malloc import tune_allocator
from fastpmae.train import pretrain
from fastpmae_loaders import Beton, PlainViews
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.cli.help_texts import HELP_TEXTS
from fastpmae_loaders.cli.terminal import tell
from fastpmae_loaders.engines.names import DEFAULT_ENGINE
from fastpmae_loaders.errors import Interrupted, UserError
from fastpmae_loaders.values import local_path
from fastpmae_loaders.write.write import write_beton

NEIGHBOURS = 10
TEACHERS_TAKE = 2.0
"""As many times as long as an epoch of pixels takes one of two teachers, here and about."""
FEWEST = 3
"""Epochs, below which a schedule of its own would teach nothing."""
OVERTIME = 4 / 3
"""How many times the minutes asked for a training may take, so that a schedule ends on a machine that became slower."""


@dataclass(frozen=True)
class Accuracy:
    """k-NN accuracy (0 to 1) on the validation crops, and of what."""

    features: str
    accuracy: float


def write_demo_betons(folder: Path) -> tuple[Path, Path]:
    """The demo's training and validation file under `folder`, written unless they are there already.

    Raises:
        UserError: when the photographs are not installed or the folder cannot be written.
    """
    folder = local_path(folder)
    train, validation = folder / "train.beton", folder / "validation.beton"
    if not (train.exists() and validation.exists()):
        images = folder / "images"
        for file in sorted(images.rglob("*")):
            if file.is_file() and file.parent.name not in PHOTOGRAPHS:
                raise UserError(f"{file} is none of the demo's images: choose another --folder")
        tell(f"demo: cutting {len(PHOTOGRAPHS)} photographs into labelled crops under {images}")
        write_demo_images(images)
        for part in (train, validation):
            # a file appears whole or not at all, so what a cut-off demo left behind is never taken for done
            if not part.exists():
                write_beton(images / part.stem, part)
    return train, validation


def demo(
    folder: Path = Path("demo"),
    out: Path | None = None,
    steps: int | None = None,
    minutes: Annotated[float, tyro.conf.arg(metavar="MINUTES")] = 5.0,
) -> None:
    """Pretrain on demo images with the `demo` preset, and compare the features with those of a random start.

    Args:
        folder: Where the demo images and .beton files are, or are written to.
        out: Run folder; by default a new one, runs/<date>-demo.
        steps: Stop after so many steps.
        minutes: How long to train, about: a slow machine trains for fewer epochs. It is stopped after a third more.
    """
    if out is not None:
        local_path(out)  # it reads its run back
    settings = PRESETS["demo"].using(out=out, device=usable_device())
    train, validation = write_demo_betons(folder)
    config = settings.using(beton=train)
    run = folder_of(config)
    device = choose_device(config.efficiency.device)
    tune_allocator(device)
    first_epoch = len(Beton(train)) // config.optimizer.batch_size
    early: list[Accuracy] = []
    with _TimeLimit(60 * OVERTIME * minutes) as limit:
        try:
            pretrain(config.using(out=run, steps=min(first_epoch, first_epoch if steps is None else steps)))
            if steps is None or steps > first_epoch:
                tell("demo: looking at the features after the first epoch")
                early = accuracies(train, validation, {"after the first epoch": network_of(run)}, device)
                left = 60 * minutes - limit.elapsed
                rest = config if steps else fitting(config, len(Beton(train)), rows_of(run), left)
                if rest is not config:
                    tell(
                        f"demo: {rest.optimizer.epochs} epochs instead of {config.optimizer.epochs}, as many as this "
                        f"machine has time for in {minutes:g} minutes"
                    )
                pretrain(rest.using(out=run, steps=steps, resume="auto", accept_changes=rest is not config))
        except Interrupted:
            if not limit.passed:
                raise
            tell(f"demo: stopped after {OVERTIME * minutes:.2g} minutes; `fastpmae-train --resume {run}` continues it")
    tell("demo: comparing the features with those of a random start")
    networks = {"pretrained": network_of(run), "random start": network_of(run, "random")}
    found = accuracies(train, validation, networks, device)
    show_summary(run, rows_of(run), found[:2] + early + found[2:] + baselines(train, validation), train)


def fitting(config: Config, images: int, rows: list[dict[str, float]], seconds: float) -> Config:
    """The settings with as many epochs as there is time for: a schedule that is cut off ends where little is learnt.

    Args:
        config: of a run whose first epoch is behind it.
        images: in its file.
        rows: that were logged in that epoch.
        seconds: left for the rest.
    """
    # an upper quartile: what has just been installed may still be on its way to the disk, and slow the first steps
    rate = sorted(row["images_per_second"] for row in rows)[3 * len(rows) // 4]

    def takes(count: int) -> float:
        shorter = config.using(epochs=count)
        first = pixel_epochs(shorter)
        return (first - 1 + TEACHERS_TAKE * (count - first)) * images / rate

    known = [count for count in range(FEWEST, config.optimizer.epochs) if takes(count) <= seconds]
    return config if takes(config.optimizer.epochs) <= seconds or not known else config.using(epochs=known[-1])


def usable_device() -> Literal["auto", "cpu"]:
    """Whatever there is; or the CPU, with a sentence, beside a GPU that cannot be used for want of something."""
    try:
        choose_device("auto")
    except UserError as error:
        tell(f"demo: on the CPU, since {error}")
        return "cpu"
    return "auto"


class _TimeLimit:
    """Sends this process SIGUSR1 once the time is over: the trainer then finishes its step and saves."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.passed = False
        self.start = time.monotonic()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def elapsed(self) -> float:
        """Seconds since it was set."""
        return time.monotonic() - self.start

    def _watch(self) -> None:
        wait = self.seconds
        # again and again, since before the first step the trainer does not listen yet
        while not self.over.wait(wait):
            self.passed, wait = True, 1.0
            os.kill(os.getpid(), signal.SIGUSR1)

    def __enter__(self) -> "_TimeLimit":
        # Where nobody listens the signal would end the process.
        self.before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        signal.signal(signal.SIGUSR1, self.before)


def rows_of(run: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl, without those of its evaluations."""
    return [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]


def network_of(run: Path, network: Network = "student") -> Encoder:
    """A run's encoder as it is now, or one of its kind from a random start."""
    return load_encoder(run, network)[0]


def accuracies(
    train: Path, validation: Path, encoders: dict[str, Encoder], device: torch.device | None = None
) -> list[Accuracy]:
    """How well k-NN sorts the validation crops by the features of each network, of both kinds.

    Features are computed on a GPU where there is one, or on `device`.
    """
    (images, labels), (test_images, test_labels) = crops(train), crops(validation)
    found = []
    for name, encoder in encoders.items():
        tokens, test_tokens = (first_and_mean(encoder, part, device) for part in (images, test_images))
        for words, rows, test_rows in zip(("class token", "mean of patch tokens"), tokens, test_tokens, strict=True):
            share = knn_accuracy(rows, labels, test_rows, test_labels, k=NEIGHBOURS)
            found.append(Accuracy(f"{name}, {words}", share))
    return found


def baselines(train: Path, validation: Path) -> list[Accuracy]:
    """The same of what needs no network."""
    (images, labels), (test_images, test_labels) = crops(train), crops(validation)
    small, test_small = thumbnails(images, test_images)
    share = knn_accuracy(small, labels, test_small, test_labels, k=NEIGHBOURS)
    return [Accuracy("8 x 8 pixel thumbnails", share), Accuracy("chance", 1 / len(labels.unique()))]


def crops(beton: Path) -> tuple[UInt8[Tensor, "images 3 side side"], Int[Tensor, " images"]]:
    """The demo's images as its networks see them, and their labels."""
    return whole_images(beton, PRESETS["demo"].views.image_size)


def whole_images(
    beton: Path, side: int, crop_ratio: float = 0.875, engine: str = DEFAULT_ENGINE
) -> tuple[UInt8[Tensor, "images 3 side side"], Int[Tensor, " images"]]:
    """Every image of a file, resized and cut at the centre, and the labels."""
    with PlainViews(Beton(beton), 64, image_size=side, crop_ratio=crop_ratio, engine=engine) as views:
        batches = [(images, label) for images, label, _ in views]
    return torch.cat([images for images, _ in batches]), torch.cat([label for _, label in batches])


def thumbnails(
    images: UInt8[Tensor, "images 3 side side"], test_images: UInt8[Tensor, "tests 3 side side"]
) -> tuple[Float[Tensor, "images 192"], Float[Tensor, "tests 192"]]:
    """8 x 8 pixels of each image as features, which a network's must be compared with."""
    small, test_small = (F.adaptive_avg_pool2d(part.float(), 8).flatten(1) for part in (images, test_images))
    # without the mean taken off, brightness alone would decide what is near
    centre = small.mean(0)
    return small - centre, test_small - centre


def first_and_mean(
    encoder: Encoder, images: UInt8[Tensor, "images 3 side side"], device: torch.device | None = None
) -> tuple[Float[Tensor, "images dim"], Float[Tensor, "images dim"]]:
    """The class token and the mean of the patch tokens of each image, computed on a GPU where there is one, or on
    `device`."""
    device = device or choose_device("auto")
    encoder.to(device)
    first, mean = [], []
    for part in images.split(64):
        tokens = whole_tokens(encoder, part.to(device))
        first.append(pooled(tokens, "class").cpu())
        mean.append(pooled(tokens, "mean").cpu())
    return torch.cat(first), torch.cat(mean)


def loss_rows(rows: list[dict[str, float]]) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Each loss that was logged, in words, with its steps and values; apart for the phases, whose targets differ."""
    names = {
        ("loss_m", 1): "L_m, reconstruction of pixels",
        ("loss_m", 2): "L_m, reconstruction of tokens",
        ("loss_c", 2): "L_c, class labels",
        ("loss_p", 2): "L_p, patch labels",
    }
    for (name, phase), words in names.items():
        logged = [(row["step"], row[name]) for row in rows if row.get("phase", 2) == phase and name in row]
        if logged:
            yield words, logged


def verdict(found: list[Accuracy]) -> str:
    """How far the pretrained features are ahead of the others, by the better pooling of each."""
    best: dict[str, float] = {}
    for row in found:
        name = row.features.partition(",")[0]
        best[name] = max(best.get(name, 0.0), row.accuracy)
    ahead = [
        f"{100 * (best['pretrained'] - share):+.1f} points on {words}"
        for name, words in (
            ("random start", "a random start"),
            ("8 x 8 pixel thumbnails", "thumbnails"),
            ("after the first epoch", "themselves after the first epoch"),
        )
        if (share := best.get(name)) is not None
    ]
    return f"The pretrained features: {', '.join(ahead)} (the better pooling of each)."


def show_summary(run: Path, rows: list[dict[str, float]], found: list[Accuracy], train: Path) -> None:
    """Print what the run did: losses, k-NN, speed, where it lies and what to do next."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    losses = Table("loss", "at its first step", "at its last step", title="Losses")
    for words, logged in loss_rows(rows):
        losses.add_row(words, *(f"{value:.3f} (step {step:.0f})" for step, value in (logged[0], logged[-1])))
    knn = Table("features", "accuracy", title=f"{NEIGHBOURS}-NN on validation crops, frozen features")
    for row in found:
        knn.add_row(row.features, f"{row.accuracy:.1%}")
    console.print(losses)
    console.print(knn)
    console.print(verdict(found), highlight=False, markup=False, soft_wrap=True)
    speed = sorted(row["images_per_second"] for row in rows)[len(rows) // 2]
    waited = sorted(row["data_wait"] for row in rows)[len(rows) // 2]
    console.print(
        f"{speed:.0f} images/s (median), {waited:.0%} of the time waiting for data. The run lies in {run}\n"
        "A run this short shows that everything works and learns; it does not show how good the method is.\n\n"
        "Next:\n"
        f"  .venv/bin/fastpmae-view {train} views.png\n"
        f"  .venv/bin/fastpmae-report {run}\n"
        f"  .venv/bin/fastpmae-embed {run} {train} features.npz\n"
        f"  .venv/bin/fastpmae-export {run} encoder.safetensors\n"
        "  .venv/bin/fastpmae-write FOLDER_OF_IMAGES images.beton\n"
        "  .venv/bin/fastpmae-train --beton images.beton --preset ablation",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def main() -> int:
    """The command line."""

    def run() -> None:
        # On a CPU a second thread costs this small network more than it does: a step takes 1.2 to 1.5 times as long.
        torch.set_num_threads(1)
        tyro.cli(demo, prog="python -m fastpmae.demo.demo", registry=HELP_TEXTS)

    return exit_with_sentence("demo", run)


if __name__ == "__main__":
    sys.exit(main())
