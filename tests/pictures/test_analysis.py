"""What a run has learnt: the numbers against timm, scikit-learn and the step's own, and the pictures of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.decomposition import PCA
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from fastpmae import Config, pretrain
from fastpmae.model.build import view_settings
from fastpmae.pictures.analysis import analyse, batch_of, class_attention, networks_of, principal_colours, prototype_use
from fastpmae.pictures.figures import AGREES, DISAGREES
from fastpmae.pictures.view import draw_run, draw_views, view_command
from fastpmae.pretraining.match_geometry import match_geometry
from fastpmae.pretraining.step import compute_targets, labelling_forward, student_loss
from fastpmae.run.checkpoint import find_checkpoint
from fastpmae_loaders import Beton, open_samples
from fastpmae_loaders.errors import UserError
from tests.made import tiny_settings, write_tree


@pytest.fixture(scope="module")
def run(small_beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(tiny_settings(small_beton).using(out=tmp_path_factory.mktemp("analysis") / "run", epochs=1))


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["image", "fold"])
def test_similarity_and_match_are_those_of_the_step(run: Path, small_beton: Path, tmp_path: Path, scope: str):
    if scope == "fold":
        run = pretrain(tiny_settings(small_beton).using(out=tmp_path / "run", match_scope="fold", steps=5))
    analysis = analyse(find_checkpoint(run), Beton(small_beton), samples=7)
    student, teachers = networks_of(find_checkpoint(run))
    losses = student_loss(
        student, analysis.batch, None, compute_targets(teachers, analysis.batch, analysis.config), analysis.config
    )
    assert 1 - analysis.similarity.mean() == pytest.approx(losses.reconstruction.item(), abs=1e-6)
    assert analysis.match is not None and losses.match is not None  # noqa: PT018
    assert torch.equal(analysis.match, losses.match)
    assert analysis.overlap is not None and analysis.reachable is not None  # noqa: PT018
    figures = match_geometry(analysis.batch, analysis.match, analysis.config)
    assert analysis.reachable.double().mean() == pytest.approx(figures["match_reachable"])
    assert analysis.overlap[analysis.reachable].double().mean() == pytest.approx(figures["match_overlap"])
    assert analysis.step == 5


@pytest.mark.slow
def test_a_run_with_teachers_in_8_bits_is_looked_at_on_any_cpu(
    small_beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = pretrain(tiny_settings(small_beton).using(out=tmp_path / "run", teacher_precision="fp8", steps=1))
    monkeypatch.delattr(torch, "_scaled_mm")
    monkeypatch.delattr(torch.nn.functional, "scaled_mm", raising=False)
    out = draw_run(run, small_beton, tmp_path / "learnt.png", samples=2)
    assert np.array(Image.open(out).convert("L")).min() < 200


def test_class_attention_is_timms(run: Path):
    student, _ = networks_of(find_checkpoint(run))
    encoder = student.encoder
    vit: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0
    )
    vit.load_state_dict(encoder.state_dict())
    seen = []
    last = vit.eval().blocks[-1].attn
    last.fused_attn = False
    last.attn_drop.register_forward_hook(lambda _module, given, _out: seen.append(given[0]))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    with torch.no_grad():
        vit((images / 255 - mean) / std)
    torch.testing.assert_close(class_attention(encoder, images), seen[0].mean(dim=1)[:, 0, 1:], rtol=1e-4, atol=1e-6)


def test_colours_are_principal_components():
    tokens = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 13)
    rows = tokens.flatten(0, 1).double().numpy()
    colours = principal_colours(tokens).flatten(0, 1).double().numpy()
    for component, colour in zip(PCA(3).fit_transform(rows).T, colours.T, strict=True):
        low, high = np.quantile(component, [0.02, 0.98])
        expected = np.clip((component - low) / (high - low), 0, 1)
        # a component's sign is free
        assert min(np.abs(colour - expected).max(), np.abs(colour - (1 - expected)).max()) < 1e-5


def test_colours_of_few_or_equal_tokens():
    assert principal_colours(torch.zeros(2, 3, 8)).shape == (2, 3, 3)
    assert principal_colours(torch.randn(1, 2, 8)).isfinite().all()


def test_prototypes_come_with_their_nearest_patches(run: Path, small_beton: Path):
    use = prototype_use(find_checkpoint(run), Beton(small_beton), samples=16, shown=5, best=3)
    assert use.patches.shape == (len(use.prototypes), 3, 3, 24, 24)
    assert (use.shares.diff() <= 0).all()
    assert 0 < use.shares.sum() <= 1 + 1e-6
    assert 1 <= use.used <= 24
    # the first picture of each row is the patch of the largest logit of all
    from fastpmae.pictures.analysis import batch_of

    config = use.config
    batch = batch_of(config, Beton(small_beton), 16)
    _, teachers = networks_of(find_checkpoint(run))
    assert teachers.labelling is not None
    with torch.no_grad():
        _, (_, patch_logits) = labelling_forward(teachers.labelling, batch, config)
    logits = patch_logits.matrix
    assert logits is not None
    for prototype, pictures in zip(use.prototypes, use.patches, strict=True):
        best = int(logits[:, prototype].argmax())
        image, patch = best // 12, int(batch.folds[best // 12, best % 12])
        top, left = patch // 4 * 8, patch % 4 * 8
        assert torch.equal(pictures[0, :, 8:16, 8:16], batch.complex[image, :, top : top + 8, left : left + 8])


@pytest.mark.slow
@pytest.mark.parametrize("picture", ["analysis", "prototypes"])
def test_pictures(run: Path, small_beton: Path, tmp_path: Path, picture):
    out = draw_run(run, small_beton, tmp_path / "out.png", picture=picture, samples=3)
    drawn = np.array(Image.open(out).convert("RGB")).astype(int)
    assert (drawn.min(-1) < 200).mean() > 0.2
    if picture == "analysis":
        for colour in (AGREES, DISAGREES):
            wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            assert (np.abs(drawn - wanted).max(-1) < 12).sum() > 50
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.slow
def test_a_run_looks_at_a_folder_of_images(run: Path, tmp_path: Path):
    """Its own engine, for .beton files, reads none."""
    config = find_checkpoint(run).config
    assert config.data.loader == "native"
    write_tree(tmp_path / "images", 8)
    batch = batch_of(config, open_samples(tmp_path / "images"), 3)
    assert len(batch) == 3
    draw_run(run, tmp_path / "images", tmp_path / "out.png", samples=2)


@pytest.mark.slow
def test_views_of_a_run_are_its_own(run: Path, small_beton: Path, tmp_path: Path):
    """Of its sizes and its seed, in the epoch that is named."""
    config = find_checkpoint(run).config
    view_command(str(small_beton), tmp_path / "a.png", run=str(run), picture="views", samples=2, epoch=3)
    settings = view_settings(config)
    assert settings.image_size != 224
    draw_views(small_beton, tmp_path / "b.png", samples=2, epoch=3, seed=config.run.seed, settings=settings)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(UserError, match="--epoch 3: with --run it is --picture views that shows an epoch"):
        view_command(str(small_beton), tmp_path / "c.png", run=str(run), epoch=3)
    assert not (tmp_path / "c.png").exists()


@pytest.mark.slow
def test_a_run_without_labels(tiny: Config, small_beton: Path, tmp_path: Path):
    mae = {"teachers": "none", "target": "pixels", "lambda_c": 0.0, "lambda_p": 0.0}
    folder = pretrain(tiny.using(**mae, steps=1))
    draw_run(folder, small_beton, tmp_path / "mae.png", samples=2)
    with pytest.raises(UserError, match="holds no prototypes"):
        draw_run(folder, small_beton, tmp_path / "none.png", picture="prototypes")
    assert not (tmp_path / "none.png").exists()


def test_what_cannot_be_drawn(small_beton: Path, tmp_path: Path):
    with pytest.raises(UserError, match="--picture analysis needs --run"):
        view_command(str(small_beton), tmp_path / "out.png", picture="analysis")
    with pytest.raises(UserError, match="no sound checkpoint"):
        view_command(str(small_beton), tmp_path / "out.png", run=str(tmp_path))
    with pytest.raises(UserError, match="no sample 44"):
        view_command(str(small_beton), tmp_path / "out.png", index=(44,), picture="views")
    with pytest.raises(UserError, match="no sound checkpoint"):
        view_command(str(small_beton), tmp_path / "out.png", run=str(tmp_path), picture="views")
