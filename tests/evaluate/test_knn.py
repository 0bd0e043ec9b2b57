"""k-NN against scikit-learn's classifier, and its rules for ties against cases worked out by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fastpmae.evaluate.knn import knn_accuracy, knn_predict, knn_ranked
from fastpmae_loaders.errors import UserError


def sets(seed: int, train: int = 300, test: int = 90, dim: int = 12, classes: int = 7):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(classes, dim))
    labels = generator.integers(classes, size=train + test)
    features = centres[labels] + generator.normal(size=(train + test, dim)) * 1.5
    features, labels = torch.from_numpy(features).float(), torch.from_numpy(labels)
    return features[:train], labels[:train], features[train:], labels[train:]


@pytest.mark.parametrize("k", [1, 2, 5, 10, 299, 300])
def test_same_labels_as_scikit_learn(k):
    train, train_labels, test, test_labels = sets(k)
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute")
    reference.fit(train.double().numpy(), train_labels.numpy())
    expected = reference.predict(test.double().numpy())
    np.testing.assert_array_equal(knn_predict(train, train_labels, test, k).numpy(), expected)
    accuracy = knn_accuracy(train, train_labels, test, test_labels, k)
    assert accuracy == pytest.approx(float(np.mean(expected == test_labels.numpy())), abs=1e-12)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_leave_one_out_is_a_classifier_refitted_without_each_row(k):
    train, labels, _, _ = sets(100 + k, train=60, test=1)
    expected = []
    for row in range(len(train)):
        others = [other for other in range(len(train)) if other != row]
        reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute")
        reference.fit(train[others].double().numpy(), labels[others].numpy())
        expected.append(reference.predict(train[row : row + 1].double().numpy())[0])
    predicted = knn_predict(train, labels, train, k, leave_one_out=True)
    np.testing.assert_array_equal(predicted.numpy(), expected)
    assert knn_accuracy(train, labels, k=k, leave_one_out=True) == pytest.approx(
        float(np.mean(np.array(expected) == labels.numpy())), abs=1e-12
    )


def test_parts_of_any_size_give_the_same():
    train, labels, test, _ = sets(5)
    whole = knn_predict(train, labels, test, 10)
    for chunk_bytes in (1, 4 * 307 * 13, 4 * 307 * 89):
        assert torch.equal(knn_predict(train, labels, test, 10, chunk_bytes=chunk_bytes), whole)


def test_a_drawn_vote_goes_to_the_smallest_label():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.0, 1.0]])
    labels = torch.tensor([4, 2, 4, 2, 1])
    assert knn_predict(train, labels, torch.tensor([[1.0, 0.0]]), 4).tolist() == [2]
    assert knn_predict(train, labels, torch.tensor([[1.0, 0.0]]), 3).tolist() == [4]


def test_rows_equally_near_at_the_last_place_vote_in_their_order():
    # the same direction five times: with k = 3 the first three vote, whatever their lengths
    train = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0], [4.0, 0.0], [5.0, 0.0], [0.0, 1.0]])
    assert knn_predict(train, torch.tensor([7, 7, 1, 1, 1, 0]), torch.tensor([[1.0, 0.0]]), 3).tolist() == [7]
    # ... after those that are nearer
    train = torch.tensor([[0.0, 2.0], [0.0, 1.0], [1.0, 0.0], [0.0, 3.0]])
    assert knn_predict(train, torch.tensor([0, 1, 5, 1]), torch.tensor([[1.0, 0.0]]), 2).tolist() == [0]
    assert knn_predict(train, torch.tensor([6, 1, 5, 1]), torch.tensor([[1.0, 0.0]]), 2).tolist() == [5]


def test_zero_features_and_half_precision_are_taken():
    train = torch.eye(4, dtype=torch.bfloat16)
    assert knn_predict(train, torch.arange(4), train, 1).tolist() == [0, 1, 2, 3]
    assert knn_predict(train, torch.arange(4), torch.zeros(1, 4), 1).tolist() == [0]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"k": 0}, "k = 0"),
        ({"k": 5}, "k = 5"),
        ({"k": 4, "leave_one_out": True, "test": None, "test_labels": None}, "3 training rows"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, "label for every row"),
        ({"labels": torch.tensor([0, 1])}, "4 training rows"),
        ({"test": torch.randn(3, 6)}, "one width"),
        ({"test_labels": torch.tensor([0])}, "test labels"),
        ({"test_labels": None}, "test features and their labels"),
        ({"leave_one_out": True}, "give no test rows"),
        ({"test": torch.full((3, 5), torch.nan)}, "not finite"),
    ],
)
@pytest.mark.untyped
def test_bad_input_is_refused_in_a_sentence(change, word):
    good = {"train": torch.randn(4, 5), "labels": torch.tensor([0, 1, 1, 0]), "k": 2, "leave_one_out": False}
    good |= {"test": torch.randn(3, 5), "test_labels": torch.tensor([0, 1, 1])} | change
    with pytest.raises(UserError, match=word):
        knn_accuracy(good["train"], good["labels"], good["test"], good["test_labels"], good["k"], good["leave_one_out"])


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_weighted_votes_rank_classes_as_scikit_learn(temperature):
    train, train_labels, test, _ = sets(11)
    ranked = knn_ranked(train, train_labels, test, (1, 5, 40), temperature=temperature)
    for k in (1, 5, 40):
        weights: Any = lambda distance: np.exp((1 - distance) / temperature)  # noqa: E731
        reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
        reference.fit(train.double().numpy(), train_labels.numpy())
        share: Any = reference.predict_proba(test.double().numpy())
        np.testing.assert_array_equal(ranked[k][:, 0].numpy(), share.argmax(axis=1))
        # as good a place for each class as its share of the votes gives it, whatever the order of equal ones
        chosen = np.take_along_axis(share, ranked[k].numpy(), axis=1)
        chosen[ranked[k].numpy() < 0] = 0  # none of the others got a vote
        np.testing.assert_allclose(chosen, -np.sort(-share, axis=1)[:, :5], atol=1e-5)


def test_every_k_is_counted_as_if_it_were_alone_and_in_parts():
    train, labels, _, _ = sets(12)
    together = knn_ranked(train, labels, train, (3, 7), temperature=None, leave_one_out=True, chunk_bytes=5000)
    for k in (3, 7):
        assert torch.equal(together[k][:, 0], knn_predict(train, labels, train, k, leave_one_out=True))
        assert together[k].shape == (len(train), 5)
    assert not torch.equal(together[3], together[7])


def test_a_small_temperature_is_the_nearest_neighbour_and_none_overflows():
    train, labels, test, _ = sets(13)
    nearest = knn_predict(train, labels, test, 1)
    assert torch.equal(knn_ranked(train, labels, test, (20,), temperature=1e-3)[20][:, 0], nearest)
    with pytest.raises(UserError, match="temperature above 0"):
        knn_ranked(train, labels, test, (20,), temperature=0.0)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"k": "3"}, "k is"),
        ({"k": 1.5}, "k is"),
        ({"k": True}, "k is"),
        ({"train_features": np.eye(4)}, "torch.from_numpy"),
        ({"train_labels": [0, 1, 0, 1]}, "torch.from_numpy"),
    ],
)
@pytest.mark.untyped
def test_arguments_of_another_kind(more, said):
    rows = {"train_features": torch.eye(4), "train_labels": torch.tensor([0, 1, 0, 1]), "test_features": torch.eye(4)}
    assert knn_predict(**rows, k=np.int64(2)).tolist() == knn_predict(**rows, k=2.0).tolist()  # pyright: ignore
    with pytest.raises(UserError, match=said):
        knn_predict(**(rows | more))


def test_a_class_without_a_vote_is_none_of_the_likeliest():
    train = torch.eye(6)
    ranked = knn_ranked(train, torch.arange(6), train, (1, 3), leave_one_out=False)
    assert ranked[1].tolist() == [[label, -1, -1, -1, -1] for label in range(6)]
    assert ((ranked[3] >= 0).sum(dim=1) == 3).all()
    # nor does a vote get lost that a small temperature makes very light
    light = knn_ranked(train, torch.arange(6), train, (2,), temperature=1e-5)[2]
    assert ((light >= 0).sum(dim=1) == 2).all()
    assert light[:, 0].tolist() == list(range(6))


def test_labels_of_any_size_take_no_memory():
    train = torch.eye(3)
    labels = torch.tensor([0, 10**15, 7])
    assert knn_predict(train, labels, train, 1).tolist() == labels.tolist()
    assert knn_ranked(train, labels, train, (3,))[3][1, 0] == 10**15
