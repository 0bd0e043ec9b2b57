"""A linear classifier of frozen features in closed form: quick enough to watch a run by."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastpmae_loaders.cli.progress import Progress

PENALTIES = (10.0, 1.0, 0.1, 0.01, 0.001, 0.0001)
"""Penalties on the squared weights for each image, of which the data choose one; the strongest of equally good ones."""


@torch.no_grad()
def least_squares_predict(
    train_features: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, "train"],
    classes: int,
    test_features: Float[Tensor, "test dim"] | None = None,
    *,
    chunk_bytes: int = 256 * 2**20,
    progress: Progress | None = None,
) -> Int[Tensor, "images"]:
    """The class of each test row by ridge regression; without test rows, of each training row by all the others.

    One-hot classes are regressed on features of mean 0 and spread 1 (of the training rows), with an intercept that is
    not penalised. The penalty is the one of `PENALTIES` with the least squared error over the training rows, each
    predicted by all the others. That needs no second fit: row i's residual is divided by 1 - h_i, its leverage
    (Allen's PRESS; Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, eq. 7.52). One
    eigendecomposition of the features' covariance serves every penalty. In float64, since features of a network that
    has only begun to learn are close to collinear. No random number is drawn.

    Of equal scores the smaller class comes first. Labels count from 0 to `classes` - 1. `progress` counts rows.
    """
    count, dim = train_features.shape
    rows = max(1, chunk_bytes // (8 * (2 * dim + 3 * classes)))
    progress = progress or Progress()

    def parts() -> Iterator[tuple[Float[Tensor, "part dim"], Float[Tensor, "part classes"]]]:
        """Training rows around their mean, and their classes as columns of 0 and 1."""
        for some, labels in zip(train_features.split(rows), train_labels.split(rows), strict=True):
            yield some.double() - mean, F.one_hot(labels, classes).double()
            progress.advance(len(some))

    mean = train_features.mean(dim=0, dtype=torch.float64)
    share = torch.bincount(train_labels, minlength=classes).double() / count
    with progress.count((3 if test_features is None else 2) * count, "images"):
        gram = torch.zeros(dim, dim, dtype=torch.float64, device=mean.device)
        moments = torch.zeros(dim, classes, dtype=torch.float64, device=mean.device)
        for centred, truth in parts():
            gram += centred.T @ centred
            moments += centred.T @ truth
        spread = (gram.diagonal() / count).sqrt() + 1e-6
        values, basis = torch.linalg.eigh(gram / spread.outer(spread))
        values = values.clamp(min=0)  # rounding may leave the smallest below
        turn = basis / spread[:, None]
        moments = turn.T @ moments

        def left_out(
            turned: Float[Tensor, "part dim"], truth: Float[Tensor, "part classes"], penalty: float
        ) -> Float[Tensor, "part classes"]:
            """What is missing of each row's classes where all the other rows predict them."""
            inverse = 1 / (values + penalty * count)
            leverage = 1 / count + turned.square() @ inverse
            return (truth - share - turned @ (moments * inverse[:, None])) / (1 - leverage)[:, None]

        errors = torch.zeros(len(PENALTIES), dtype=torch.float64, device=mean.device)
        for centred, truth in parts():
            turned = centred @ turn
            errors += torch.stack([left_out(turned, truth, penalty).square().sum() for penalty in PENALTIES])
        penalty = PENALTIES[int(errors.argmin())]
        if test_features is None:
            return torch.cat(
                [(truth - left_out(centred @ turn, truth, penalty)).argmax(dim=1) for centred, truth in parts()]
            )
        weight = turn @ (moments / (values + penalty * count)[:, None])
        return torch.cat(
            [(share + (some.double() - mean) @ weight).argmax(dim=1) for some in test_features.split(rows)]
        )
