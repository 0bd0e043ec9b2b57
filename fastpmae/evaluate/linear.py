"""Linear classifiers of frozen features: a sweep of learning rates trained at once, and logistic regression."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastpmae.distributed.ranks import to_device
from fastpmae_loaders import epoch_order
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.values import Typed

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Sweep(Typed):
    """How a linear classifier is trained.

    Attributes:
        rates: learning rates for 256 images at a time; each trains a classifier of its own.
        optimizer: "sgd" with momentum 0.9, or "adamw".
        epochs, batch_size: the rate falls on a cosine to 0 over all steps.
        weight_decay: of the optimizer.
        seed: decides the order of the images.
    """

    rates: tuple[float, ...] = RATES
    optimizer: Literal["sgd", "adamw"] = "sgd"
    epochs: int = 100
    batch_size: int = 256
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rates or not all(rate > 0 for rate in self.rates):
            raise UserError(f"--rates {' '.join(map(str, self.rates))}: name learning rates above 0")
        if self.epochs < 1 or self.batch_size < 1:
            raise UserError(f"--epochs {self.epochs} and --step-images {self.batch_size} must be at least 1")


def standardised(
    train: Float[Tensor, "train dim"], *others: Float[Tensor, "_others dim"]
) -> list[Float[Tensor, "_any dim"]]:
    """Every set with the training set's mean taken off and its spread divided out, feature by feature.

    This is the BatchNorm without parameters that MAE's probe begins with, over the whole set instead of a batch.
    """
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    return [(rows - mean) / (std + 1e-6) for rows in (train, *others)]


def train_sweep(
    features: Float[Tensor, "images dim"],
    labels: Int[Tensor, " images"],
    classes: int,
    sweep: Sweep,
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "rates dim classes"], Float[Tensor, "rates classes"]]:
    """Weights and biases of a classifier for each learning rate, each as if it had been trained alone.

    All of them see the same batches, and one product gives the logits of all.
    """
    count, dim = features.shape
    batch = min(sweep.batch_size, count)
    weights = [torch.zeros(dim, classes, device=features.device, requires_grad=True) for _ in sweep.rates]
    biases = [torch.zeros(classes, device=features.device, requires_grad=True) for _ in sweep.rates]
    rates = [rate * batch / 256 for rate in sweep.rates]
    groups = [{"params": [weight, bias], "lr": rate} for weight, bias, rate in zip(weights, biases, rates, strict=True)]
    if sweep.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=sweep.weight_decay)
    else:
        optimizer = torch.optim.AdamW(groups, weight_decay=sweep.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, sweep.epochs * (count // batch))
    progress = progress or Progress()
    with progress.count(sweep.epochs, "epochs"):
        for epoch in range(sweep.epochs):
            order = to_device(torch.from_numpy(epoch_order(sweep.seed, epoch, count)), features.device)
            for chosen in order[: count // batch * batch].split(batch):
                rows = features[chosen]
                logits = rows @ torch.cat(weights, dim=1) + torch.cat(biases)
                losses = F.cross_entropy(
                    logits.view(batch, len(rates), classes).transpose(1, 2),
                    labels[chosen, None].expand(-1, len(rates)),
                    reduction="sum",
                )
                optimizer.zero_grad()
                # The classifiers share no weight, so the gradient of the sum holds each one's own.
                (losses / batch).backward()
                optimizer.step()
                schedule.step()
            progress.advance()
    return torch.stack(weights).detach(), torch.stack(biases).detach()


def held_out(labels: Int[Tensor, " images"], share: float, seed: int) -> Bool[Tensor, " images"]:
    """A stratified choice of images to choose settings on: `share` of each class, and never all of it."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    places, turn, count = _by_class(labels, seed)
    chosen[places[turn < torch.minimum((share * count).round(), count - 1)]] = True
    return chosen


def _by_class(
    labels: Int[Tensor, " images"], seed: int
) -> tuple[Int[Tensor, " images"], Int[Tensor, " images"], Float[Tensor, " images"]]:
    """The images class by class, each class in an order drawn by the seed; with each image's turn in its class, and how
    many images the class has."""
    order = torch.from_numpy(epoch_order(seed, 0, len(labels)))
    classes, by = labels.cpu()[order].sort(stable=True)
    counts = classes.unique_consecutive(return_counts=True)[1]
    first = counts.cumsum(0) - counts
    turn = torch.arange(len(labels)) - first.repeat_interleave(counts)
    return order[by], turn, counts.double().repeat_interleave(counts)


def check_strengths(choices: Sequence[float]) -> None:
    """Raise UserError for no inverse strength of the penalty, or one that is not above 0."""
    if not choices:
        raise UserError("--c: name at least one inverse strength of the penalty")
    for c in choices:
        if not c > 0:
            raise UserError(f"--c {c} must be above 0: it is the inverse of the penalty's strength")


def logistic_regression(
    features: Float[Tensor, "images dim"],
    labels: Int[Tensor, " images"],
    classes: int,
    c: float = 1.0,
    most_steps: int = 1000,
) -> tuple[Float[Tensor, "dim classes"], Float[Tensor, " classes"]]:
    """Multinomial logistic regression with an L2 penalty on the weights, solved by L-BFGS to convergence.

    The same minimum as scikit-learn's LogisticRegression(C=c): the mean cross-entropy over the n images plus
    |weights|^2 / (2 c n). With two classes scikit-learn has one vector of weights, which counts twice here. Computed in
    float64.

    Raises:
        UserError: when c is not positive.
    """
    check_strengths((c,))
    rows = features.double()
    penalty = (2 if classes == 2 else 1) / (2 * c * len(features))
    weight = torch.zeros(rows.shape[1], classes, dtype=torch.float64, device=rows.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=rows.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=most_steps,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(rows @ weight + bias, labels) + penalty * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def best_c(
    features: Float[Tensor, "images dim"],
    labels: Int[Tensor, " images"],
    classes: int,
    choices: Sequence[float],
    seed: int,
) -> float:
    """The penalty with which a third of the images is told best from the rest; the strongest of equally good ones.

    With only one image in some class nothing can be held out of it, and where nothing can be held out at all the
    middle choice is taken.
    """
    chosen = held_out(labels, 1 / 3, seed)
    ordered = sorted(choices)
    if not bool(chosen.any()):
        return ordered[len(ordered) // 2]
    right = []
    for c in ordered:
        weight, bias = logistic_regression(features[~chosen], labels[~chosen], classes, c)
        predicted = (features[chosen].double() @ weight + bias).argmax(dim=1)
        right.append((predicted == labels[chosen]).sum().item())
    return ordered[right.index(max(right))]


def draw_few(labels: Int[Tensor, " images"], share: float, seed: int) -> Int[Tensor, " few"]:
    """A labelled subset: `share` of each class, at least one image of it, by a draw that smaller shares begin.

    Raises:
        UserError: when the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(f"--shares {share}: name shares of the labels above 0 and at most 1")
    places, turn, count = _by_class(labels, seed)
    return places[turn < (share * count).round().clamp(min=1)].sort().values
