"""Weights in and out: --init, fastpmae-export, fastpmae-embed."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastpmae import Config, UserError, embed_images, export_encoder, load_encoder, pretrain
from fastpmae.evaluate import features as embed_module
from fastpmae.evaluate.knn import knn_ranked
from fastpmae.export import export as export_module
from fastpmae.model.build import make_encoder
from fastpmae.run.checkpoint import checkpoint_path, read_checkpoint, write_checkpoint
from fastpmae.run.init_weights import start_encoder
from fastpmae_loaders import Beton
from fastpmae_loaders.cli.progress import Bar, Progress


@pytest.fixture
def run(tiny: Config) -> Path:
    return pretrain(tiny.using(steps=5, warmup_epochs=0.0, blr=0.05))


def timm_features(path: Path, images: torch.Tensor) -> torch.Tensor:
    """What timm makes of uint8 images with exported weights: class token and patch tokens after the final norm."""
    with safetensors.safe_open(path, "pt") as file:
        arguments = json.loads(file.metadata()["timm"])
    model: Any = timm.create_model(arguments.pop("model_name"), **arguments).eval()
    model.load_state_dict(load_file(path))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        return model.forward_features((images / 255 - mean[:, None, None]) / std[:, None, None])


@pytest.mark.parametrize("network", ["student", "labelling_teacher", "reconstruction_teacher"])
def test_exported_weights_give_timm_our_features(run: Path, tmp_path: Path, network):
    arguments = export_encoder(run, tmp_path / "encoder.safetensors", network)
    assert arguments["model_name"] == "vit_tiny_patch16_224"
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    tokens = timm_features(tmp_path / "encoder.safetensors", images)
    encoder, _ = load_encoder(run, network)
    assert (embed_module.features(encoder, images, "class") - tokens[:, 0]).abs().max() < 1e-5
    assert (embed_module.features(encoder, images, "mean") - tokens[:, 1:].mean(dim=1)).abs().max() < 1e-5


@pytest.mark.slow
def test_networks_of_a_run_differ_and_random_is_where_it_started(run: Path, tiny: Config, tmp_path: Path):
    weights = {
        network: load_encoder(run, network)[0].state_dict()["blocks.0.mlp.fc1.weight"]
        for network in ("student", "labelling_teacher", "reconstruction_teacher", "random")
    }
    assert len({weight.sum().item() for weight in weights.values()}) == 4
    still = pretrain(tiny.using(steps=1, blr=0.0, out=tmp_path / "still"))
    assert torch.equal(load_encoder(still)[0].state_dict()["blocks.0.mlp.fc1.weight"], weights["random"])


def test_embed_equals_timm_on_pil_crops(run: Path, small_beton: Path, tmp_path: Path):
    features, labels = embed_images(run, small_beton, batch_size=16, crop_ratio=1.0)
    assert features.shape == (44, 32)
    assert features.dtype == np.float32
    beton = Beton(small_beton)
    assert labels.tolist() == beton.label.tolist()
    export_encoder(run, tmp_path / "encoder.safetensors")
    crops = []
    for index in range(44):
        image = Image.fromarray(beton.decode(index))
        scale = 32 / min(image.size)
        width, height = (max(32, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (image.width - 32) // 2, (image.height - 32) // 2
        crops.append(np.asarray(image.crop((left, top, left + 32, top + 32))).transpose(2, 0, 1))
    tokens = timm_features(tmp_path / "encoder.safetensors", torch.from_numpy(np.stack(crops)))
    # another resize rounds a little differently and may start a pixel aside; the features still say which image it is
    theirs = tokens[:, 0].numpy()
    nearest = ((features[:, None] - theirs[None]) ** 2).sum(-1).argmin(1)
    assert (nearest == np.arange(44)).mean() > 0.9


@pytest.mark.slow
def test_what_takes_long_counts_its_images(run: Path, small_beton: Path, tiny: Config, monkeypatch):
    counted: list[tuple[int, str, int]] = []

    class Counted(Progress):
        def count(self, total: int, unit: str):
            counted.append((total, unit, 0))
            return super().count(total, unit)

        def advance(self, count: int = 1) -> None:
            total, unit, done = counted[-1]
            counted[-1] = total, unit, done + count

    features, labels = embed_images(run, small_beton, batch_size=16, progress=Counted())
    knn_ranked(
        torch.from_numpy(features),
        torch.from_numpy(labels),
        torch.from_numpy(features),
        chunk_bytes=999,
        progress=Counted(),
    )
    assert counted == [(44, "images", 44), (44, "images", 44)]
    # during a run the same counts stand in the run's own bar
    shown: list[str] = []
    monkeypatch.setattr(Bar, "update", lambda bar, done=None, *, words=None, note=None: shown.append(note or ""))
    pretrain(tiny.using(eval_every=1, steps=5, out=run.parent / "watched"))
    counts = [words for words in shown if words.startswith("evaluation")]
    # the features of all, and then k-NN and the three blocks of the linear classifier, of each network
    each = ["44 of 44", "44 of 132", "88 of 132", "132 of 132"]
    assert counts == [f"evaluation: {count} images" for count in ["44 of 44", *each * 3]]


def test_embed_command_writes_features_and_labels(run: Path, small_beton: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "features.npz"
    monkeypatch.setattr("sys.argv", ["fastpmae-embed", str(run), str(small_beton), str(out), "--pool", "mean"])
    assert embed_module.main() == 0
    saved = np.load(out, allow_pickle=False)
    features, labels = embed_images(checkpoint_path(run, 5), small_beton, pool="mean")
    assert np.array_equal(saved["features"], features)
    assert np.array_equal(saved["labels"], labels)


def test_export_command_prints_lines_that_load(run: Path, tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "encoder.safetensors"
    monkeypatch.setattr("sys.argv", ["fastpmae-export", str(run), str(out)])
    assert export_module.main() == 0
    said: dict = {}
    exec(capsys.readouterr().out, said)
    assert said["model"].embed_dim == 32


@pytest.mark.parametrize(
    ("program", "words", "sentence"),
    [
        ("export", ["/nowhere", "/tmp/x.safetensors"], "there is no checkpoint /nowhere"),
        ("embed", ["/nowhere", "/nowhere.beton", "/tmp/x.npz"], "there is no checkpoint /nowhere"),
    ],
)
def test_commands_say_what_is_missing(program: str, words: list[str], sentence: str, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"fastpmae-{program}", *words])
    assert {"export": export_module, "embed": embed_module}[program].main() == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_without_a_teacher_says_so(tiny: Config):
    run = pretrain(tiny.using(teachers="reconstruction", lambda_c=0.0, lambda_p=0.0, steps=1))
    with pytest.raises(UserError, match="holds no labelling_teacher: its run used --teachers reconstruction"):
        load_encoder(run, "labelling_teacher")


@pytest.mark.slow
def test_init_starts_student_and_teachers_from_our_own_run(run: Path, tiny: Config, tmp_path: Path):
    began = pretrain(tiny.using(init=run, steps=1, blr=0.0, out=tmp_path / "next"))
    before, after = read_checkpoint(checkpoint_path(run, 5)), read_checkpoint(checkpoint_path(began, 1))
    for role in ("student", "labelling_teacher", "reconstruction_teacher"):
        for name, tensor in before.part("student.encoder").items():
            assert torch.allclose(after.part(f"{role}.encoder")[name], tensor, atol=1e-6), (role, name)
    assert not torch.equal(
        after.part("student")["decoder.embed.weight"], before.part("student")["decoder.embed.weight"]
    )


def test_init_takes_mae_and_timm_files(tiny: Config, tmp_path: Path):
    """MAE's checkpoint is a pickled dict under "model", with a decoder beside the encoder; timm's is safetensors."""
    source: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10
    )
    state = source.state_dict()
    torch.save(
        {"model": {**state, "decoder_embed.weight": torch.zeros(3, 3), "mask_token": torch.zeros(1, 1, 3)}},
        tmp_path / "mae.pth",
    )
    save_file(state, tmp_path / "timm.safetensors")
    for name in ("mae.pth", "timm.safetensors"):
        encoder = make_encoder(tiny)
        start_encoder(encoder, tmp_path / name)
        for key, tensor in encoder.state_dict().items():
            assert torch.equal(tensor, state[key]), (name, key)


def test_init_interpolates_the_positions_of_another_grid(tiny: Config, tmp_path: Path):
    larger = make_encoder(tiny.using(image_size=64))
    save_file({k: v.contiguous() for k, v in larger.state_dict().items()}, tmp_path / "larger.safetensors")
    encoder = make_encoder(tiny)
    start_encoder(encoder, tmp_path / "larger.safetensors")
    assert encoder.pos_embed.shape == (1, 17, 32)
    assert torch.equal(encoder.cls_token, larger.cls_token)


def test_init_takes_positions_without_the_class_token(tiny: Config, tmp_path: Path):
    """As DeiT III has them: only the patches' tokens get a position."""
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 0,
    }
    source: Any = timm.create_model("vit_tiny_patch16_224", no_embed_class=True, **sizes).eval()
    torch.nn.init.normal_(source.pos_embed)
    save_file(source.state_dict(), tmp_path / "deit.safetensors")
    encoder = make_encoder(tiny).eval()
    start_encoder(encoder, tmp_path / "deit.safetensors")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        theirs = source.forward_features((images / 255 - mean[:, None, None]) / std[:, None, None])
    assert torch.allclose(embed_module.whole_tokens(encoder, images), theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"init_values": 0.1}, r"no place in one for blocks\.0\.ls1\.gamma and 3 more"),
        ({"qk_norm": True}, r"no place in one for blocks\.0\.attn\.k_norm\.bias and 7 more"),
        ({"reg_tokens": 4, "no_embed_class": True}, "no place in one for reg_token$"),
    ],
)
def test_init_refuses_what_the_encoder_has_no_place_for(tiny: Config, tmp_path: Path, parts: dict, sentence: str):
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 0,
    }
    save_file(timm.create_model("vit_tiny_patch16_224", **sizes, **parts).state_dict(), tmp_path / "more.safetensors")
    with pytest.raises(UserError, match=sentence):
        start_encoder(make_encoder(tiny), tmp_path / "more.safetensors")


class Bomb:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_init_never_runs_what_a_file_brings_along(tiny: Config, tmp_path: Path):
    torch.save({"model": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match=r"neither safetensors nor a \.pth of plain tensors"):
        start_encoder(make_encoder(tiny), tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path.write_bytes(b"nonsense"), "neither safetensors nor"),
        (lambda path: path.write_bytes(b""), "neither safetensors nor"),
        (
            lambda path: save_file({"cls_token": torch.zeros(1, 1, 32)}, path),
            "none of its 1 tensors is called patch_embed",
        ),
        (lambda path: torch.save([1, 2], path), "holds no tensors by name"),
        (lambda path: None, "there is no such file"),
    ],
)
def test_init_refuses_other_files_with_a_sentence(tiny: Config, tmp_path: Path, make, sentence: str):
    make(tmp_path / "file")
    with pytest.raises(UserError, match=sentence):
        start_encoder(make_encoder(tiny), tmp_path / "file")


def test_init_refuses_weights_of_another_size(tiny: Config, tmp_path: Path):
    wide = make_encoder(tiny.using(width=64))
    save_file({k: v.contiguous() for k, v in wide.state_dict().items()}, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"is of another size: cls_token is \(1, 1, 64\), this model's \(1, 1, 32\)"):
        start_encoder(make_encoder(tiny), tmp_path / "wide.safetensors")


def test_init_refuses_numbers_that_are_not_real_in_our_own_files_too(run: Path, tiny: Config):
    found = read_checkpoint(checkpoint_path(run, 5))
    forged = dict(found.tensors) | {
        "student.encoder.norm.bias": found.tensors["student.encoder.norm.bias"].to(torch.complex64)
    }
    write_checkpoint(found.path, forged, found.progress, keep=1)
    with pytest.raises(UserError, match=r"student\.encoder\.norm\.bias holds complex64, and weights are real numbers"):
        start_encoder(make_encoder(tiny), found.path)
