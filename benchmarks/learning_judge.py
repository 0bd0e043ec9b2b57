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
MEASURES = ("knn_val", "knn_train", "linear_val")
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
    return right


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


def best_pool(judged: Sequence[Judged], measure: str) -> str:
    """The pooling that serves a case better on the training images (leave-one-out), so that no test set chooses."""
    score = {pool: np.mean([one.share(f"knn_train/{pool}") for one in judged]) for pool in POOLS}
    return f"{measure}/{max(POOLS, key=lambda pool: score[pool])}"
