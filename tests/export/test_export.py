"""Exports opened as others open them: timm from a file and a folder, transformers by its own names."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from torch import Tensor

from fastpmae import Config, UserError, export_encoder, load_encoder, pretrain
from fastpmae.evaluate.backbone import Backbone, features, find_backbone
from fastpmae.evaluate.datasets import open_labelled
from fastpmae.evaluate.features import whole_tokens
from fastpmae.evaluate.finetune import train_classifier
from fastpmae.evaluate.finetune_state import Setting
from fastpmae.evaluate.recipe import FINETUNE_PRESETS, PROBE
from fastpmae.export import export as export_module
from fastpmae.run.checkpoint import find_checkpoint

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture
def run(tiny: Config) -> Path:
    return pretrain(tiny.using(steps=3, warmup_epochs=0.0, blr=0.05))


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
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    small: Any = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, img_size=64).eval()
    export_encoder(run, tmp_path / "large.safetensors", image_size=64)
    large: Any = find_backbone(str(tmp_path / "large.safetensors")).build().eval()
    with torch.no_grad():
        ours: Any = find_backbone(str(run), image_size=image_size).build().eval()
        images = normal(bytes_of(image_size or 32))
        assert torch.allclose(model.forward_features(images), ours.forward_features(images), atol=1e-5)
        if not image_size:  # timm's own interpolation, of what it was given, is ours
            images = normal(bytes_of(64))
            assert torch.allclose(small.forward_features(images), large.forward_features(images), atol=1e-5)
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
    here, before = (f"demo, {run}/checkpoints/step-{step:08d}.safetensors" for step in (3, 2))
    result = {"evaluation": "knn", "network": "student", "top1": 42.125, "top5": 80.5, "images": 1234, "source": here}
    result |= {"val": {"path": "/a/birds/val.beton"}, "shown": {"pool": "class", "k": 7}}
    few = {"evaluation": "lowshot", "top1": 31.0, "table": [{"share": 0.01}], "pool": "mean"}
    results = {
        "knn-student": result,
        "knn-random": result | {"network": "random", "top1": 13.0},
        "step-00000002/knn-student": result | {"source": before, "top1": 14.0},
        "step-00000003/lowshot-student": result | few,
        "finetune-student/finetune-student": result | {"evaluation": "finetune", "top1": 71.0},
        "finetune-student/config": {"settings": 1},
        "patches-student": {name: value for name, value in result.items() if not name.startswith("top")}
        | {"evaluation": "patches", "miou": 36.5, "pixel_accuracy": 81.25, "shown": {"k": 30}},
    }
    for name, record in results.items():
        (run / "eval" / name).parent.mkdir(parents=True, exist_ok=True)
        (run / "eval" / f"{name}.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    export_encoder(run, "card")
    card = Path("card/README.md").read_text()
    assert "| knn | birds/val.beton | k = 7, class token | 42.12 % | 80.50 % | 1,234 |" in card
    # those of a named checkpoint and of a fine-tuning lie in folders of their own
    assert "| lowshot | birds/val.beton | 1 % of the labels, k = 7, class token | 31.00 % |" in card
    assert "| finetune | " in card
    assert "| patches | birds/val.beton | mIoU 36.50 %, pixel accuracy 81.25 % | 1,234 |" in card
    assert "13.00" not in card, "another network's"
    assert "14.00" not in card, "another checkpoint's"
    assert json.loads(card.split("```json\n")[1].split("```")[0])["width"] == 32
    said: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], said)
    assert said["model"].embed_dim == 32


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["class", "mean"])
def test_a_fine_tuned_classifier_goes_along(run: Path, small_beton: Path, tmp_path: Path, pool):
    train, _ = open_labelled(small_beton, None)
    setting = Setting(
        find_backbone(str(run)), train, train, tmp_path / "tuned", torch.device("cpu"), workers=1, feature_batch=44
    )
    config = dataclasses.replace(
        FINETUNE_PRESETS["small"], epochs=1, batch_size=22, warmup_epochs=0.0, blr=0.05, pool=pool
    )
    train_classifier(setting, config)
    record = {"evaluation": "finetune", "network": "student", "top1": 51.5, "top5": 100.0, "images": 44}
    (tmp_path / "tuned" / "finetune-student.json").write_text(json.dumps(record))
    (tmp_path / "tuned" / "knn-student.json").write_text(json.dumps(record | {"evaluation": "knn", "top1": 12.5}))
    export_encoder(tmp_path / "tuned", tmp_path / "timm")
    card = (tmp_path / "timm" / "README.md").read_text()
    assert "From demo, step-00000003.safetensors, by `fastpmae-eval finetune`" in card
    assert json.loads(card.split("```json\n")[1].split("```")[0])["color_jitter"] == 0.3
    assert "51.50 %" in card
    assert "12.50 %" not in card, "the encoder's before it was tuned"
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
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


def tuned_from(backbone: Backbone, beton: Path, folder: Path, crop_ratio: float = 0.875) -> Path:
    """A classifier that hardly learns, from any weights."""
    train, _ = open_labelled(beton, None)
    setting = Setting(
        backbone, train, train, folder, torch.device("cpu"), workers=1, crop_ratio=crop_ratio, feature_batch=44
    )
    train_classifier(
        setting, dataclasses.replace(FINETUNE_PRESETS["small"], epochs=1, batch_size=22, warmup_epochs=0.0)
    )
    return folder


@pytest.mark.slow
def test_a_classifier_of_other_weights_keeps_its_parts_and_normalisation(small_beton: Path, tmp_path: Path):
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 0,
    }
    # An entrypoint with a LayerScale, positions without the class token's, registers, and a spread of 0.5.
    theirs: Any = timm.create_model("vit_small_patch14_reg4_dinov2", **sizes)
    cfg = theirs.pretrained_cfg | {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "architecture": None}
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "vit_small_patch14_reg4_dinov2", "model_args": sizes, "pretrained_cfg": cfg})
    )
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    tuned = tuned_from(find_backbone(f"timm:local-dir:{tmp_path}"), small_beton, tmp_path / "tuned")
    export_encoder(tuned, tmp_path / "timm", image_size=48)
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == config["pretrained_cfg"]["std"] == [0.5, 0.5, 0.5]
    assert "normalised with mean [0.5, 0.5, 0.5]" in (tmp_path / "timm" / "README.md").read_text()
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    # the same classifier by the two ways that it can be opened
    backbone = find_backbone(str(tuned), image_size=48)
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)
    images = backbone.normalised(bytes_of(48))
    with torch.no_grad():
        tokens = model.forward_features(images)
        assert torch.allclose(features(backbone.build().eval(), images)[0], tokens[:, 0], atol=1e-5)
    with pytest.raises(
        UserError, match=r"ViTModel has no place for blocks\.0\.ls1\.gamma and 4 more: use --format timm"
    ):
        export_encoder(tuned, tmp_path / "hf", format="huggingface")
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
def test_what_others_are_told_of_the_images_is_the_classifiers_own(run: Path, small_beton: Path, tmp_path: Path):
    backbone = dataclasses.replace(find_backbone(str(run)), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    tuned = tuned_from(backbone, small_beton, tmp_path / "tuned", crop_ratio=0.9)
    with pytest.raises(UserError, match="holds a fine-tuned network"):
        load_encoder(tuned)
    with pytest.raises(UserError, match=r"--network labelling_teacher: .* holds a classifier and no run's networks"):
        export_encoder(tuned, tmp_path / "hf", "labelling_teacher")
    export_encoder(tuned, tmp_path / "hf", format="huggingface")
    said = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert (said["image_mean"], said["image_std"]) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.2])
    assert (said["size"], said["crop_size"]["height"]) == ({"shortest_edge": 35}, 32)  # 35.6, rounded down
    export_encoder(tuned, tmp_path / "timm")
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    transform: Any = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    resize, crop, *_ = transform.transforms
    assert (resize.size, tuple(crop.size)) == (35, (32, 32))
    export_encoder(run, tmp_path / "plain", format="huggingface")
    said = json.loads((tmp_path / "plain" / "preprocessor_config.json").read_text())
    assert said["size"] == {"shortest_edge": 36}  # of 36.6


@pytest.mark.slow
def test_trainings_that_hold_no_classifier_are_told_by_a_sentence(run: Path, small_beton: Path, tmp_path: Path):
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 0,
    }
    theirs = Beit(**sizes, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
    torch.save({"model": theirs.state_dict()}, tmp_path / "beit.pth")
    with pytest.raises(UserError, match=r"tuned from BEiT, beit\.pth, which is no plain ViT"):
        export_encoder(
            tuned_from(find_backbone(str(tmp_path / "beit.pth")), small_beton, tmp_path / "a"), tmp_path / "x"
        )
    train, _ = open_labelled(small_beton, None)
    setting = Setting(find_backbone(str(run)), train, train, tmp_path / "tuned", torch.device("cpu"), workers=1)
    config = dataclasses.replace(PROBE, batch_size=22, epochs=1, warmup_epochs=0.0)
    train_classifier(dataclasses.replace(setting, frozen=True), config)
    with pytest.raises(UserError, match=r"is a linear probe: the network that it reads is demo, .*step-00000003"):
        find_backbone(str(tmp_path / "tuned"))
    (tmp_path / "tuned" / "classifier.safetensors").unlink()
    with pytest.raises(UserError, match=r"training that has left no classifier\.safetensors yet"):
        find_backbone(str(tmp_path / "tuned"))
    with pytest.raises(UserError, match="is the state of a classifier's training: name its folder"):
        export_encoder(next((tmp_path / "tuned" / "checkpoints").glob("*.safetensors")), tmp_path / "x")


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
@pytest.mark.parametrize("network", ["student", "labelling_teacher"])
def test_transformers_itself_opens_the_folder(run: Path, tmp_path: Path, network):
    transformers = pytest.importorskip("transformers")
    export_encoder(run, tmp_path / "hf", network, format="huggingface")
    model = transformers.ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    larger = bytes_of(48)
    with torch.no_grad():
        ours = whole_tokens(load_encoder(run, network)[0], bytes_of(32))
        assert (model(normal(bytes_of(32))).last_hidden_state - ours).abs().max() < 1e-5
        # Its own interpolation at run time has another bicubic kernel than timm's: positions are exported as they fit.
        export_encoder(run, tmp_path / "larger", network, format="huggingface", image_size=48)
        model = transformers.ViTModel.from_pretrained(tmp_path / "larger", add_pooling_layer=False).eval()
        ours = find_backbone(str(run), network, image_size=48).build().eval().forward_features(normal(larger))  # pyright: ignore
        assert (model(normal(larger)).last_hidden_state - ours).abs().max() < 1e-5
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert processor(bytes_of(50)[0], return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.slow
def test_transformers_itself_opens_a_classifier(run: Path, small_beton: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    tuned = tuned_from(find_backbone(str(run)), small_beton, tmp_path / "tuned")
    export_encoder(tuned, tmp_path / "hf", format="huggingface")
    export_encoder(tuned, tmp_path / "timm")
    model, report = transformers.ViTForImageClassification.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    images = normal(bytes_of(32))
    with torch.no_grad():
        ours = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()(images)
        assert torch.allclose(model.eval()(images).logits, ours, atol=1e-5)
    assert model.config.id2label == {0: "class_0", 1: "class_1", 2: "class_2"}
