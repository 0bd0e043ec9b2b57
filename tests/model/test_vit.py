"""The networks, held to the float64 reference and to timm."""

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fastpmae.model.head import Head
from fastpmae.model.initialization import initialise
from fastpmae.model.patches import sincos_positions
from fastpmae.model.vit import Decoder, Encoder, Student
from tests import reference
from tests.tiny import disturb, widen

MEAN, SPREAD = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (reference.MEAN, reference.SPREAD))


def made_encoder(image_size: int = 16, patch_size: int = 4) -> Encoder:
    encoder = Encoder(image_size, patch_size, 16, 3, 2)
    disturb(encoder, 1, 0.3)
    widen(encoder)
    return encoder


def made_images(count: int = 2, size: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def made_ids(count: int, patches: int, taken: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(patches, generator=generator)[:taken] for _ in range(count)])


def timm_twin(encoder: Encoder, image_size: int, patch_size: int) -> Any:
    twin = VisionTransformer(
        img_size=image_size, patch_size=patch_size, embed_dim=16, depth=3, num_heads=2, num_classes=0, global_pool=""
    )
    twin.double()
    twin.load_state_dict(encoder.state_dict())
    return twin.eval()


def test_the_encoders_names_and_shapes_are_timms() -> None:
    ours = Encoder(224, 16, 192, 12, 3).state_dict()
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}


def test_positions_are_fixed_and_saved() -> None:
    encoder = Encoder(16, 4, 16, 1, 2)
    assert "pos_embed" in encoder.state_dict()
    assert "pos_embed" not in dict(encoder.named_parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize(("image_size", "patch_size"), [(16, 4), (21, 7)])
def test_all_patches_give_what_timm_gives(
    image_size: int, patch_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    encoder = made_encoder(image_size, patch_size).to(dtype)
    twin = timm_twin(encoder, image_size, patch_size).to(dtype)
    images = made_images(2, image_size)
    every = torch.arange((image_size // patch_size) ** 2).expand(2, -1)
    theirs = twin(((images.double() / 255 - MEAN) / SPREAD).to(dtype))
    torch.testing.assert_close(encoder(images, every), theirs, rtol=tolerance, atol=tolerance)


def test_the_visible_patches_alone_run_through_the_blocks() -> None:
    encoder = made_encoder()
    twin = timm_twin(encoder, 16, 4).double()
    images, ids = made_images(), made_ids(2, 16, 5)
    tokens = twin.patch_embed((images.double() / 255 - MEAN) / SPREAD) + twin.pos_embed[:, 1:]
    seen = torch.stack([tokens[i, ids[i]] for i in range(2)])
    seen = torch.cat([(twin.cls_token + twin.pos_embed[:, :1]).expand(2, -1, -1), seen], 1)
    torch.testing.assert_close(encoder(images, ids), twin.norm(twin.blocks(seen)), rtol=1e-9, atol=1e-9)


def test_the_encoder_equals_the_reference() -> None:
    encoder = made_encoder()
    images, ids = made_images(), made_ids(2, 16, 5)
    keep = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0)).double() * 2
    weights = reference.weights_of(encoder)
    for scales in (None, keep):
        truth = [
            torch.stack(
                reference.encode(weights, images[i], ids[i].tolist(), 4, 2, None if scales is None else keep[i])
            )
            for i in range(2)
        ]
        torch.testing.assert_close(encoder(images, ids, scales), torch.stack(truth), rtol=1e-10, atol=1e-10)


def test_a_dropped_branch_adds_nothing() -> None:
    """All branches dropped: what remains is the embedding under the final norm. All kept: as without."""
    encoder = made_encoder()
    images, ids = made_images(), made_ids(2, 16, 5)
    dropped = encoder(images, ids, torch.zeros(2, 3, 2, dtype=torch.float64))
    torch.testing.assert_close(dropped[:, 1:], encoder.norm(encoder.embed(images, ids)), rtol=1e-12, atol=1e-12)
    kept = encoder(images, ids, torch.ones(2, 3, 2, dtype=torch.float64))
    torch.testing.assert_close(kept, encoder(images, ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "fold_sizes", [(4, 4, 4), (4, 5, 4), (12,), (5, 4, 3), (5, 4, 4), (3, 3, 2, 2), (4, 4, 4, 1), (1, 1)], ids=str
)
def test_folds_are_encoded_on_their_own(fold_sizes: tuple[int, ...]) -> None:
    encoder = made_encoder()
    images, folds = made_images(), made_ids(2, 16, sum(fold_sizes))
    classes, patches = encoder.encode_folds(images, folds, fold_sizes)
    assert classes.shape == (2, len(fold_sizes), 16)
    parts = [encoder(images, ids) for ids in folds.split(list(fold_sizes), dim=1)]
    torch.testing.assert_close(classes, torch.stack([part[:, 0] for part in parts], 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(patches, torch.cat([part[:, 1:] for part in parts], 1), rtol=1e-12, atol=1e-12)


def test_a_fold_does_not_see_the_other_folds() -> None:
    encoder = made_encoder()
    images, folds = made_images(1), torch.arange(12)[None]
    classes, patches = encoder.encode_folds(images, folds, (5, 4, 3))
    images[:, :, 4:8, 4:8] = 255 - images[:, :, 4:8, 4:8]  # patch 5, the first of the second fold
    other_classes, other_patches = encoder.encode_folds(images, folds, (5, 4, 3))
    assert torch.equal(classes[:, [0, 2]], other_classes[:, [0, 2]])
    assert torch.equal(patches[:, [*range(5), 9, 10, 11]], other_patches[:, [*range(5), 9, 10, 11]])
    assert not torch.isclose(patches[:, 5:9], other_patches[:, 5:9]).all(-1).any()


def test_patch_embedding_is_timms_convolution() -> None:
    encoder = made_encoder()
    images, ids = made_images(), made_ids(2, 16, 6)
    twin = timm_twin(encoder, 16, 4).double()
    grid = twin.patch_embed((images.double() / 255 - MEAN) / SPREAD)
    truth = torch.stack([grid[i, ids[i]] for i in range(2)])
    torch.testing.assert_close(encoder.patch_embed(images, ids), truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("rows", "columns", "dim"), [(4, 4, 16), (14, 14, 192), (2, 5, 8), (1, 1, 4)])
def test_positions(rows: int, columns: int, dim: int) -> None:
    truth = np.zeros((rows * columns, dim))
    for patch in range(rows * columns):
        row, column = divmod(patch, columns)
        for i in range(dim // 4):
            frequency = 10000.0 ** (-4 * i / dim)
            truth[patch, i], truth[patch, dim // 4 + i] = math.sin(column * frequency), math.cos(column * frequency)
            truth[patch, dim // 2 + i] = math.sin(row * frequency)
            truth[patch, 3 * dim // 4 + i] = math.cos(row * frequency)
    np.testing.assert_allclose(sincos_positions(rows, columns, dim).numpy(), truth, rtol=0, atol=1e-7)


def test_positions_need_a_width_of_fours() -> None:
    with pytest.raises(ValueError, match="6"):
        sincos_positions(2, 2, 6)


def test_the_class_token_has_no_position() -> None:
    assert not Encoder(16, 4, 16, 1, 2).pos_embed[:, 0].any()
    assert not Decoder(16, 4, 16, 16, 8, 1, 2).pos_embed[:, 0].any()


def made_decoder() -> Decoder:
    decoder = Decoder(16, 4, 16, 16, 8, 2, 2)
    disturb(decoder, 2, 0.3)
    widen(decoder)
    return decoder


def test_the_decoder_equals_the_reference() -> None:
    decoder = made_decoder()
    encoded = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).double()
    order = made_ids(2, 16, 16)
    visible, masked = order[:, :4], order[:, 4:]
    token, tokens = decoder(encoded, visible, masked)
    for i in range(2):
        true_token, true_tokens = reference.decode(
            reference.weights_of(decoder), list(encoded[i]), visible[i].tolist(), masked[i].tolist(), 4, 2
        )
        torch.testing.assert_close(tokens[i], torch.stack(true_tokens), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(token[i], true_token, rtol=1e-10, atol=1e-10)


def test_a_class_prediction_that_nobody_reads_is_not_computed() -> None:
    """The masked patches are predicted as ever, from a class token that the last block only looks at."""
    decoder = made_decoder()
    encoded = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).double()
    order = made_ids(2, 16, 16)
    rows: list[int] = []
    decoder.blocks[-1].register_forward_hook(lambda block, given, result: rows.append(result.shape[1]))
    (_, tokens), (nothing, alone) = (decoder(encoded, order[:, :4], order[:, 4:], labels) for labels in (True, False))
    assert nothing is None
    torch.testing.assert_close(alone, tokens, rtol=1e-12, atol=1e-12)
    assert rows == [13, 12]
    # a student asks for it where it has a head
    encoder, ids = made_encoder(), (order[:, :4], order[:, 4:])
    Student(encoder, decoder, None)(made_images(), *ids)
    Student(encoder, decoder, Head(16, 12, 6, 10).double())(made_images(), *ids)
    assert rows[2:] == [12, 13]


def test_the_decoder_does_not_mind_the_order() -> None:
    decoder = made_decoder()
    encoded = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).double()
    order = made_ids(2, 16, 16)
    visible, masked = order[:, :4], order[:, 4:]
    token, tokens = decoder(encoded, visible, masked)
    shuffle = torch.tensor([2, 0, 3, 1])
    moved = torch.cat([encoded[:, :1], encoded[:, 1:][:, shuffle]], 1)
    other_token, other_tokens = decoder(moved, visible[:, shuffle], masked.flip(1))
    torch.testing.assert_close(other_token, token, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(other_tokens.flip(1), tokens, rtol=1e-10, atol=1e-10)


def test_autocast_keeps_the_decoders_positions_in_fp32() -> None:
    decoder = made_decoder().float()
    seen: list[Tensor] = []
    decoder.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    order = made_ids(2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        decoder(torch.randn(2, 5, 16), order[:, :4], order[:, 4:])
    truth = decoder.mask_token + decoder.pos_embed[0, 1:][order[:, 4:]]
    torch.testing.assert_close(seen[0][:, 5:], truth, rtol=0, atol=0)


def test_the_decoders_names() -> None:
    names = set(dict(Decoder(16, 4, 16, 16, 8, 1, 2).named_parameters()))
    block = [f"blocks.0.{layer}.{kind}" for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
             for kind in ("weight", "bias")]  # fmt: skip
    ends = [f"{layer}.{kind}" for layer in ("embed", "norm", "output") for kind in ("weight", "bias")]
    assert names == {"mask_token", *block, *ends}


def test_the_head_equals_the_reference_and_gives_cosines() -> None:
    head = Head(16, 12, 6, 10)
    initialise(head, torch.Generator().manual_seed(2))
    disturb(head, 3, 0.3)
    head.double()
    assert set(head.state_dict()) == {
        *(f"fc{n}.{kind}" for n in (1, 2, 3) for kind in ("weight", "bias")),
        "class_prototypes",
        "patch_prototypes",
    }
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(7, 16, generator=generator).double() * 3
    class_logits, patch_logits = (logits.matrix for logits in head(tokens[:2], tokens[2:]))
    weights = reference.weights_of(head)
    truth = [
        reference.logits(weights, t, "class_prototypes" if n < 2 else "patch_prototypes") for n, t in enumerate(tokens)
    ]
    torch.testing.assert_close(torch.cat([class_logits, patch_logits]), torch.stack(truth), rtol=1e-10, atol=1e-10)
    assert class_logits.abs().max() <= 1 + 1e-12
    with torch.no_grad():
        head.class_prototypes.mul_(5)
        head.patch_prototypes.mul_(0.1)
    torch.testing.assert_close(head(tokens[:2], tokens[2:])[0].matrix, class_logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(head(tokens[:2], tokens[2:])[1].matrix, patch_logits, rtol=1e-10, atol=1e-10)


def test_layer_norms_epsilon() -> None:
    student = Student(Encoder(16, 4, 16, 1, 2), Decoder(16, 4, 16, 16, 8, 1, 2), None)
    norms = [module for module in student.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 6
    assert {norm.eps for norm in norms} == {1e-6}
