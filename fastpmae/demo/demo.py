"""The job behind `make train`: demo images, a .beton of them, a short pretraining, and what came of it."""

import os
import signal
import sys
import threading
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

from fastpmae.distributed.ranks import choose_device
from fastpmae.evaluate.features import Network, load_encoder, pooled, whole_tokens
from fastpmae.evaluate.knn import knn_accuracy
from fastpmae.model.vit import Encoder
from fastpmae.photographs import PHOTOGRAPHS, write_demo_images
from fastpmae.presets import PRESETS
from fastpmae.run.folder import folder_of
from fastpmae.run.log import read_rows
from fastpmae.run.malloc import tune_allocator
from fastpmae.train import pretrain
from fastpmae_loaders import Beton, PlainViews
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.cli.terminal import tell
from fastpmae_loaders.engines.names import DEFAULT_ENGINE
from fastpmae_loaders.errors import Interrupted, UserError
from fastpmae_loaders.values import local_path
from fastpmae_loaders.write.write import write_beton

NEIGHBOURS = 10


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
        minutes: Stop the training after so long, wherever it is.
    """
    settings = PRESETS["demo"].using(out=out, steps=steps, device=usable_device())
    train, validation = write_demo_betons(folder)
    config = settings.using(beton=train)
    run = folder_of(config)
    device = choose_device(config.efficiency.device)
    tune_allocator(device)
    with _TimeLimit(minutes) as limit:
        try:
            pretrain(config.using(out=run))
        except Interrupted:
            if not limit.passed:
                raise
            tell(f"demo: stopped after {minutes:g} minutes; `fastpmae-train --resume {run}` continues it")
    tell("demo: comparing the features with those of a random start")
    show_summary(run, rows_of(run), accuracies(run, train, validation, device), train)


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

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes
        self.passed = False
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

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


def accuracies(run: Path, train: Path, validation: Path, device: torch.device | None = None) -> list[Accuracy]:
    """How well k-NN sorts the validation crops, by the run's features and by what they must be compared with.

    Features are computed on a GPU where there is one, or on `device`.
    """
    side = PRESETS["demo"].views.image_size
    (images, labels), (test_images, test_labels) = (whole_images(beton, side) for beton in (train, validation))

    def accuracy(rows: Tensor, test_rows: Tensor) -> float:
        return knn_accuracy(rows, labels, test_rows, test_labels, k=NEIGHBOURS)

    found = []
    networks: list[tuple[str, Network]] = [("pretrained", "student"), ("random start", "random")]
    for name, network in networks:
        encoder, _ = load_encoder(run, network)
        tokens, test_tokens = (first_and_mean(encoder, part, device) for part in (images, test_images))
        for words, rows, test_rows in zip(("class token", "mean of patch tokens"), tokens, test_tokens, strict=True):
            found.append(Accuracy(f"{name}, {words}", accuracy(rows, test_rows)))
    found.append(Accuracy("8 x 8 pixel thumbnails", accuracy(*thumbnails(images, test_images))))
    found.append(Accuracy("chance", 1 / len(labels.unique())))
    return found


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


def show_summary(run: Path, rows: list[dict[str, float]], found: list[Accuracy], train: Path) -> None:
    """Print what the run did: losses, k-NN, speed, where it lies and what to do next."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    first, last = rows[0], rows[-1]
    losses = Table("loss", f"at step {first['step']:.0f}", f"at step {last['step']:.0f}", title="Losses")
    for name, words in (
        ("loss", "sum"),
        ("loss_m", "L_m, reconstruction"),
        ("loss_c", "L_c, class pseudo labels"),
        ("loss_p", "L_p, patch pseudo labels"),
    ):
        losses.add_row(words, f"{first[name]:.3f}", f"{last[name]:.3f}")
    knn = Table("features", "accuracy", title=f"{NEIGHBOURS}-NN on validation crops, frozen features")
    for row in found:
        knn.add_row(row.features, f"{row.accuracy:.1%}")
    console.print(losses)
    console.print(knn)
    speed = sorted(row["images_per_second"] for row in rows)[len(rows) // 2]
    waited = sorted(row["data_wait"] for row in rows)[len(rows) // 2]
    console.print(
        f"{speed:.0f} images/s (median), {waited:.0%} of the time waiting for data. The run lies in {run}\n"
        "A run this short shows that everything works; it does not show how good the method is.\n\n"
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
    """`python -m fastpmae.demo.demo`."""
    return exit_with_sentence("demo", lambda: tyro.cli(demo, prog="python -m fastpmae.demo.demo"))


if __name__ == "__main__":
    sys.exit(main())
