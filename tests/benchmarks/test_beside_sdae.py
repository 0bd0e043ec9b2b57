"""What `beside_sdae` can be told without a checkout of SdAE."""

from pathlib import Path

import pytest
import torch

from benchmarks.beside_sdae import batch_of, our_name, their_modules
from fastpmae import PRESETS, UserError
from fastpmae.model.build import view_settings


def test_another_folder_is_a_sentence(tmp_path: Path):
    with pytest.raises(UserError, match=r"is no checkout of AbrahamYabo/SdAE: it has no engine_pretrain\.py"):
        their_modules(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("cls_token", "encoder.cls_token"),
        ("blocks.3.attn.qkv.weight", "encoder.blocks.3.attn.qkv.weight"),
        ("mask_token", "decoder.mask_token"),
        ("decoder_blocks.0.mlp.fc1.bias", "decoder.blocks.0.mlp.fc1.bias"),
        ("decoder_pred.weight", "decoder.output.weight"),
    ],
)
def test_their_tensors_by_our_names(theirs: str, ours: str):
    assert our_name(theirs) == ours


def test_a_batch_is_one_of_the_preset():
    order = torch.stack([torch.randperm(196) for _ in range(2)])
    batch = batch_of(torch.zeros(2, 3, 224, 224, dtype=torch.uint8), order)
    settings = view_settings(PRESETS["sdae-code"])
    assert (len(batch.fold_sizes), batch.visible.shape[1]) == (settings.folds, round(196 * (1 - settings.mask_ratio)))
    assert torch.equal(torch.cat([batch.visible, batch.folds], dim=1), order)
