"""Networks that timm makes: the size of their images, and what their tokens are."""

import json
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

from fastpmae import UserError
from fastpmae.evaluate.backbone import features, find_backbone


@pytest.fixture(scope="module")
def of_timm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of timm's, of a network for images of 64 pixels in patches of 16."""
    folder = tmp_path_factory.mktemp("timm")
    save_for_hf(timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0), str(folder))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_args": {"img_size": 64}}))
    return f"timm:local-dir:{folder}"


def test_images_of_timms_networks_are_whole_patches(of_timm: str):
    """timm itself would look at 64 of 72 pixels, or end in its middle."""
    assert find_backbone(of_timm).image_size == 64
    assert find_backbone(of_timm, image_size=48).image_size == 48
    for size, flag in ((72, "--image-size"), (40, "--crop-size")):
        with pytest.raises(UserError, match=f"{flag} {size} is no multiple of the network's patches of 16 pixels"):
            find_backbone(of_timm, image_size=size, size_flag=flag)


def test_a_register_is_no_class_token():
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 0,
    }
    without: dict[str, Any] = {"class_token": False, "global_pool": "avg", "reg_tokens": 4, "no_embed_class": True}
    vit = VisionTransformer(**sizes, **without).eval()
    images = torch.rand(2, 3, 32, 32)
    tokens = vit.forward_features(images)
    assert tokens.shape[1] == 4 + 16
    with pytest.raises(UserError, match="no class token: use --pool mean"):
        features(vit, images, ("class", "mean"))
    (found,) = features(vit, images, ("mean",))
    assert torch.allclose(found, vit.fc_norm(tokens[:, 4:].mean(dim=1)))
    whole = VisionTransformer(**sizes, reg_tokens=4).eval()
    tokens = whole.forward_features(images)
    found = features(whole, images, ("class", "mean"))
    assert torch.allclose(found[0], tokens[:, 0])
    assert torch.allclose(found[1], tokens[:, 5:].mean(dim=1))
