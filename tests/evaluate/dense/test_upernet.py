"""UPerNet on a plain ViT: Table 4's own size, taps, scales, relative positions that change nothing, the loss."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastpmae import UserError
from fastpmae.evaluate.dense.pyramid import (
    Pyramid,
    TappedViT,
    padded,
    parameter_groups,
    size_multiple,
    tapped_blocks,
    with_relative_positions,
)
from fastpmae.plan.flops import flop_formulas

pytest.importorskip("segmentation_models_pytorch", reason="pip install 'fastpmae[dense]'")

from fastpmae.evaluate.dense.upernet import Segmenter, pixel_loss


def small_vit(depth: int = 4, patch: int = 8, side: int = 32, **more: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=side, patch_size=patch, embed_dim=16, depth=depth, num_heads=2, num_classes=0, **more
    )


@pytest.mark.parametrize(("relative", "millions"), [(True, 163.9), (False, 163.3)])
@pytest.mark.slow
def test_the_network_has_the_size_that_table_4_prints(relative: bool, millions: float):
    """164 M parameters and 606 GMAC at 512 x 512 with 150 classes; the auxiliary head is counted."""
    flop_formulas()
    with torch.device("meta"):
        vit = VisionTransformer(img_size=512, patch_size=16, num_classes=0)
        network = with_relative_positions(vit, 0.1) if relative else vit
        segmenter = Segmenter(TappedViT(network, tapped_blocks(12)), 150)
        with FlopCounterMode(display=False) as counter:
            logits, auxiliary = segmenter(torch.empty(2, 3, 512, 512))
    assert round(sum(parameter.numel() for parameter in segmenter.parameters()) / 1e6, 1) == millions
    assert round(counter.get_total_flops() / 2 / 2 / 1e9, 1) == 606.8
    assert logits.shape == (2, 150, 128, 128)
    assert auxiliary is not None
    assert auxiliary.shape == (2, 150, 32, 32)


def test_taps_are_beits():
    assert tapped_blocks(12) == (3, 5, 7, 11)
    assert tapped_blocks(24) == (7, 11, 15, 23)
    assert tapped_blocks(4) == (0, 1, 2, 3)
    with pytest.raises(UserError, match="after four of its blocks, and this one has 3"):
        tapped_blocks(3)


def test_maps_are_the_tokens_after_the_blocks_without_the_last_norm():
    vit = small_vit().eval()
    seen = []
    for block in vit.blocks:
        block.register_forward_hook(lambda _, __, tokens: seen.append(tokens))
    images = torch.randn(2, 3, 32, 32)
    vit.forward_features(images)
    truth, seen[:] = list(seen), []
    maps = TappedViT(vit, (0, 1, 2, 3))(images)
    for tokens, each in zip(truth, maps, strict=True):
        # at the size that the network was built for no position is interpolated
        assert torch.equal(each, tokens[:, 1:].transpose(1, 2).reshape(2, 16, 4, 4))


def test_images_of_another_size_get_interpolated_positions():
    vit = small_vit()
    body = TappedViT(vit, (0, 1, 2, 3))
    assert body.fixed_side is None
    assert [tuple(each.shape) for each in body(torch.randn(1, 3, 24, 56))] == [(1, 16, 3, 7)] * 4


@pytest.mark.parametrize(
    ("patch", "scales", "multiple"), [(16, (4, 2, 1, 0.5), 32), (14, (4, 2, 1, 0.5), 28), (8, (2, 1, 0.5, 0.25), 32)]
)
def test_strides_are_about_4_to_32_pixels(patch: int, scales: tuple[float, ...], multiple: int):
    pyramid = Pyramid(8, patch)
    assert pyramid.scales == scales
    assert size_multiple(patch) == multiple
    maps = pyramid([torch.randn(1, 8, 4, 8)] * 4)
    assert [tuple(each.shape[2:]) for each in maps] == [(4 * scale, 8 * scale) for scale in scales]


def test_four_times_as_fine_is_deconv_norm_gelu_deconv():
    kinds = [[type(part) for part in each] for each in Pyramid(8, 16).resize if isinstance(each, nn.Sequential)]
    deconv = nn.ConvTranspose2d
    assert kinds == [[deconv, nn.BatchNorm2d, nn.GELU, deconv], [deconv]]


@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_relative_positions_start_as_the_same_network(layer_scale: float | None):
    vit = small_vit(init_values=layer_scale).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_(std=0.2)
    images = torch.randn(2, 3, 32, 32)
    ours = TappedViT(with_relative_positions(vit, 0.0).eval(), (0, 1, 2, 3))
    assert ours.fixed_side == 32
    for one, other in zip(ours(images), TappedViT(vit, (0, 1, 2, 3))(images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for name, parameter in ours.vit.named_parameters():
        if "relative_position" in name:
            assert not parameter.any()
        if "gamma" in name and layer_scale is None:
            assert bool((parameter == 1).all())


def test_what_has_no_place_beside_relative_positions_is_refused():
    with pytest.raises(UserError, match="--relative-positions: there is no place for"):
        with_relative_positions(small_vit(qk_norm=True), 0.0)


@pytest.mark.parametrize("preset_decay", [0.65, 0.9])
def test_rates_fall_from_block_to_block_as_mmsegmentations(preset_decay: float):
    """Its `get_num_layer_for_vit`: embedding 0, block i is i + 1, everything else depth + 1."""
    model = Segmenter(TappedViT(small_vit(), (0, 1, 2, 3)), 5)
    parts = [model.pyramid, model.decoder, model.classify, model.auxiliary]
    groups = parameter_groups(model.backbone, parts, lr=1e-3, weight_decay=0.05, layer_decay=preset_decay)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if name.startswith("backbone.vit.norm"):
            assert id(parameter) not in found
            continue
        layer = 5
        if name.startswith("backbone.vit."):
            layer = int(name.split(".")[3]) + 1 if ".blocks." in name else 0
        group = found[id(parameter)]
        assert group["lr"] == pytest.approx(1e-3 * preset_decay ** (5 - layer)), name
        assert group["lr"] == pytest.approx(1e-3 * group["lr_scale"])
        plain = parameter.ndim == 1 or name.endswith(("cls_token", "pos_embed"))
        assert group["weight_decay"] == (0 if plain else 0.05), name
    assert sum(len(group["params"]) for group in groups) == len(found)


def test_the_loss_is_the_mean_over_all_pixels_and_void_costs_nothing():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    masks = torch.randint(-1, 3, (2, 16, 16), dtype=torch.int16)
    large = F.interpolate(logits, (16, 16), mode="bilinear", align_corners=False)
    each = F.cross_entropy(large, masks.long().clamp(min=0), reduction="none")
    truth = torch.where(masks >= 0, each, 0.0).mean()
    torch.testing.assert_close(pixel_loss(logits, masks, -1), truth)
    nothing = pixel_loss(logits, torch.full_like(masks, -1), -1)
    assert nothing.item() == 0
    nothing.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_padding():
    images = torch.ones(1, 3, 180, 240)
    assert padded(images, 16).shape[2:] == (192, 240)
    assert padded(images, 16, 208).shape[2:] == (208, 240)
    assert padded(images, 12) is images
    assert padded(images, 16)[:, :, 180:].any().item() is False
