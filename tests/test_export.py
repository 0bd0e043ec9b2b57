"""Exports opened as others open them: timm from a file and a folder, transformers by its own names."""

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from fastpmae import Config, UserError, export_encoder, load_encoder, pretrain
from fastpmae import export as export_module
from fastpmae.backbone import find_backbone
from fastpmae.checkpoint import find_checkpoint
from fastpmae.classifier_state import Setting
from fastpmae.course import COURSES
from fastpmae.embed import whole_tokens
from fastpmae.finetune import train_classifier
from fastpmae.labelled import open_labelled

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture
def run(tiny: Config) -> Path:
    return pretrain(tiny.using(steps=3, warmup_epochs=0.0, lr=0.05))


def bytes_of(side: int) -> Tensor:
    return torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(side))


def normal(images: Tensor) -> Tensor:
    return (images / 255 - MEAN[:, None, None]) / STD[:, None, None]


def vit_model(folder: Path, images: Tensor, prefix: str = "") -> Tensor:
    """transformers' ViTModel, written down from its documentation: what the folder's tensors and sizes say."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    heads, width = config["num_attention_heads"], config["hidden_size"]
    assert config["model_type"] == "vit"

    def linear(rows: Tensor, name: str) -> Tensor:
        return rows @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(rows: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            rows, (width,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], config["layer_norm_eps"]
        )

    patch = "embeddings.patch_embeddings.projection"
    rows = F.conv2d(images, tensors[f"{patch}.weight"], tensors[f"{patch}.bias"], stride=config["patch_size"])
    rows = torch.cat([tensors["embeddings.cls_token"].expand(len(images), -1, -1), rows.flatten(2).mT], dim=1)
    rows = rows + tensors["embeddings.position_embeddings"]
    for number in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        before = norm(rows, f"{layer}.layernorm_before")
        query, key, value = (
            linear(before, f"{layer}.attention.attention.{name}").unflatten(2, (heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        weights = (query @ key.mT / (width // heads) ** 0.5).softmax(dim=-1)
        rows = rows + linear((weights @ value).transpose(1, 2).flatten(2), f"{layer}.attention.output.dense")
        inner = F.gelu(linear(norm(rows, f"{layer}.layernorm_after"), f"{layer}.intermediate.dense"))
        assert inner.shape[-1] == config["intermediate_size"]
        rows = rows + linear(inner, f"{layer}.output.dense")
    return norm(rows, "layernorm")


@pytest.mark.parametrize("image_size", [0, 48, 16])
@pytest.mark.parametrize("network", ["student", "labelling_teacher", "reconstruction_teacher"])
def test_a_folder_for_transformers_gives_our_features(run: Path, tmp_path: Path, network, image_size: int):
    export_encoder(run, tmp_path / "hf", network, format="huggingface", image_size=image_size)
    images = bytes_of(image_size or 32)
    theirs = vit_model(tmp_path / "hf", normal(images))
    model = find_backbone(str(run), network, image_size=image_size).build().eval()
    with torch.no_grad():
        assert (model.forward_features(normal(images)) - theirs).abs().max() < 1e-5  # pyright: ignore
        if not image_size:
            assert (whole_tokens(load_encoder(run, network)[0], images) - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("image_size", [0, 48])
def test_a_folder_for_timm_opens_by_its_name(run: Path, tmp_path: Path, image_size: int):
    export_encoder(run, tmp_path / "folder", image_size=image_size)
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    small = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, img_size=64).eval()
    export_encoder(run, tmp_path / "large.safetensors", image_size=64)
    large = find_backbone(str(tmp_path / "large.safetensors")).build().eval()
    with torch.no_grad():
        ours = find_backbone(str(run), image_size=image_size).build().eval()
        images = normal(bytes_of(image_size or 32))
        assert torch.allclose(model.forward_features(images), ours.forward_features(images), atol=1e-5)  # pyright: ignore
        if not image_size:  # timm's own interpolation, of what it was given, is ours
            images = normal(bytes_of(64))
            assert torch.allclose(small.forward_features(images), large.forward_features(images), atol=1e-5)  # pyright: ignore
    assert model.pretrained_cfg["mean"] == pytest.approx(MEAN.tolist())


def test_plain_tensors_with_the_head_and_prototypes(run: Path, tmp_path: Path):
    export_encoder(run, tmp_path / "plain", "labelling_teacher", format="plain", with_head=True)
    tensors, checkpoint = load_file(tmp_path / "plain" / "model.safetensors"), find_checkpoint(run)
    for part in ("encoder", "head"):
        kept = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}
        theirs = checkpoint.part(f"labelling_teacher.{part}")
        assert {name.removeprefix(f"{part}.") for name in kept} == set(theirs)
        assert all(torch.equal(tensor, theirs[name.removeprefix(f"{part}.")]) for name, tensor in kept.items())
    assert "head.patch_prototypes" in tensors


def test_the_card_tells_settings_figures_and_lines_that_run(run: Path, tmp_path: Path, monkeypatch):
    (run / "eval").mkdir()
    result = {"evaluation": "knn", "network": "student", "top1": 42.125, "top5": 80.5, "images": 1234}
    (run / "eval" / "knn-student.json").write_text(json.dumps(result))
    (run / "eval" / "knn-random.json").write_text(json.dumps(result | {"network": "random", "top1": 13.0}))
    monkeypatch.chdir(tmp_path)
    export_encoder(run, "card")
    card = Path("card/README.md").read_text()
    assert "| knn | 42.12 % | 80.50 % | 1,234 |" in card
    assert "13.00" not in card
    assert json.loads(card.split("```json\n")[1].split("```")[0])["width"] == 32
    said: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], said)
    assert said["model"].embed_dim == 32


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_a_fine_tuned_classifier_goes_along(run: Path, small_beton: Path, tmp_path: Path, pool):
    train, _ = open_labelled(small_beton, None)
    setting = Setting(
        find_backbone(str(run)), train, train, tmp_path / "tuned", torch.device("cpu"), workers=1, feature_batch=44
    )
    course = dataclasses.replace(COURSES["small"], epochs=1, batch_size=22, warmup_epochs=0.0, lr=0.05, pool=pool)
    train_classifier(setting, course)
    export_encoder(tmp_path / "tuned", tmp_path / "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        images = normal(bytes_of(32))
        logits = model(images)
        assert logits.shape == (3, 3)
        assert logits.std() > 0
    if pool == "mean":
        with pytest.raises(UserError, match="the mean of the patches"):
            export_encoder(tmp_path / "tuned", tmp_path / "hf", format="huggingface")
        assert not (tmp_path / "hf").exists()
        return
    export_encoder(tmp_path / "tuned", tmp_path / "hf", format="huggingface")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    rows = vit_model(tmp_path / "hf", images, "vit.")[:, 0]
    assert torch.allclose(rows @ tensors["classifier.weight"].T + tensors["classifier.bias"], logits, atol=1e-5)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["id2label"] == {"0": "class_0", "1": "class_1", "2": "class_2"}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"with_head": True}, "fits only into --format plain"),
        ({"format": "huggingface", "out": "x.safetensors"}, "leave .safetensors out"),
        ({"image_size": 33}, "no multiple of the patches' 8 pixels"),
        ({"network": "random", "format": "plain", "with_head": True}, "its random has no projection head"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(run: Path, tmp_path: Path, more: dict, sentence: str):
    out = tmp_path / more.pop("out", "x")
    with pytest.raises(UserError, match=sentence):
        export_encoder(run, out, **more)
    assert not out.exists()


def test_the_command_prints_lines_for_each_format(run: Path, tmp_path: Path, monkeypatch, capsys):
    for kind, word in (("huggingface", "ViTModel.from_pretrained"), ("timm", "local-dir:"), ("plain", "load_file")):
        monkeypatch.setattr("sys.argv", ["fastpmae-export", str(run), str(tmp_path / kind), "--format", kind])
        assert export_module.main() == 0
        assert word in capsys.readouterr().out


@pytest.mark.slow
def test_transformers_itself_opens_the_folder(run: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    export_encoder(run, tmp_path / "hf", format="huggingface")
    model = transformers.ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    larger = bytes_of(48)
    with torch.no_grad():
        ours = whole_tokens(load_encoder(run)[0], bytes_of(32))
        assert (model(normal(bytes_of(32))).last_hidden_state - ours).abs().max() < 1e-5
        # Its own interpolation at run time has another bicubic kernel than timm's: positions are exported as they fit.
        export_encoder(run, tmp_path / "larger", format="huggingface", image_size=48)
        model = transformers.ViTModel.from_pretrained(tmp_path / "larger", add_pooling_layer=False).eval()
        ours = find_backbone(str(run), image_size=48).build().eval().forward_features(normal(larger))  # pyright: ignore
        assert (model(normal(larger)).last_hidden_state - ours).abs().max() < 1e-5
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert processor(bytes_of(50)[0], return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
