"""`fastpmae-eval patches` as a user calls it."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer

from fastpmae import PRESETS, pretrain, write_beton
from fastpmae.evaluate import protocols
from fastpmae.evaluate.backbone import find_backbone
from fastpmae.evaluate.dense.patch_features import Kept, patch_network, start_anew
from fastpmae.model.patches import sincos_positions
from tests.made import write_tree

SIDES = (30, 44)
"""No multiples of the patches of 8 pixels."""


def write_scene(folder: Path, seed: int) -> None:
    """A bright sky over dark ground at a height of its own, a red block in it, and a strip of void; with its mask."""
    rng = np.random.default_rng(seed)
    height, width = SIDES
    mask = np.zeros(SIDES, np.uint8)
    mask[rng.integers(8, 22) :] = 1
    left = rng.integers(0, width - 16)
    mask[12:24, left : left + 16] = 2
    colours = np.array([[170, 200, 240], [60, 70, 50], [200, 30, 40]])
    pixels = (colours[mask] + rng.normal(0, 12, (height, width, 3))).clip(0, 255).astype(np.uint8)
    mask[:, -2:] = 255
    for part, image in (("images", pixels), ("masks", mask)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / part / f"{seed:03d}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with masks of three classes, and a run of two steps."""
    root = tmp_path_factory.mktemp("patches")
    for seed in range(9):
        write_scene(root / "scenes" / ("train" if seed < 6 else "val"), seed)
    write_tree(root / "tree", 16)
    write_beton(root / "tree", root / "train.beton")
    pretrain(
        PRESETS["demo"].using(
            beton=root / "train.beton", out=root / "run", image_size=32, width=32, heads=2, depth=2, decoder_width=32,
            decoder_depth=1, decoder_heads=2, head_hidden=32, head_bottleneck=16, prototypes=24, epochs=2,
            pixel_epochs=0, steps=2, batch_size=16, workers=1, device="cpu", tensorboard=False,
        )
    )  # fmt: skip
    return root


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["fastpmae-eval", "patches", *map(str, words), "--device", "cpu"])
    return protocols.main()


@pytest.mark.slow
def test_patches_are_probed_beside_their_yardsticks(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = [data / "run", "--train", data / "scenes", "--out", tmp_path, "--steps", 20, "--step-images", 3, "--k", 5]
    assert call(monkeypatch, *words) == 0
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if line.split()[-1:] and "wrote" not in line]
    rows = {line[:34].strip(): line[34:].split() for line in lines}
    assert {"student", "random weights", "colour, contrast and place", "place alone"} <= rows.keys()
    assert [len(rows[name]) for name in ("student", "random weights", "place alone")] == [2, 2, 1]
    # scenes that are told apart by colour
    assert float(rows["colour, contrast and place"][0]) > 75 > float(rows["place alone"][0])
    assert "255 in the masks is taken for void" in said.out + said.err
    record = json.loads((tmp_path / "patches-student.json").read_text())
    assert record["miou"] == record["table"][0]["knn"]["miou"] == pytest.approx(float(rows["student"][0]), abs=0.006)
    assert (record["classes"], record["images"], record["patch"]) == (3, 3, 8)
    table = list(csv.DictReader((tmp_path / "patches-student-classes.csv").read_text().splitlines()))
    iou = [float(row["iou"]) for row in table]
    assert sum(iou) / 3 == pytest.approx(record["miou"], abs=0.01)
    # the last two columns of three images do not count
    assert sum(int(row["pixels"]) for row in table) == 3 * SIDES[0] * (SIDES[1] - 2)
    for name in ("confusion", "overlays"):
        with Image.open(tmp_path / f"patches-student-{name}.png") as picture:
            assert picture.width > 400
    # the same command finds its own files again, and computes the same
    assert call(monkeypatch, *words, "--no-yardsticks", "--no-linear", "--keep-gb", "0") == 0
    again = json.loads((tmp_path / "patches-student.json").read_text())
    assert again["miou"] == record["miou"]
    assert again["table"][0]["linear"] is None
    assert len(list(tmp_path.iterdir())) == 4


def test_features_of_an_image_of_any_size(data: Path):
    """Of the network's own size they are timm's; of another, of interpolated positions on whole patches."""
    backbone = find_backbone(str(data / "run"))
    network = patch_network(backbone, torch.device("cpu"))
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    grid = network.grid(32, 32, 512)
    plain = backbone.build().eval()
    with torch.no_grad():
        tokens = plain.forward_features(backbone.normalised(torch.from_numpy(image).permute(2, 0, 1)[None]))  # pyright: ignore[reportCallIssue]
    found = network.features(image, grid)
    assert torch.allclose(found.flatten(0, 1), tokens[0, 1:], atol=1e-5)
    cut = image[:30, :28]
    grid = network.grid(30, 28, 512)
    assert (grid.rows, grid.columns) == (4, 4)
    filled = np.pad(cut, ((0, 2), (0, 4), (0, 0)), mode="edge")
    assert torch.allclose(network.features(cut, grid), network.features(filled, network.grid(32, 32, 512)), atol=1e-5)
    other = network.restarted(1)
    assert not torch.allclose(other.features(image, network.grid(32, 32, 0)), found)
    assert torch.equal(other.features(cut, grid), network.restarted(1).features(cut, grid))
    assert torch.equal(network.features(image, network.grid(32, 32, 0)), found)


SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}


@pytest.mark.parametrize(
    "make",
    [
        lambda: VisionTransformer(**SIZES),
        lambda: VisionTransformer(**SIZES, init_values=1e-4, reg_tokens=2, no_embed_class=True, qk_norm=True),
        lambda: Beit(**SIZES, use_abs_pos_emb=True, use_rel_pos_bias=True, init_values=0.1),
    ],
)
def test_a_restarted_network_keeps_nothing_of_its_training(make: Callable[[], Any]):
    trained, other = make(), make()
    with torch.no_grad():
        for number, model in enumerate((trained, other)):
            for parameter in model.parameters():
                parameter.fill_(number + 0.5)
    for model in (trained, other):
        start_anew(model, torch.Generator().manual_seed(0))
    ours, theirs, fresh = (dict(model.named_parameters()) for model in (trained, other, make()))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name, tensor in ours.items():
        # as timm starts it: what is constant there is the same constant, what is drawn is as small
        if fresh[name].numel() and bool((fresh[name] == fresh[name].flatten()[0]).all()):
            assert torch.equal(tensor, fresh[name]), name
        elif not name.endswith(("bias", "pos_embed")):  # MAE's convolution has a bias of 0
            assert 0 < tensor.float().std() < 1, name
    positions = ours["pos_embed"][0]
    assert torch.equal(positions[-16:], sincos_positions(4, 4, 16))
    assert not positions[:-16].any()


def test_features_are_kept_while_there_is_room():
    made: list[int] = []

    def make(place: int) -> torch.Tensor:
        made.append(place)
        return torch.full((2, 2, 4), 1e6 if place == 3 else float(place))

    kept = Kept(make, room=2 * 32)
    for place in (0, 1, 2, 0, 1, 2):
        assert (kept(place) == place).all()
    assert made == [0, 1, 2, 2]
    plenty = Kept(make, room=10**6)
    # what fp16 cannot hold is made again
    assert (plenty(3) == 1e6).all()
    assert (plenty(3) == 1e6).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--k", "0"], "--k 0: name how many neighbours"),
        (["--temperature", "0"], "--temperature 0.0 must be above 0"),
        (["--memory", "3"], "--memory 3 holds fewer patches than --k 30"),
        (["--steps", "0"], "--steps 0 and --step-images 16 must be at least 1"),
        (["--lr", "0"], "--lr 0.0 must be above 0"),
        (["--classes", "nowhere.json"], "nowhere.json cannot be read"),
        (["--val", "nowhere"], "nowhere does not exist"),
    ],
)
def test_what_does_not_fit_is_a_sentence(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
):
    assert call(monkeypatch, data / "run", "--train", data / "scenes", *words) == 2
    assert said in capsys.readouterr().err


def test_a_set_without_a_validation_split_needs_another(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert call(monkeypatch, data / "run", "--train", data / "scenes" / "train") == 2
    assert "--val is missing" in capsys.readouterr().err


def test_miou_is_that_of_a_plain_count():
    """The figures of a whole set against scikit-learn's confusion matrix."""
    from fastpmae.evaluate.dense.overlap import MaskScores, confusion_of

    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(-1, 4, (3, 20, 20)), rng.integers(0, 4, (3, 20, 20))
    truth[truth == 3] = 0
    counts = [confusion_of(torch.from_numpy(a), torch.from_numpy(b), 4) for a, b in zip(truth, predicted, strict=True)]
    total = torch.stack(counts).sum(dim=0)
    keep = truth >= 0
    expected = confusion_matrix(truth[keep], predicted[keep], labels=range(4))
    assert (total.numpy() == expected).all()
    ious = [100 * expected[c, c] / (expected[c].sum() + expected[:, c].sum() - expected[c, c]) for c in range(3)]
    # class 3 is nowhere in the truth: it is no zero in the mean
    assert MaskScores(total, 3).figures()["miou"] == pytest.approx(np.mean(ious), abs=1e-3)
