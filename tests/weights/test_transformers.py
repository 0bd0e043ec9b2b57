"""ViTs under the names of transformers and torchvision give the features that those libraries compute."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastpmae import UserError
from fastpmae.evaluate.backbone import features, find_backbone
from fastpmae.weights.foreign import read_foreign
from fastpmae.weights.transformers import joined, timm_name

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def test_torchvisions_vit(tmp_path: Path):
    from torchvision.models import VisionTransformer

    theirs = VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5).eval()
    torch.nn.init.normal_(theirs.class_token)
    saved = {"model": theirs.state_dict(), "epoch": 299, "args": None}
    torch.save(saved, tmp_path / "model_299.pth")
    assert read_foreign(tmp_path / "model_299.pth").layout == "torchvision"
    model = find_backbone(str(tmp_path / "model_299.pth"), heads=2).build().eval()
    theirs.heads = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        assert torch.allclose(features(model, IMAGES)[0], theirs(IMAGES), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("classes", [False, True])
def test_transformers_vit_in_a_folder(name: str, classes: bool, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    network = (transformers.ViTForImageClassification if classes else transformers.ViTModel)(config).eval()
    network.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / name) if name.endswith("tensors") else torch.save(tensors, tmp_path / name)
    model = find_backbone(str(tmp_path), heads=2).build().eval()
    vit = network.vit if classes else network
    with torch.no_grad():
        theirs = vit(IMAGES).last_hidden_state[:, 0]
        assert torch.allclose(features(model, IMAGES)[0], theirs, atol=1e-5)


def test_names_that_nobody_knows_stay_and_parts_alone_are_not_joined():
    assert timm_name("encoder.layer.3.gate", "transformers") == "encoder.layer.3.gate"
    assert timm_name("pooler.dense.weight", "transformers") is None
    part = torch.zeros(2)
    assert joined({"blocks.0.attn.query.bias": part}).keys() == {"blocks.0.attn.query.bias"}
    odd = {f"blocks.0.attn.{name}.bias": torch.zeros(size) for name, size in (("query", 2), ("key", 3), ("value", 2))}
    assert joined(odd).keys() == odd.keys()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("backbone.rope_embed.periods", "DINOv3's ViT"),
        ("layer4.0.conv1.weight", "a ResNet"),
        ("vision_model.embeddings.patch_embedding.weight", "transformers' CLIP or SigLIP"),
    ],
)
def test_networks_that_are_no_plain_vit_are_called_by_their_names(name: str, words: str, tmp_path: Path):
    save_file({name: torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=f"holds no plain ViT, but {words}"):
        read_foreign(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("name", "words"),
    [("rope_embed.periods", "DINOv3's ViT"), ("layers.0.blocks.0.norm1.weight", "a Swin transformer")],
)
@pytest.mark.parametrize("prefix", ["", "teacher.backbone."])
def test_a_patch_embedding_makes_no_plain_vit(prefix: str, name: str, words: str, tmp_path: Path):
    """DINOv3 and Swin have one under the name that a plain ViT's has."""
    tensors = {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4), "norm.weight": torch.zeros(8), name: torch.zeros(8)}
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=f"holds no plain ViT, but {words}"):
        read_foreign(tmp_path / "other.safetensors")
