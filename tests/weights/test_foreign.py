"""Checkpoints of other projects, written as they write them: the same network comes out of each, and nothing runs."""

import argparse
import json
import os
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastpmae import UserError
from fastpmae.evaluate.backbone import features, find_backbone
from fastpmae.weights.foreign import read_foreign

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}


def made(seed: int, kind: type[nn.Module] = VisionTransformer, **more: Any) -> Any:
    torch.manual_seed(seed)
    model = kind(**(SIZES | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(9))
EXTRA = {"decoder_embed.weight": torch.zeros(8, 32), "mask_token": torch.zeros(1, 1, 8)}
ONE_NETWORK = ("MAE", "plain ViT")
"""Layouts without a teacher or momentum encoder."""
NAMESPACE = argparse.Namespace(lr=0.1, data_path="/somewhere")


def layouts(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, tuple[object, str]]:
    """What each project saves, and whose weights `auto` should take."""
    dino_head = {"head.mlp.0.weight": torch.zeros(4, 32), "head.last_layer.weight_v": torch.zeros(4, 4)}
    return {
        "MAE": (
            {"model": student | EXTRA | {"decoder_pred.weight": torch.zeros(192, 8)}, "args": NAMESPACE},
            "student",
        ),
        "SdAE": (
            {
                "model": student | EXTRA | {"decoder_pred.weight": torch.zeros(32, 8)},
                "model_teacher": teacher,
                "epoch": 3,
            },
            "student",
        ),
        "DINO": (
            {
                "student": prefixed("module.backbone.", student) | prefixed("module.", dino_head),
                "teacher": prefixed("backbone.", teacher) | dino_head,
                "args": NAMESPACE,
            },
            "teacher",
        ),
        "iBOT": (
            {
                "student": prefixed("module.backbone.", student | {"masked_embed": torch.zeros(1, 32)}),
                "teacher": prefixed("backbone.", teacher | {"masked_embed": torch.zeros(1, 32)}) | dino_head,
            },
            "teacher",
        ),
        "MoCo v3": (
            {
                "arch": "vit_small",
                "state_dict": prefixed("module.base_encoder.", student | {"head.0.weight": torch.zeros(4, 32)})
                | prefixed("module.momentum_encoder.", teacher)
                | {"module.predictor.0.weight": torch.zeros(4, 4)},
            },
            "student",
        ),
        "plain ViT": (student | {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}, "student"),
    }


@pytest.mark.parametrize("layout", layouts({}, {}))
def test_the_same_network_comes_out_of_every_layout(layout: str, tmp_path: Path):
    networks = {"student": made(1), "teacher": made(2)}
    saved, usual = layouts(networks["student"].state_dict(), networks["teacher"].state_dict())[layout]
    torch.save(saved, tmp_path / "theirs.pth")
    assert read_foreign(tmp_path / "theirs.pth").layout == layout
    wanted = {"auto": usual, "student": "student"}
    if layout not in ONE_NETWORK:
        wanted["labelling_teacher"] = "teacher"
    for which, expected in wanted.items():
        backbone = find_backbone(str(tmp_path / "theirs.pth"), which, heads=2)  # pyright: ignore[reportArgumentType]
        assert backbone.image_size == 32
        with torch.no_grad():
            ours = features(backbone.build(), IMAGES, ("class", "mean"))
            theirs = networks[expected].forward_features(IMAGES)
        assert torch.equal(ours[0], theirs[:, 0]), which
        assert torch.allclose(ours[1], theirs[:, 1:].mean(dim=1), atol=1e-6)


def test_safetensors_of_a_plain_vit_and_models_that_pool(tmp_path: Path):
    pooling = made(3, global_pool="avg", fc_norm=True, num_classes=5)
    save_file(pooling.state_dict(), tmp_path / "pooling.safetensors")
    model = find_backbone(str(tmp_path / "pooling.safetensors"), heads=2).build()
    with torch.no_grad():
        (ours,) = features(model, IMAGES, ("mean",))
        assert torch.allclose(ours, pooling.forward_head(pooling.forward_features(IMAGES), pre_logits=True), atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_beit_with_a_table_for_each_block_or_one_for_all(shared: bool, tmp_path: Path):
    kinds = {"use_abs_pos_emb": False, "init_values": 0.1, "use_fc_norm": False}
    kinds |= {"use_shared_rel_pos_bias": True} if shared else {"use_rel_pos_bias": True}
    theirs = made(4, Beit, **kinds)
    torch.save({"model": theirs.state_dict() | {"lm_head.weight": torch.zeros(4, 32)}}, tmp_path / "beit.pth")
    assert read_foreign(tmp_path / "beit.pth").layout == "BEiT"
    backbone = find_backbone(str(tmp_path / "beit.pth"))  # the tables tell the number of heads
    assert backbone.image_size == 32
    assert backbone.mean == (0.5, 0.5, 0.5)
    with torch.no_grad():
        ours = features(backbone.build(), IMAGES)[0]
        assert torch.allclose(ours, theirs.forward_features(IMAGES)[:, 0], atol=1e-6)


def test_beit_with_positions_for_the_patches_alone_is_refused(tmp_path: Path):
    theirs = made(4, Beit, use_abs_pos_emb=True, use_rel_pos_bias=True, init_values=0.1).state_dict()
    theirs["pos_embed"] = theirs["pos_embed"][:, 1:]
    torch.save({"model": theirs}, tmp_path / "beit.pth")
    with pytest.raises(UserError, match=r"makes no ViT: pos_embed is \(1, 16, 32\), which fits no \(1, 17, 32\)"):
        find_backbone(str(tmp_path / "beit.pth")).build()


def test_another_image_size_gets_timms_positions(tmp_path: Path):
    small = made(5)
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    model = find_backbone(str(tmp_path / "small.safetensors"), heads=2, image_size=48).build()
    small.set_input_size((48, 48))
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.allclose(features(model, images)[0], small.forward_features(images)[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    "parts",
    [
        {"init_values": 0.1},
        {"qk_norm": True},
        {"init_values": 0.1, "no_embed_class": True},  # DeiT III
        {"reg_tokens": 3},
        {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},  # DINOv2 with registers
    ],
)
def test_parts_that_the_tensors_tell_are_built(parts: dict, tmp_path: Path):
    theirs = made(6, **parts)
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    for side in (32, 48):
        # the weights of a norm of queries tell how wide a head is
        heads = 0 if "qk_norm" in parts else 2
        backbone = find_backbone(str(tmp_path / "vit.safetensors"), heads=heads, image_size=side if side > 32 else 0)
        assert backbone.image_size == side
        theirs.set_input_size((side, side))
        images = torch.randn(2, 3, side, side)
        with torch.no_grad():
            ours = features(backbone.build().eval(), images, ("class", "mean"))
            tokens = theirs.forward_features(images)
        assert torch.allclose(ours[0], tokens[:, 0], atol=1e-6)
        assert torch.allclose(ours[1], tokens[:, theirs.num_prefix_tokens :].mean(dim=1), atol=1e-6)


def test_a_tensor_without_a_place_is_named(tmp_path: Path):
    for name in ("blocks.1.attn.gate.weight", "register_tokens"):
        torch.save(made(1).state_dict() | {name: torch.zeros(2)}, tmp_path / "more.pth")
        with pytest.raises(UserError, match=f"no place in one for {name}$"):
            find_backbone(str(tmp_path / "more.pth"), heads=2).build()
    torch.save(made(1).state_dict() | {"pos_embed": torch.zeros(1, 19, 32)}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="make no square of patches"):
        find_backbone(str(tmp_path / "odd.pth"), heads=2)


def test_flags_that_choose_nothing_are_refused(tmp_path: Path):
    torch.save(made(1).state_dict(), tmp_path / "one.pth")
    save_file(made(1, qk_norm=True).state_dict(), tmp_path / "told.safetensors")
    with pytest.raises(UserError, match=r"--network labelling_teacher: .* holds one network"):
        find_backbone(str(tmp_path / "one.pth"), "labelling_teacher", heads=2)
    with pytest.raises(UserError, match=r"--heads 4: .* says that it has 2"):
        find_backbone(str(tmp_path / "told.safetensors"), heads=4)
    with pytest.raises(UserError, match="--network student chooses among the networks of a file"):
        find_backbone("timm:vit_tiny_patch16_224", "student")
    with pytest.raises(UserError, match="--heads 3: timm knows"):
        find_backbone("timm:vit_tiny_patch16_224", heads=3)


def test_timm_names_are_taken_from_a_folder_too(tmp_path: Path):
    theirs: Any = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, embed_dim=32, depth=1, num_heads=2
    )
    args = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": args}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": theirs.pretrained_cfg}))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    backbone = find_backbone(f"timm:local-dir:{tmp_path}")
    with torch.no_grad():
        expected = theirs.eval().forward_features(IMAGES)[:, 0]
        assert torch.equal(features(backbone.build().eval(), IMAGES)[0], expected)
    assert backbone.mean == tuple(theirs.pretrained_cfg["mean"])


class Bomb:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_nothing_in_a_file_is_ever_run(tmp_path: Path):
    torch.save({"model": made(1).state_dict(), "args": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match=r"neither safetensors nor a \.pth of plain tensors"):
        read_foreign(tmp_path / "bomb.pth")
    hidden = argparse.Namespace(lr=Bomb(tmp_path / "exploded"))
    torch.save({"model": made(1).state_dict(), "args": hidden}, tmp_path / "hidden.pth")
    with pytest.raises(UserError, match="neither"):
        read_foreign(tmp_path / "hidden.pth")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("saved", "sentence"),
    [
        ({"model": {"conv1.weight": torch.zeros(3)}}, "holds no plain ViT: none of its 1 tensors"),
        ({"epoch": 3}, "holds no tensors by name"),
        ([torch.zeros(3)], "holds no tensors by name"),
        ({"patch_embed.proj.weight": torch.zeros(32, 3, 8, 8)}, "no plain ViT with a class token"),
    ],
)
def test_other_files_are_refused_in_a_sentence(saved: object, sentence: str, tmp_path: Path):
    torch.save(saved, tmp_path / "file.pth")
    with pytest.raises(UserError, match=sentence):
        find_backbone(str(tmp_path / "file.pth"), heads=2)


def test_what_is_missing_or_of_another_size_is_named(tmp_path: Path):
    tensors = made(1).state_dict()
    torch.save({name: t for name, t in tensors.items() if name != "blocks.1.norm2.bias"}, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"lacks 1 of the network's weights, blocks\.1\.norm2\.bias"):
        find_backbone(str(tmp_path / "less.pth"), heads=2).build()
    torch.save(tensors | {"cls_token": torch.zeros(1, 1, 16)}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"cls_token is \(1, 1, 16\)"):
        find_backbone(str(tmp_path / "odd.pth"), heads=2).build()
    torch.save(tensors, tmp_path / "narrow.pth")
    with pytest.raises(UserError, match="say how many attention heads"):
        find_backbone(str(tmp_path / "narrow.pth"))
    with pytest.raises(UserError, match="no such file"):
        find_backbone(str(tmp_path / "nowhere.pth"))
    with pytest.raises(UserError, match="cannot be had"):
        find_backbone("timm:no_such_model")


class Settings(dict):
    """A trainer's own class of settings: nobody has it where the file is read."""


def states_of(model: nn.Module, rate: Any) -> dict[str, Any]:
    """An optimizer's state after a step, its rate from a schedule."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["weight_decay"] = rate
    return optimizer.state_dict()


def as_saved(trainer: str, student: nn.Module, teacher: nn.Module) -> tuple[Any, str]:
    """What a trainer hands to torch.save, and whose weights it evaluates."""
    rate = np.linspace(0, 1e-3, 10)[3]
    args = argparse.Namespace(lr=rate, output_dir=Path("/out"), local_crops_scale=(0.05, 0.4), device="cuda", gpu=0)
    mine, theirs, states = student.state_dict(), teacher.state_dict(), states_of(student, rate)
    head = {"head.mlp.0.weight": torch.zeros(4, 32), "head.last_layer.weight_g": torch.ones(4, 1)}
    heads = prefixed("module.", head)
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "growth_interval": 2000, "_growth_tracker": 3}
    lightning = {
        "epoch": 3, "global_step": 99, "pytorch-lightning_version": "2.1.2", "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "dirpath": "/out"}},
        "optimizer_states": [states], "lr_schedulers": [{"base_lrs": [rate], "last_epoch": 3}],
        "hparams_name": "cfg", "hyper_parameters": Settings(lr=rate),
    }  # fmt: skip
    match trainer:
        case "DINO":
            saved = {
                "student": prefixed("module.backbone.", mine) | heads, "teacher": prefixed("backbone.", theirs) | head,
                "optimizer": states, "epoch": 100, "args": args,
                "dino_loss": OrderedDict(center=torch.zeros(1, 4)), "fp16_scaler": scaler,
            }  # fmt: skip
            return saved, "teacher"
        case "iBOT":
            masked = {"masked_embed": torch.zeros(1, 32)}
            saved = {
                "student": prefixed("module.backbone.", mine | masked) | heads,
                "teacher": prefixed("backbone.", theirs | masked) | head,
                "optimizer": states, "epoch": 800, "args": args,
                "ibot_loss": OrderedDict(center=torch.zeros(1, 4), center2=torch.zeros(1, 1, 4)), "fp16_scaler": scaler,
            }  # fmt: skip
            return saved, "teacher"
        case "MAE":
            saved = {"model": mine | EXTRA, "optimizer": states, "epoch": 799, "scaler": scaler, "args": args}
            return saved, "student"
        case "SdAE":
            extra = EXTRA | {"decoder_pred.weight": torch.zeros(32, 8)}
            saved = {"model": mine | extra, "model_teacher": theirs, "optimizer": states, "epoch": 3, "args": args}
            return saved, "student"
        case "DINOv2":
            # its training saves the teacher alone for an evaluation, its blocks in chunks
            chunked = {name.replace("blocks.", "blocks.0.", 1): tensor for name, tensor in theirs.items()}
            mask = {"mask_token": torch.zeros(1, 32), "dino_head.mlp.0.weight": torch.zeros(4, 32)}
            saved = {"teacher": prefixed("backbone.", chunked | {"mask_token": mask.pop("mask_token")}) | mask}
            return saved, "teacher"
        case "timm":
            saved = {
                "epoch": 5, "arch": "vit_tiny_patch16_224", "state_dict": mine, "optimizer": states, "version": 2,
                "args": args, "amp_scaler": scaler, "state_dict_ema": mine, "metric": np.float64(70.1),
            }  # fmt: skip
            return saved, "student"
        case "solo-learn":
            both = prefixed("backbone.", mine) | prefixed("momentum_backbone.", theirs)
            return lightning | {"state_dict": both | {"classifier.weight": torch.zeros(10, 32)}}, "student"
        case "lightly MAE":
            wrapped = prefixed("backbone.vit.", mine) | {"backbone.mask_token": torch.zeros(1, 1, 32)}
            return lightning | {"state_dict": wrapped | {"decoder.decoder_embed.weight": torch.zeros(8, 32)}}, "student"
        case "lightly DINO":
            both = prefixed("student_backbone.vit.", mine) | prefixed("teacher_backbone.vit.", theirs)
            return lightning | {"state_dict": both}, "teacher"
        case _:
            saved = {"arch": "vit_small", "epoch": 300, "optimizer": states, "scaler": scaler}
            both = prefixed("module.base_encoder.", mine) | prefixed("module.momentum_encoder.", theirs)
            return saved | {"state_dict": both | {"module.predictor.0.weight": torch.zeros(4, 4)}}, "student"


TRAINERS = [
    "DINO", "iBOT", "MAE", "SdAE", "DINOv2", "timm", "solo-learn", "lightly MAE", "lightly DINO", "MoCo v3",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainers_own_checkpoint_gives_its_network(trainer: str, tmp_path: Path):
    """With the optimizer's numpy numbers, options and settings as the trainer keeps them."""
    networks = {"student": made(1), "teacher": made(2)}
    saved, usual = as_saved(trainer, networks["student"], networks["teacher"])
    for zipped in (True, False):
        torch.save(saved, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
        wanted = {"auto": usual}
        if trainer not in ("MAE", "timm", "lightly MAE", "DINOv2"):
            wanted |= {"student": "student", "labelling_teacher": "teacher"}
        for which, expected in wanted.items():
            backbone = find_backbone(str(tmp_path / "checkpoint.pth"), which, heads=2)  # pyright: ignore
            with torch.no_grad():
                ours = features(backbone.build().eval(), IMAGES)[0]
            assert torch.equal(ours, networks[expected].forward_features(IMAGES)[:, 0]), which


@pytest.mark.parametrize(("trainer", "shared"), [("BEiT", True), ("BEiT", False), ("SimMIM", True)])
def test_beits_and_simmims_own_checkpoints(trainer: str, shared: bool, tmp_path: Path):
    kinds = {"use_abs_pos_emb": False, "init_values": 0.1, "use_fc_norm": False}
    kinds |= {"use_shared_rel_pos_bias": True} if shared else {"use_rel_pos_bias": True}
    theirs = made(4, Beit, **kinds)
    rate = np.linspace(0, 1e-3, 10)[3]
    tensors = theirs.state_dict() | {"mask_token": torch.zeros(1, 1, 32)}
    if trainer == "BEiT":
        saved = {"model": tensors | {"lm_head.weight": torch.zeros(4, 32)}, "optimizer": states_of(theirs, rate)}
        saved |= {"epoch": 799, "scaler": {"scale": 1.0}, "args": argparse.Namespace(lr=rate, window_size=(4, 4))}
    else:
        decoder = {"decoder.0.weight": torch.zeros(192, 32, 1, 1), "decoder.0.bias": torch.zeros(192)}
        saved = {"model": prefixed("encoder.", tensors) | decoder, "optimizer": states_of(theirs, rate)}
        saved |= {"lr_scheduler": {"last_epoch": 3}, "max_accuracy": 0.0, "epoch": 799, "config": Settings(MODEL=1)}
    torch.save(saved, tmp_path / "checkpoint.pth")
    assert read_foreign(tmp_path / "checkpoint.pth").layout == trainer
    backbone = find_backbone(str(tmp_path / "checkpoint.pth"))
    assert backbone.mean == ((0.5, 0.5, 0.5) if trainer == "BEiT" else (0.485, 0.456, 0.406))
    with torch.no_grad():
        ours = features(backbone.build().eval(), IMAGES)[0]
        assert torch.allclose(ours, theirs.forward_features(IMAGES)[:, 0], atol=1e-6)


def test_dinov2s_registers_come_without_positions(tmp_path: Path):
    """As DINOv2 keeps them; timm's own conversion of its files is the reference."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    theirs = made(6, reg_tokens=4, no_embed_class=True, init_values=1e-5)
    tensors = dict(theirs.state_dict())
    saved = {name: tensor for name, tensor in tensors.items() if name != "reg_token"}
    saved |= {"register_tokens": tensors["reg_token"], "mask_token": torch.zeros(1, 32)}
    saved["pos_embed"] = torch.cat([0.1 * torch.ones(1, 1, 32), tensors["pos_embed"]], dim=1)
    torch.save(saved, tmp_path / "dinov2.pth")
    theirs.load_state_dict(checkpoint_filter_fn(dict(saved), theirs), strict=False)
    with torch.no_grad():
        ours = features(find_backbone(str(tmp_path / "dinov2.pth"), heads=2).build().eval(), IMAGES)[0]
        assert torch.equal(ours, theirs.forward_features(IMAGES)[:, 0])


def odd_weights() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own of what is in beta
        name, tensor = "blocks.0.attn.qkv.weight", made(1).state_dict()["blocks.0.attn.qkv.weight"]
        zero = torch.zeros(1)
        return {
            f"{name} is a sparse tensor": {name: tensor.to_sparse()},
            f"{name} is a quantised tensor": {name: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)},
            f"{name} is a nested tensor": {name: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])},
            f"{name} is a tensor on the meta device": {name: torch.empty(tensor.shape, device="meta")},
            f"{name} holds complex64": {name: tensor.to(torch.complex64)},
            f"{name} holds int64": {name: tensor.long()},
            f"{name} holds numbers that are not finite": {name: tensor * float("nan")},
            "blocks one is called '1000000000'": {"blocks.1000000000.norm1.weight": zero},
            "blocks one is called 'x'": {"blocks.x.norm1.weight": zero},
            r"no place in one for \\x1b\]0;pwn\\x07": {"\x1b]0;pwn\x07": zero},
            "which are not in it": {"pos_embed": zero.expand(1, 10**6 + 1, 32)},
            "images of 8,000 pixels": {"pos_embed": zero.expand(1, 10**6 + 1, 1), "big": torch.zeros(10**6 // 4)},
            r"patch_embed\.proj\.weight is \(0, 3, 8, 8\)": {"patch_embed.proj.weight": torch.zeros(0, 3, 8, 8)},
            "make no square of patches": {"pos_embed": torch.zeros(())},
            r"cls_token is \(\)": {"cls_token": torch.zeros(())},
            "no plain ViT with a class token": {"patch_embed.proj.weight": torch.zeros(32)},
            r"fc1\.weight is \(\)": {"blocks.0.mlp.fc1.weight": torch.zeros(())},
        }


@pytest.mark.parametrize("sentence", list(odd_weights()))
def test_odd_tensors_are_named_in_a_sentence(sentence: str, tmp_path: Path):
    torch.save({"model": made(1).state_dict() | odd_weights()[sentence]}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=sentence) as raised:
        find_backbone(str(tmp_path / "odd.pth"), heads=2).build()
    assert str(raised.value).isprintable()


def test_a_pipe_and_a_folder_are_no_weights(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(UserError, match="no regular file"):
        find_backbone(str(tmp_path / "pipe.pth"))
    with pytest.raises(UserError, match="no regular file"):
        find_backbone("/dev/zero")
