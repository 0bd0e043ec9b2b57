"""The linear probe in closed form against scikit-learn, which fits once for every row that is left out."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from fastpmae.evaluate.least_squares import PENALTIES, least_squares_predict
from fastpmae_loaders.cli.progress import Progress
from tests.evaluate.test_linear import made


def by_scikit_learn(features: np.ndarray, labels: np.ndarray, classes: int, test: np.ndarray | None) -> np.ndarray:
    """One fit for each row and penalty; the intercept is scikit-learn's own."""
    scaler, truth = StandardScaler().fit(features), np.eye(classes)[labels]
    rows, count = scaler.transform(features), len(features)
    alone = {}
    for penalty in PENALTIES:
        scores = []
        for left_out in range(count):
            others = np.arange(count) != left_out
            fitted = Ridge(alpha=penalty * count, solver="svd").fit(rows[others], truth[others])
            scores.append(fitted.predict(rows[left_out : left_out + 1])[0])
        alone[penalty] = np.array(scores)
    best = min(PENALTIES, key=lambda penalty: np.square(truth - alone[penalty]).sum())
    if test is None:
        return alone[best].argmax(1)
    return Ridge(alpha=best * count, solver="svd").fit(rows, truth).predict(scaler.transform(test)).argmax(1)


@pytest.mark.parametrize(("images", "dim", "classes"), [(60, 9, 4), (25, 40, 3), (40, 5, 2)])
@pytest.mark.parametrize("chunk_bytes", [1, 3000, 2**28], ids=["row by row", "in parts", "at once"])
def test_the_classes_are_scikit_learns(images: int, dim: int, classes: int, chunk_bytes: int):
    features, labels = made(images, dim, classes)
    labels[::7] = (labels[::7] + 1) % classes  # some are wrong
    others, _ = made(30, dim, classes, seed=1)
    ours = least_squares_predict(features, labels, classes, chunk_bytes=chunk_bytes)
    assert ours.tolist() == by_scikit_learn(features.numpy(), labels.numpy(), classes, None).tolist()
    assert 0.5 < (ours == labels).double().mean() < 1, "neither chance nor each row's own label"
    ours = least_squares_predict(features, labels, classes, others, chunk_bytes=chunk_bytes)
    assert ours.tolist() == by_scikit_learn(features.numpy(), labels.numpy(), classes, others.numpy()).tolist()


def test_features_that_have_collapsed_say_nothing():
    """All the same, all along one line, or of widely different sizes: no number overflows."""
    features, labels = made()
    commonest = labels.bincount().argmax()
    same = least_squares_predict(features[:1].expand(len(labels), -1), labels, 4, features)
    assert (same == commonest).all()
    line = features[:, :1].expand(-1, 9)
    alone = least_squares_predict(features[:, :1], labels, 4)
    assert (least_squares_predict(line, labels, 4) == alone).double().mean() > 0.95
    sizes = 10.0 ** torch.arange(-3, 6)
    assert torch.equal(least_squares_predict(features * sizes, labels, 4), least_squares_predict(features, labels, 4))


def test_a_class_without_an_image_is_never_found():
    features, labels = made()
    assert torch.equal(least_squares_predict(features, labels, 7), least_squares_predict(features, labels, 4))


def test_rows_are_counted_to_the_end():
    features, labels = made()
    progress = Progress()
    for test in (None, features):
        least_squares_predict(features, labels, 4, test, chunk_bytes=1, progress=progress)
        assert progress._count.done == progress._count.total > 0
