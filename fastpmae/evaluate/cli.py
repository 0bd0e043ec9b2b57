"""The command line of `fastpmae-eval`: the kinds of evaluation, and what each can be told."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from fastpmae.evaluate.arguments import UNTOUCHED, Common, Training
from fastpmae.evaluate.datasets import Engine
from fastpmae.evaluate.dense.arguments import DenseCommon, Detect, Patches, Predict, Segment
from fastpmae.evaluate.dense.recipe import detect_preset, segment_preset
from fastpmae.evaluate.features import Pool
from fastpmae.evaluate.linear import RATES
from fastpmae.evaluate.recipe import PROBE, FinetuneConfig, finetune_preset
from fastpmae.renamed import FINETUNE_SETTINGS, refuse_old_flags
from fastpmae_loaders.cli.help_texts import HELP_TEXTS
from fastpmae_loaders.cli.words import last_value, numbers_on, with_values

NEIGHBOURS = (10, 20)
"""How many neighbours vote where nobody says."""


@dataclass(frozen=True)
class LabelledCommon(Common):
    """What every evaluation on labelled images is told."""

    train: Annotated[str, tyro.conf.arg(metavar="IMAGES")]
    """Labelled images to train on: a .beton file or a set of them, here or in a store (s3://, gs://, az://, https://),
    a folder of images, or tar shards; in quotes several of these. A folder with a train and a val folder in it holds
    both sets."""
    val: Annotated[str | None, tyro.conf.arg(metavar="IMAGES")] = None
    """Labelled images to test on; by default those of a val folder in --train."""
    image_size: int = 0
    """Side of the images in pixels, with positions interpolated; 0 takes the network's own."""
    crop_ratio: float = 0.875
    """The shorter side is resized to the image size over this ratio, rounded down, and the centre cut out."""
    engine: Engine = "auto"
    """What decodes the images: auto, native (.beton only), ffcv (.beton only), dali or torch."""
    feature_batch: int = 64
    """Images at a time through a frozen network, and in every test."""
    cache: Path | None = None
    """Folder that keeps parts of images in a store; by default fastpmae/stores in the user's folder of caches."""
    cache_size: str = "100GB"
    """Size up to which that folder grows, as 200GB or 1.5TiB; what was not used for longest goes first."""


@dataclass(frozen=True)
class Knn:
    """k nearest neighbours by cosine, each voting with exp(similarity / temperature), as DINO does."""

    common: Annotated[LabelledCommon, tyro.conf.arg(name="")]
    k: tuple[int, ...] = NEIGHBOURS
    """How many neighbours vote; each is tried. Without this flag only as many as there are images."""
    temperature: float = 0.07
    """Temperature of the neighbours' votes; 0 gives every neighbour one vote."""
    pool: Literal["class", "mean", "both"] = "both"
    """Features to compare: the class token, the mean of the patch tokens, or both, one after the other."""


@dataclass(frozen=True)
class Linear:
    """A linear classifier of frozen features, computed once: a sweep of learning rates, or logistic regression."""

    common: Annotated[LabelledCommon, tyro.conf.arg(name="")]
    method: Literal["sgd", "adamw", "logistic"] = "sgd"
    """How the classifier is trained; logistic solves the regression with an L2 penalty instead."""
    rates: tuple[float, ...] = RATES
    """Base learning rates, each for 256 images as `--blr` is elsewhere; all are trained at once."""
    c: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    """Inverse strengths of the L2 penalty that --method logistic tries."""
    epochs: int = 100
    """Passes over the features."""
    step_images: int = 256
    """Features in one optimizer step."""
    weight_decay: float = 0.0
    """Weight decay of the optimizer (sgd and adamw)."""
    pool: Pool = "class"
    """Features to classify: the class token, or the mean of the patch tokens."""
    choose_on: Literal["held-out", "val"] = "held-out"
    """Rate or penalty is chosen on a tenth of the training images that is held out for it, or on the validation set
    (as DINOv2 reports it, which flatters)."""
    seed: int = 0
    """Seed of the order of the features and of what is held out."""


@dataclass(frozen=True)
class Probe:
    """MAE's linear probe: random crops, a BatchNorm without parameters, LARS; the network stays frozen."""

    common: Annotated[LabelledCommon, tyro.conf.arg(name="")]
    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = PROBE
    training: Annotated[Training, tyro.conf.arg(name="")] = UNTOUCHED


@dataclass(frozen=True)
class Finetune:
    """The whole network with a classifier, by a preset whose settings are flags."""

    common: Annotated[LabelledCommon, tyro.conf.arg(name="")]
    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]
    preset: str = "paper"
    """Settings to start from: paper (section 4.1), paper-a and paper-a-large (appendix A), small and small-1000 (small
    data sets), or deit."""
    training: Annotated[Training, tyro.conf.arg(name="")] = UNTOUCHED


@dataclass(frozen=True)
class Lowshot:
    """Logistic regression and k-NN on frozen features with few labels, drawn class by class."""

    common: Annotated[LabelledCommon, tyro.conf.arg(name="")]
    shares: tuple[float, ...] = (0.01, 0.1)
    """Shares of the labels to draw, each evaluated on its own."""
    draws: int = 3
    """How often each share is drawn; the figures are means over the draws."""
    c: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    """Inverse strengths of the L2 penalty to try; one is chosen within the drawn images."""
    pool: Pool = "class"
    """Features to classify: the class token, or the mean of the patch tokens."""
    seed: int = 0
    """Seed of the first draw; the others take the seeds after it."""


Command = Knn | Linear | Probe | Lowshot | Finetune | Patches | Segment | Detect | Predict

DESCRIPTION = """Evaluate the features of a network. Prints top-1 and top-5, or mIoU, and writes a JSON result, a row
for each class and the confusion matrix beside the checkpoint.
Example: fastpmae-eval knn runs/photos --train train.beton --val val.beton"""


def read_command(arguments: Sequence[str]) -> Command:
    """What stands on the command line; the settings of a training start from its preset.

    Raises:
        UserError: for a preset that does not exist, settings that do not fit together, or a flag of an earlier version.
    """
    words = with_values(arguments)
    refuse_old_flags(words, FINETUNE_SETTINGS)
    rate = numbers_on(words, ("blr", "lr"))

    def preset(command: str) -> str:
        return (last_value(words, "--preset") if command in words[:1] else None) or "paper"

    config = finetune_preset(preset("finetune")).using(**(rate if "finetune" in words[:1] else {}))
    probe = PROBE.using(**(rate if "probe" in words[:1] else {}))
    unknown = LabelledCommon(weights=tyro.MISSING, train=tyro.MISSING)
    dense = DenseCommon(weights=tyro.MISSING, train=tyro.MISSING)
    defaults: dict[str, Command] = {
        "knn": Knn(unknown),
        "linear": Linear(unknown),
        "probe": Probe(unknown, probe),
        "lowshot": Lowshot(unknown),
        "finetune": Finetune(unknown, config),
        "patches": Patches(dense),
        "segment": Segment(dense, segment_preset(preset("segment"))),
        "detect": Detect(dense, detect_preset(preset("detect"))),
        "predict": Predict(weights=tyro.MISSING, images=tyro.MISSING, out=tyro.MISSING),
    }
    kinds = tuple(
        Annotated[type(default), tyro.conf.subcommand(name, default=default)] for name, default in defaults.items()
    )
    wanted: Any = Union[kinds]  # noqa: UP007 - of a tuple that is made here
    return tyro.cli(
        tyro.conf.configure(tyro.conf.OmitArgPrefixes)(wanted),
        prog="fastpmae-eval",
        description=DESCRIPTION,
        args=list(arguments),
        registry=HELP_TEXTS,
    )
