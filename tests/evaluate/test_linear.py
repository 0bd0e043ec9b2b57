"""Linear classifiers against scikit-learn and against one training for each rate; draws of few labels by counting."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import VisionTransformer

from fastpmae import UserError
from fastpmae.evaluate import protocols
from fastpmae.evaluate.backbone import find_backbone
from fastpmae.evaluate.datasets import extract, open_labelled
from fastpmae.evaluate.linear import Sweep, best_c, draw_few, held_out, logistic_regression, standardised, train_sweep
from fastpmae_loaders import epoch_order
from tests.made import write_tree


def made(images: int = 120, dim: int = 9, classes: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (images,), generator=generator)
    centres = torch.randn(classes, dim, generator=generator)
    return centres[labels] + torch.randn(images, dim, generator=generator), labels


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("c", [0.01, 1.0, 30.0])
def test_logistic_regression_is_scikit_learns(c: float, classes: int):
    features, labels = made(classes=classes)
    weight, bias = logistic_regression(features, labels, classes, c)
    reference = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(features.double().numpy(), labels.numpy())
    expected = reference.coef_ if classes > 2 else np.concatenate([-reference.coef_, reference.coef_]) / 2
    np.testing.assert_allclose(weight.T.numpy(), expected, atol=2e-4)
    ours = (features.double() @ weight + bias).softmax(dim=1)
    np.testing.assert_allclose(ours.numpy(), reference.predict_proba(features.double().numpy()), atol=1e-4)


@pytest.mark.slow
def test_the_logistic_method_is_scikit_learns_on_an_encoders_features(tmp_path: Path, monkeypatch):
    torch.manual_seed(3)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    write_tree(tmp_path / "tree" / "train", 45)
    write_tree(tmp_path / "tree" / "val", 75)
    words = ["linear", tmp_path / "vit.pth", "--train", tmp_path / "tree", "--method", "logistic", "--heads", 2]
    words += ["--choose-on", "val", "--c", 0.001, 0.02, 1.0, "--workers", 1, "--out", tmp_path]
    monkeypatch.setattr("sys.argv", ["fastpmae-eval", *map(str, words)])
    assert protocols.main() == 0
    backbone = find_backbone(str(tmp_path / "vit.pth"), heads=2)
    train, val = open_labelled(tmp_path / "tree", None)
    assert val is not None
    rows, others = (
        extract(backbone.build(), backbone, images, ("class",), device=torch.device("cpu"))[0].double().numpy()
        for images in (train, val)
    )
    scaler = StandardScaler().fit(rows)
    result = json.loads(next(tmp_path.glob("linear-logistic*.json")).read_text())
    expected = {}
    for row in result["table"]:
        reference = LogisticRegression(C=row["c"], tol=1e-10, max_iter=10_000)
        reference.fit(scaler.transform(rows), train.labels.numpy())
        expected[row["c"]] = 100 * reference.score(scaler.transform(others), val.labels.numpy())
        assert row["top1"] == pytest.approx(expected[row["c"]], abs=1e-3)
    assert len(set(expected.values())) == 3
    assert result["top1"] == pytest.approx(max(expected.values()), abs=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rates_trained_at_once_are_each_trained_alone(optimizer):
    features, labels = made()
    sweep = Sweep((0.01, 0.3, 2.0), optimizer, epochs=3, batch_size=32, weight_decay=0.02, seed=5)
    weights, biases = train_sweep(features, labels, 4, sweep)
    for place, rate in enumerate(sweep.rates):
        layer = torch.nn.Linear(9, 4)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        kinds = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adamw": (torch.optim.AdamW, {})}
        kind, more = kinds[optimizer]
        alone = kind(layer.parameters(), lr=rate * 32 / 256, weight_decay=0.02, **more)
        step = 0
        for epoch in range(3):
            order = epoch_order(5, epoch, 120)
            for number in range(3):
                alone.param_groups[0]["lr"] = rate * 32 / 256 * (1 + np.cos(np.pi * step / 9)) / 2
                chosen = torch.from_numpy(order[32 * number : 32 * number + 32])
                alone.zero_grad()
                F.cross_entropy(layer(features[chosen]), labels[chosen]).backward()
                alone.step()
                step += 1
        assert torch.allclose(weights[place], layer.weight.T, atol=1e-5)
        assert torch.allclose(biases[place], layer.bias, atol=1e-5)


def test_standardised_is_scikit_learns_scaler():
    train, _ = made()
    test, _ = made(30, seed=1)
    scaler = StandardScaler().fit(train.numpy())
    for ours, rows in zip(standardised(train, test), (train, test), strict=True):
        theirs: Any = scaler.transform(rows.numpy())
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-4)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_few_labels_are_drawn_class_by_class_and_larger_shares_hold_smaller_ones(share: float):
    labels = torch.cat([torch.full((count,), number) for number, count in enumerate((200, 37, 5, 1))])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
    few = draw_few(labels, share, seed=7)
    assert len(few.unique()) == len(few)
    for number, count in enumerate((200, 37, 5, 1)):
        assert (labels[few] == number).sum() == max(1, round(share * count))
    assert set(draw_few(labels, 0.01, 7).tolist()) <= set(few.tolist())
    assert torch.equal(few, draw_few(labels, share, 7))
    assert share == 1.0 or not torch.equal(few, draw_few(labels, share, 8))


def test_held_out_leaves_something_of_each_class_to_learn_from():
    labels = torch.tensor([0] * 30 + [1] * 10 + [2])
    part = held_out(labels, 0.1, seed=0)
    assert torch.bincount(labels[part], minlength=3).tolist() == [3, 1, 0]
    assert bool(held_out(torch.tensor([0, 0, 1, 1]), 1.0, 0).sum() == 2)


def test_the_penalty_that_tells_images_apart_is_chosen():
    # One feature tells the classes, many others are noise: a weak penalty learns the noise.
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    rows = torch.randn(60, 80, generator=generator)
    rows[:, 0] = 1.2 * (labels * 2 - 1) + 0.7 * rows[:, 0]
    part = held_out(labels, 1 / 3, 4)
    right = {}
    for c in (1e-4, 0.003, 1000.0):
        reference = LogisticRegression(C=c, tol=1e-9, max_iter=10_000).fit(rows[~part].numpy(), labels[~part].numpy())
        right[c] = reference.score(rows[part].numpy(), labels[part].numpy())
    assert len(set(right.values())) > 1
    assert best_c(rows, labels, 2, (1000.0, 0.003, 1e-4), 4) == max(right, key=lambda c: (right[c], -c))
    assert best_c(torch.eye(3), torch.arange(3), 3, (0.1, 1.0, 10.0), 0) == 1.0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Sweep(rates=(0.1, 0.0)), "learning rates above 0"),
        (lambda: Sweep(epochs=0), "at least 1"),
        (lambda: Sweep(batch_size=0), "--step-images 0 must be at least 1"),
        (lambda: logistic_regression(torch.eye(2), torch.arange(2), 2, 0.0), "must be above 0"),
        (lambda: draw_few(torch.arange(3), 0.0, 0), "shares of the labels"),
        (lambda: draw_few(torch.arange(3), 1.5, 0), "at most 1"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, sentence: str):
    with pytest.raises(UserError, match=sentence):
        call()
