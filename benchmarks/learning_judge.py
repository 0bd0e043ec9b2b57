"""What the runs of `bench_learning` are worth: features, which images they sort rightly, who is how far ahead."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastpmae.demo.demo import first_and_mean
from fastpmae.evaluate.knn import knn_predict
from fastpmae.evaluate.linear import best_c, logistic_regression, standardised
from fastpmae.model.vit import Encoder
from fastpmae_loaders.files import atomic_write

POOLS = ("class", "mean")
FOLDS = 5
RESAMPLES = 2000
NEIGHBOURS = 10


@dataclass(frozen=True)
class Images:
    """A labelled set, whole images."""

    pixels: Tensor
    labels: Int[Tensor, " images"]


@dataclass(frozen=True)
class Judged:
    """What one run's features are worth: for each measure and pooling, which images were sorted rightly."""

    case: str
    seed: int
    equal: str
    epochs: int
    seconds: float
    right: dict[str, Bool[np.ndarray, " images"]]
    """By measure and pooling: `knn_val/class` and so on, `linear_val` likewise, tested on the validation images;
    `knn_train` and `linear_cv` on the training images, each left out once, or a fifth of them at a time; and
    `finetune_val`, of the whole network, where that was asked for."""

    def share(self, measure: str) -> float:
        return float(self.right[measure].mean())


def write(judged: Judged, path: Path, curve: Sequence[dict[str, float]] = ()) -> None:
    """As JSON; the bits as hexadecimal digits. The learning curve is for who reads the file: `read` leaves it out."""
    bits = {name: {"n": len(right), "bits": np.packbits(right).tobytes().hex()} for name, right in judged.right.items()}
    figures = {name: judged.share(name) for name in judged.right}
    record = {
        "case": judged.case, "seed": judged.seed, "equal": judged.equal, "epochs": judged.epochs,
        "seconds": judged.seconds, "figures": figures, "right": bits, "curve": list(curve),
    }  # fmt: skip
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(record, indent=1) + "\n")


def read(path: Path) -> Judged:
    record = json.loads(path.read_text())
    right = {
        name: np.unpackbits(np.frombuffer(bytes.fromhex(of["bits"]), np.uint8))[: of["n"]].astype(bool)
        for name, of in record["right"].items()
    }
    return Judged(record["case"], record["seed"], record["equal"], record["epochs"], record["seconds"], right)


def judge(
    features: dict[str, tuple[Float[Tensor, "train dim"], Float[Tensor, "val dim"]]],
    train: Images,
    val: Images,
    device: torch.device | str = "cpu",
) -> dict[str, Bool[np.ndarray, " images"]]:
    """By measure and pooling, `knn_val/class` and so on: which images were sorted rightly; computed on `device`."""
    right, classes = {}, int(train.labels.max()) + 1
    labels, others = train.labels.to(device), val.labels.to(device)
    for pool, of_pool in features.items():
        train_rows, val_rows = (rows.to(device) for rows in of_pool)
        near = knn_predict(train_rows, labels, val_rows, NEIGHBOURS)
        right[f"knn_val/{pool}"] = (near == others).cpu().numpy()
        near = knn_predict(train_rows, labels, train_rows, NEIGHBOURS, leave_one_out=True)
        right[f"knn_train/{pool}"] = (near == labels).cpu().numpy()
        rows, tests = standardised(train_rows, val_rows)
        c = best_c(rows, labels, classes, (0.001, 0.01, 0.1), seed=0)
        weight, bias = logistic_regression(rows, labels, classes, c, most_steps=200)
        found = (tests.double() @ weight.double() + bias.double()).argmax(dim=1)
        right[f"linear_val/{pool}"] = (found == others).cpu().numpy()
        right[f"linear_cv/{pool}"] = (cross_predicted(train_rows, labels, classes, c) == labels).cpu().numpy()
    return right


def cross_predicted(
    rows: Float[Tensor, "images dim"], labels: Int[Tensor, " images"], classes: int, c: float
) -> Int[Tensor, " images"]:
    """The class of every image by the logistic regression that a fifth of all, of each class alike, is kept from."""
    fold, found = torch.empty_like(labels), torch.empty_like(labels)
    for label in range(classes):
        own = (labels == label).nonzero().flatten()
        fold[own] = torch.arange(len(own), device=own.device) % FOLDS
    for number in range(FOLDS):
        kept = fold == number
        fitted, tested = standardised(rows[~kept], rows[kept])
        weight, bias = logistic_regression(fitted, labels[~kept], classes, c, most_steps=200)
        found[kept] = (tested.double() @ weight.double() + bias.double()).argmax(dim=1)
    return found


def features_of(
    encoder: Encoder, train: Images, val: Images, device: torch.device | str = "cpu"
) -> dict[str, tuple[Tensor, Tensor]]:
    """Class token and mean of the patch tokens of every image, computed on `device`."""
    of_train, of_val = (first_and_mean(encoder, images.pixels, torch.device(device)) for images in (train, val))
    return dict(zip(POOLS, zip(of_train, of_val, strict=True), strict=True))


def interval(
    ours: Sequence[Judged], theirs: Sequence[Judged], measure: str, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """The difference of two cases' shares and its 95 % interval, by a paired bootstrap over images.

    Seeds that both have are paired and each image's difference is their mean; a case without seeds to share (the
    thumbnails, or a random start) is averaged over its own.
    """
    shared = {one.seed for one in ours} & {other.seed for other in theirs}
    mine, other = ([one for one in side if not shared or one.seed in shared] for side in (ours, theirs))
    difference = np.mean([one.right[measure] for one in mine], axis=0) - np.mean(
        [one.right[measure] for one in other], axis=0
    )
    draw, count = np.random.default_rng(0), len(difference)
    means = [difference[draw.integers(0, count, count)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)
