"""k-nearest-neighbour classification of frozen features: how well a network sorts images without a trained head."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.values import typed


@torch.no_grad()
def knn_predict(
    train_features: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, "train"],
    test_features: Float[Tensor, "test dim"],
    k: int = 10,
    *,
    leave_one_out: bool = False,
    chunk_bytes: int = 256 * 2**20,
) -> Int[Tensor, "test"]:
    """The label of each test row by a majority vote of its k nearest training rows, by cosine similarity.

    The similarity is computed in float32, a part of the test rows at a time, so that no more than about
    `chunk_bytes` are held at once. Where several training rows are equally near at the k-th place, those that
    come first in the training set vote. Where labels draw in the vote, the smallest of them wins, as in
    scikit-learn. A row of zeros has similarity 0 to everything.

    With `leave_one_out`, `test_features` are the training features in the same order, and a row never votes on
    itself.

    Raises UserError for rows without a label (-1), for k outside 1..number of training rows that may vote, for
    shapes that do not fit together, and for features that are not finite.
    """
    ranked = knn_ranked(
        train_features,
        train_labels,
        test_features,
        (k,),
        temperature=None,
        best=1,
        leave_one_out=leave_one_out,
        chunk_bytes=chunk_bytes,
    )
    return ranked[k][:, 0]


@torch.no_grad()
def knn_ranked(
    train_features: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, "train"],
    test_features: Float[Tensor, "test dim"],
    ks: Sequence[int] = (10, 20),
    *,
    temperature: float | None = 0.07,
    best: int = 5,
    leave_one_out: bool = False,
    chunk_bytes: int = 256 * 2**20,
    progress: Progress | None = None,
) -> dict[int, Int[Tensor, "test best"]]:
    """For each k the likeliest classes of each test row, the likeliest first, at most `best` of them; -1 in the place
    of a class that got no vote.

    The k nearest training rows by cosine similarity s vote with exp(s / temperature) each (DINO, eval_knn.py), or
    with one vote each where the temperature is None. All else is as in `knn_predict`: every k is counted from the
    same similarities. `progress` counts the test rows.

    Raises UserError as `knn_predict` does, and for a temperature that is not positive.
    """
    ks = typed(ks, tuple[int, ...], "k")
    for k in ks:
        _check(train_features, train_labels, test_features, k, leave_one_out)
    check_temperature(temperature)
    train = F.normalize(train_features.float(), dim=1)
    # Only classes that somebody votes for take memory, whatever their numbers are.
    known, train_labels = train_labels.long().unique(return_inverse=True)
    count, classes = len(train), len(known)
    rows = max(1, chunk_bytes // (4 * (count + classes)))
    ranked: dict[int, list[Tensor]] = {k: [] for k in ks}
    progress = progress or Progress()
    with progress.count(len(test_features), "images"):
        for begin in range(0, len(test_features), rows):
            test = F.normalize(test_features[begin : begin + rows].float(), dim=1)
            similarity = test @ train.T
            if leave_one_out:
                own = torch.arange(len(test), device=test.device)
                similarity[own, begin + own] = -torch.inf
            for k in ks:
                nearest = _nearest(similarity, k)
                weight = torch.ones_like(nearest, dtype=torch.float64)
                if temperature is not None:
                    near = similarity.gather(1, nearest).double()
                    # Shifted by the nearest one's, so that no temperature overflows and somebody always votes.
                    weight = ((near - near.amax(dim=1, keepdim=True)) / temperature).exp()
                votes = torch.zeros(len(test), classes, dtype=torch.float64, device=test.device)
                votes.scatter_add_(1, train_labels[nearest], weight)
                if best == 1:
                    chosen = votes.argmax(1, keepdim=True)  # the first of equal maxima: the smallest label
                    ranked[k].append(known[chosen])
                else:
                    voted = torch.zeros_like(votes, dtype=torch.bool).scatter_(1, train_labels[nearest], True)
                    order = votes.masked_fill(~voted, -1.0).sort(dim=1, descending=True, stable=True)
                    found = known[order.indices[:, :best]]
                    ranked[k].append(found.masked_fill(order.values[:, :best] < 0, -1))
            progress.advance(len(test))
    nothing = known.new_empty(0, min(best, classes))
    return {k: torch.cat(parts) if parts else nothing for k, parts in ranked.items()}


def knn_accuracy(
    train_features: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, "train"],
    test_features: Float[Tensor, "test dim"] | None = None,
    test_labels: Int[Tensor, "test"] | None = None,
    k: int = 10,
    leave_one_out: bool = False,
) -> float:
    """The share (0 to 1) of test rows whose label `knn_predict` finds.

    With `leave_one_out` the training rows are tested against each other; leave the test arguments out then.
    """
    if leave_one_out:
        if test_features is not None or test_labels is not None:
            raise UserError("k-NN with leave_one_out tests the training rows themselves: give no test rows.")
        test_features, test_labels = train_features, train_labels
    if test_features is None or test_labels is None:
        raise UserError("k-NN needs test features and their labels, or leave_one_out=True.")
    if test_labels.shape != test_features.shape[:1] or len(test_labels) == 0:
        raise UserError(f"k-NN got {len(test_features)} test rows and {tuple(test_labels.shape)} test labels.")
    predicted = knn_predict(train_features, train_labels, test_features, k, leave_one_out=leave_one_out)
    return (predicted == test_labels.to(predicted.device)).double().mean().item()


def _nearest(similarity: Float[Tensor, "test train"], k: int) -> Int[Tensor, "test k"]:
    """The indices of each row's k largest entries; of entries equal to the k-th, the first ones."""
    if k == similarity.shape[1]:
        return torch.arange(k, device=similarity.device).expand(len(similarity), k)
    values, indices = similarity.topk(k + 1, dim=1)
    # Which of several equal entries topk returns is not defined. It matters only where the k-th and the next one
    # are equal, which is rare, so only those rows are sorted in full.
    unclear = (values[:, k - 1] == values[:, k]).nonzero().flatten()
    indices = indices[:, :k]
    if len(unclear):
        indices[unclear] = similarity[unclear].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return indices


def check_temperature(temperature: float | None) -> None:
    """Raise UserError for one that is not above 0; None, one vote each, is sound."""
    if temperature is not None and not temperature > 0:
        raise UserError(f"k-NN needs a temperature above 0, not {temperature}")


def check_neighbours(ks: Sequence[int], voters: int) -> None:
    """Raise UserError for no k, or one that is not between 1 and the number of training rows that may vote."""
    if not ks:
        raise UserError("k-NN needs at least one k")
    for k in ks:
        if not 1 <= k <= voters:
            raise UserError(f"k-NN with k = {k} needs k between 1 and the {voters} training rows that may vote.")


def _check(train: Tensor, labels: Tensor, test: Tensor, k: int, leave_one_out: bool) -> None:
    if not all(isinstance(rows, Tensor) for rows in (train, labels, test)):
        raise UserError("k-NN compares tensors; torch.from_numpy makes one of an array")
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1]:
        raise UserError(f"k-NN compares rows of one width, not {tuple(train.shape)} with {tuple(test.shape)}.")
    if labels.shape != train.shape[:1]:
        raise UserError(f"k-NN got {len(train)} training rows and {tuple(labels.shape)} labels.")
    check_neighbours((k,), len(train) - leave_one_out)
    if int(labels.min()) < 0:
        raise UserError("k-NN needs a label for every row; a flat folder of images has none.")
    if not (bool(torch.isfinite(train).all()) and bool(torch.isfinite(test).all())):
        raise UserError("k-NN got features that are not finite.")
