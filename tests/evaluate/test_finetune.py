"""Fine-tuning: rates against the papers' formulas, LARS against MAE's, mixing, and a resume to the bit."""

import dataclasses
import json
import math
import random
import signal
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms.functional import normalize

from fastpmae import UserError
from fastpmae.evaluate.augment import STEP, Mixing, RandAugment, drawn_from
from fastpmae.evaluate.backbone import find_backbone
from fastpmae.evaluate.classifier import Probe, make_classifier, make_optimizer, make_schedule
from fastpmae.evaluate.datasets import Labelled, open_labelled
from fastpmae.evaluate.finetune import train_classifier
from fastpmae.evaluate.finetune_state import Setting
from fastpmae.evaluate.recipe import FINETUNE_PRESETS, PROBE, FinetuneConfig
from fastpmae.run.checkpoint import checkpoint_path, checkpoints_in, read_checkpoint, step_of, write_checkpoint
from fastpmae.run.checkpoint_writer import Saver
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import Interrupted, RunError
from tests.devices import Draws, Waits

CPU = torch.device("cpu")


@pytest.fixture
def setting(small_beton: Path, tmp_path: Path) -> Setting:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    train, _ = open_labelled(small_beton, None)
    val = Labelled(train.samples, train.labels, train.names)
    backbone = find_backbone(str(tmp_path / "vit.pth"), heads=2)
    return Setting(backbone, train, val, tmp_path / "tuned", CPU, workers=1, crop_ratio=1.0)


CONFIG = FinetuneConfig(
    epochs=3, batch_size=16, accumulate=2, warmup_epochs=1.0, blr=0.02, model_ema_decay=0.9, drop_path=0.3
)


def layer_of(name: str, depth: int) -> int:
    """BEiT's count: 0 for what stands before the blocks, then the blocks, and depth + 1 for what follows."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name.split(".")[0] in ("cls_token", "pos_embed", "patch_embed") else depth + 1


@pytest.mark.parametrize(("preset", "opt"), [("paper", "adamw"), ("paper-a-large", "adamw"), ("paper", "sgd")])
def test_every_rate_is_the_papers_formula_and_timms_number(setting: Setting, preset: str, opt: Literal["adamw", "sgd"]):
    config = dataclasses.replace(FINETUNE_PRESETS[preset], epochs=20, opt=opt)
    model, _ = make_classifier(setting, config)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, steps_per_epoch=10)
    places = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    assert len(places) == len(list(model.parameters()))
    assert config.blr is not None
    warmup, peak = config.warmup_epochs * 10, config.blr * config.batch_size / 256
    for step in (0, 1, 37, int(warmup) - 1, int(warmup), 150, 199):
        schedule.step_update(step)
        rate = peak * step / warmup
        if step >= warmup:
            turn = math.pi * (step - warmup) / (200 - warmup)
            rate = config.min_lr + (peak - config.min_lr) * (1 + math.cos(turn)) / 2
        for name, parameter in model.named_parameters():
            group = places[id(parameter)]
            scale = config.layer_decay ** (2 + 1 - layer_of(name, 2))
            assert group["lr"] == pytest.approx(rate * scale, rel=1e-6, abs=1e-15), (name, step)
            plain = parameter.ndim == 1 or name in ("cls_token", "pos_embed")
            assert group["weight_decay"] == (0 if plain else 0.05), name
    # timm's own factory groups the parameters the same way
    theirs = create_optimizer_v2(model, "adamw", lr=peak, weight_decay=0.05, layer_decay=config.layer_decay)
    scales = {
        id(p): (group["lr_scale"], group["weight_decay"]) for group in theirs.param_groups for p in group["params"]
    }
    assert scales == {key: (group["lr_scale"], group["weight_decay"]) for key, group in places.items()}


def test_settings_that_change_nothing_are_refused():
    """And one that an earlier version recorded all the same is no difference to a resumed training."""
    paper = FINETUNE_PRESETS["paper"]
    for config, start, frozen, sentence in (
        (paper.using(opt="sgd", betas=(0.9, 0.95)), paper, False, "--betas changes nothing with --opt sgd"),
        (paper.using(opt="lars", layer_decay=0.5), paper, False, "--layer-decay changes nothing with --opt lars"),
        (PROBE.using(layer_decay=0.5), PROBE, True, "--layer-decay changes nothing of a frozen network"),
        (PROBE.using(opt="adamw", drop_path=0.1), PROBE, True, "--drop-path changes nothing of a frozen network"),
        (PROBE.using(betas=(0.9, 0.95)), PROBE, True, "--betas changes nothing with --opt lars"),
    ):
        with pytest.raises(UserError, match=f"{sentence}: leave it out"):
            config.check_used(start, frozen)
        assert start.using(opt=config.opt).differences(json.loads(json.dumps(dataclasses.asdict(config))), frozen) == []
    paper.using(opt="sgd", layer_decay=0.5).check_used(paper, frozen=False)
    paper.using(opt="lars").check_used(paper, frozen=False)
    PROBE.using(opt="adamw", betas=(0.9, 0.95)).check_used(PROBE, frozen=True)


@pytest.mark.slow
def test_an_earlier_training_by_sgd_had_one_rate(setting: Setting):
    """It goes on as it was with --layer-decay 1, to the bit, though it recorded another."""
    config = dataclasses.replace(CONFIG, opt="sgd", epochs=1, layer_decay=1.0, drop_path=0.0, eval_every=9)
    train_classifier(setting, config, steps=1)
    (path,) = checkpoints_in(setting.folder)
    checkpoint = read_checkpoint(path)
    progress = json.loads(json.dumps(checkpoint.progress))
    del progress["config"]["layers"]
    progress["config"]["finetune"]["layer_decay"] = 0.65
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    write_checkpoint(path, tensors, progress, keep=0)
    decaying = dataclasses.replace(config, layer_decay=0.65)
    with pytest.raises(UserError, match=r"--layer-decay was 1.0 and is now 0.65"):
        train_classifier(setting, decaying, resume=True)
    train_classifier(setting, config, resume=True)
    whole = dataclasses.replace(setting, folder=setting.folder.with_name("whole"))
    train_classifier(whole, config)
    ours, theirs = (load_file(each.folder / "classifier.safetensors") for each in (setting, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("frozen", [False, True])
def test_classifiers_are_drawn_on_the_host_whatever_they_compute_on(setting: Setting, frozen: bool):
    elsewhere = dataclasses.replace(setting, device=torch.device("meta"), frozen=frozen)
    with Draws() as draws:
        model, _ = make_classifier(elsewhere, PROBE if frozen else CONFIG)
    # A network is also laid out without memory, to compare its sizes with the file: all of it is drawn on the host too.
    assert draws.devices == {"cpu", "meta"}
    assert draws.shapes["meta"] <= draws.shapes["cpu"]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("mixed", [False, True])
def test_what_happens_to_images_on_a_gpu_waits_for_nothing(setting: Setting, mixed: bool):
    """Normalised, erased, mixed: from bytes to what the network is given, and the loss."""
    config = dataclasses.replace(CONFIG, reprob=1.0, mixup=0.8 * mixed, cutmix=1.0 * mixed)
    there = torch.device("cuda", 0)
    with FakeTensorMode():
        images = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device=there)
        labels, answers = torch.empty(4, dtype=torch.int64, device=there), torch.empty(4, 5, device=there)
        with Waits() as waits:
            for _ in range(8):
                changed, target = Mixing(config, 5, there)(setting.backbone.normalised(images), labels)
                (target * answers.log_softmax(dim=1)).sum()
            assert changed.device == target.device == there
    assert waits.found == []


def test_normalised_is_torchvisions(setting: Setting):
    backbone = dataclasses.replace(setting.backbone, mean=(0.48, 0.5, 0.1), std=(0.2, 0.25, 0.3))
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    truth = normalize(images / 255, [0.48, 0.5, 0.1], [0.2, 0.25, 0.3])
    assert torch.equal(backbone.normalised(images), truth)


def test_presets_are_the_papers():
    assert (
        FINETUNE_PRESETS["paper"].epochs,
        FINETUNE_PRESETS["paper"].batch_size,
        FINETUNE_PRESETS["paper"].warmup_epochs,
    ) == (100, 1024, 5)
    base, large, small = FINETUNE_PRESETS["paper-a"], FINETUNE_PRESETS["paper-a-large"], FINETUNE_PRESETS["small"]
    assert (base.epochs, base.batch_size, base.blr, base.layer_decay, base.drop_path) == (100, 2048, 5e-4, 0.65, 0.1)
    assert base.warmup_epochs == 10
    assert (large.epochs, large.batch_size, large.blr, large.layer_decay, large.drop_path) == (
        50,
        2048,
        1e-3,
        0.75,
        0.2,
    )
    assert large.warmup_epochs == 5
    assert (small.batch_size, small.weight_decay, small.warmup_epochs, small.epochs) == (512, 0.05, 5, 100)
    # ImageNet's rates are "base" rates for 256 images; the small sets' is DeiT's, for the 512 images of a step
    peaks = {name: config.peak_lr for name, config in FINETUNE_PRESETS.items()}
    assert peaks == pytest.approx(
        {"paper": 2e-3, "paper-a": 4e-3, "paper-a-large": 8e-3, "small": 5e-4, "small-1000": 5e-4, "deit": 5e-4}
    )


RATES = {
    "cls_token": 0.023757264018058777,
    "pos_embed": 0.023757264018058777,
    "patch_embed": 0.023757264018058777,
    "blocks.0": 0.03167635202407837,
    "blocks.1": 0.042235136032104492,
    "blocks.2": 0.056313514709472656,
    "blocks.3": 0.075084686279296875,
    "blocks.4": 0.1001129150390625,
    "blocks.5": 0.13348388671875,
    "blocks.6": 0.177978515625,
    "blocks.7": 0.2373046875,
    "blocks.8": 0.31640625,
    "blocks.9": 0.421875,
    "blocks.10": 0.5625,
    "blocks.11": 0.75,
    "fc_norm": 1.0,
    "head": 1.0,
}
"""What each part of a ViT of twelve blocks learns at with a layer decay of 0.75, as a share of the head's rate."""


def test_rates_of_twelve_blocks_are_those_of_the_table(setting: Setting, tmp_path: Path):
    vit = VisionTransformer(img_size=32, patch_size=16, embed_dim=8, depth=12, num_heads=2, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "deep.pth")
    deep = dataclasses.replace(setting, backbone=find_backbone(str(tmp_path / "deep.pth"), heads=2))
    config = FINETUNE_PRESETS["paper-a-large"]
    model, _ = make_classifier(deep, config)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, steps_per_epoch=10)
    schedule.step_update(50)  # the end of the warm-up
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    seen = set()
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1])
        assert rates[id(parameter)] == pytest.approx(8e-3 * RATES[part], rel=1e-9), name
        seen.add(part)
    assert seen == RATES.keys()


def test_lars_is_maes():
    torch.manual_seed(1)
    model = Probe(6, 4)
    config = dataclasses.replace(PROBE, batch_size=256, blr=0.4, weight_decay=0.01)
    optimizer = make_optimizer(model, config)
    weight, bias = model.head.weight.detach().clone(), torch.zeros(4)
    moving = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for _ in range(4):
        rows = torch.randn(8, 6)
        optimizer.zero_grad()
        model(rows).square().sum().backward()
        gradient, of_bias = model.head.weight.grad, model.head.bias.grad
        assert gradient is not None
        assert of_bias is not None
        # MAE, util/lars.py: decay, then the trust ratio, then momentum; one-dimensional parameters take neither
        update = gradient + 0.01 * weight
        update = update * (0.001 * weight.norm() / update.norm())
        moving[0] = 0.9 * moving[0] + update
        moving[1] = 0.9 * moving[1] + of_bias
        weight, bias = weight - 0.4 * moving[0], bias - 0.4 * moving[1]
        optimizer.step()
    assert torch.allclose(model.head.weight, weight, atol=1e-6)
    assert torch.allclose(model.head.bias, bias, atol=1e-5)


@pytest.mark.slow
def test_a_resumed_training_ends_in_the_same_bits(setting: Setting, tmp_path: Path):
    whole = dataclasses.replace(setting, folder=tmp_path / "whole")
    scores = train_classifier(whole, CONFIG)
    for steps in (1, 3, None):  # 44 images: two steps an epoch, so in the middle of one, and past the end of one
        resumed = train_classifier(setting, CONFIG, resume=steps != 1, steps=steps)
    one, other = (load_file(folder / "classifier.safetensors") for folder in (whole.folder, setting.folder))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    rows = [(folder / "metrics.jsonl").read_text() for folder in (whole.folder, setting.folder)]
    assert rows[0] == rows[1]
    assert [json.loads(line)["epoch"] for line in rows[0].splitlines()] == [1, 2, 3]
    assert torch.equal(scores.ranked, resumed.ranked)


class Signals(Progress):
    """Sends a signal in the middle of a training, after so many of its steps."""

    def __init__(self, after: int):
        super().__init__()
        self.left = after

    def advance(self, count: int = 1) -> None:
        if count == CONFIG.batch_size:  # a test counts all 44 images at once
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGUSR1)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 6])
def test_a_signal_in_an_epochs_last_step_loses_no_row(setting: Setting, tmp_path: Path, step: int):
    whole = dataclasses.replace(setting, folder=tmp_path / "whole")
    scores = train_classifier(whole, CONFIG)
    with pytest.raises(Interrupted, match=f"SIGUSR1 after step {step} of 6"):
        train_classifier(setting, CONFIG, progress=Signals(step))
    assert checkpoints_in(setting.folder)[0] == checkpoint_path(setting.folder, step)
    resumed = train_classifier(setting, CONFIG, resume=True)
    one, other = ((folder / "metrics.jsonl").read_text() for folder in (whole.folder, setting.folder))
    assert one == other
    assert torch.equal(scores.ranked, resumed.ranked)


@pytest.mark.slow
def test_epoch_ends_save_when_it_is_time(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    saved, save = [], Saver.save

    def noted(saver, path, *others):
        saved.append(step_of(path))
        save(saver, path, *others)

    monkeypatch.setattr(Saver, "save", noted)
    train_classifier(setting, CONFIG)
    assert saved == [6]


class SignalsInATest(Progress):
    """Sends a signal when the first images of the second epoch's test are done, and counts how many are."""

    tests, images = 0, 0

    def advance(self, count: int = 1) -> None:
        if count != CONFIG.batch_size:
            self.tests += 1
            self.images += count
            if self.tests == 5:  # 44 images in batches of ten: five in the first test
                assert self.images == 44
            if self.tests == 6:
                signal.raise_signal(signal.SIGTERM)


@pytest.mark.slow
def test_a_signal_in_a_test_ends_it_and_leaves_its_row_to_the_resumed_training(setting: Setting, tmp_path: Path):
    setting = dataclasses.replace(setting, feature_batch=10)
    whole = dataclasses.replace(setting, folder=tmp_path / "whole")
    scores = train_classifier(whole, CONFIG)
    progress = SignalsInATest()
    with pytest.raises(Interrupted, match="SIGTERM after step 4 of 6"):
        train_classifier(setting, CONFIG, progress=progress)
    assert progress.tests == 6, "the test goes on after the signal"
    assert checkpoints_in(setting.folder) == [checkpoint_path(setting.folder, 4)]
    resumed = train_classifier(setting, CONFIG, resume=True)
    one, other = ((folder / "metrics.jsonl").read_text() for folder in (whole.folder, setting.folder))
    assert one == other
    assert torch.equal(scores.ranked, resumed.ranked)


@pytest.mark.slow
def test_a_full_disk_ends_the_training(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastpmae.run.checkpoint.save_file", full)
    with pytest.raises(RunError, match=r"No space left on device. Last checkpoint: none yet"):
        train_classifier(setting, CONFIG)
    assert not (setting.folder / "classifier.safetensors").exists()


@pytest.mark.slow
def test_checkpoints_come_with_time_and_an_older_one_serves_where_the_newest_is_damaged(
    setting: Setting, tmp_path: Path, capsys
):
    whole = dataclasses.replace(setting, folder=tmp_path / "whole")
    train_classifier(whole, CONFIG)
    paths = [checkpoint_path(setting.folder, step) for step in (4, 3)]
    train_classifier(setting, dataclasses.replace(CONFIG, save_every=0.0), steps=4)
    assert checkpoints_in(setting.folder) == paths  # step 3 is in the middle of an epoch
    content = bytearray(paths[0].read_bytes())
    content[-100] ^= 1
    paths[0].write_bytes(content)
    train_classifier(setting, CONFIG, resume=True, progress=Progress(live=True))
    said = capsys.readouterr().err
    assert f"{paths[0]} is damaged: its contents do not match its digest; continuing after step 3" in said
    one, other = (load_file(folder / "classifier.safetensors") for folder in (whole.folder, setting.folder))
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [(folder / "metrics.jsonl").read_text() for folder in (whole.folder, setting.folder)]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_training_goes_on_with_the_same_weights_elsewhere_and_with_no_others(setting: Setting, tmp_path: Path):
    short = dataclasses.replace(CONFIG, epochs=1, accumulate=1, aa="")
    train_classifier(setting, short, steps=1)
    first = tmp_path / "vit.pth"
    moved = first.rename(tmp_path / "moved.pth")
    elsewhere = dataclasses.replace(setting, backbone=find_backbone(str(moved), heads=2))
    train_classifier(elsewhere, short, resume=True)
    for name, heads, change in (("moved.pth", 4, 0.0), ("vit.pth", 2, 1e-3)):
        tensors = torch.load(moved)
        tensors["blocks.1.mlp.fc1.bias"] += change
        torch.save(tensors, tmp_path / name)
        other = dataclasses.replace(setting, backbone=find_backbone(str(tmp_path / name), heads=heads))
        with pytest.raises(UserError, match="the network's weights are others"):
            train_classifier(other, short, resume=True)


@pytest.mark.slow
def test_a_folder_in_use_and_changed_settings_are_refused(setting: Setting):
    short = dataclasses.replace(CONFIG, epochs=1, accumulate=1, aa="")
    train_classifier(setting, short, steps=1)
    with pytest.raises(UserError, match="already holds a training: add --resume"):
        train_classifier(setting, short)
    with pytest.raises(UserError, match=r"other settings: --blr was 0.02 and is now 0.01"):
        train_classifier(setting, dataclasses.replace(short, blr=0.01), resume=True)
    with pytest.raises(UserError, match="frozen was False"):
        train_classifier(dataclasses.replace(setting, frozen=True), short, resume=True)
    with pytest.raises(UserError, match="holds 44 images, less than one batch of 64: choose a smaller --batch-size"):
        train_classifier(
            dataclasses.replace(setting, folder=setting.folder / "other"), dataclasses.replace(short, batch_size=64)
        )


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_training_before_it_is_saved(setting: Setting):
    wild = dataclasses.replace(CONFIG, blr=1e30, accumulate=1, aa="", warmup_epochs=0.0)
    with pytest.raises(RunError, match="is not finite"):
        train_classifier(setting, wild)
    assert not list((setting.folder / "checkpoints").glob("*.safetensors"))


PLAIN = FinetuneConfig(
    epochs=30, batch_size=22, warmup_epochs=2.0, blr=0.01, layer_decay=1.0, drop_path=0.0, smoothing=0.0, mixup=0.0,
    cutmix=0.0, aa="", reprob=0.0, scale=(1.0, 1.0), eval_every=30,
)  # fmt: skip


@pytest.mark.slow
def test_it_learns_to_tell_the_training_images(setting: Setting):
    """Three classes, whose images differ: fitting them well says that labels and images belong together."""
    assert train_classifier(setting, PLAIN).top1 > 60


@pytest.mark.slow
def test_the_average_that_deit_tests_has_learnt_after_few_steps(setting: Setting):
    """60 steps with its decay of 0.99996, of which a plain average would keep 99.8 % of the first."""
    assert FINETUNE_PRESETS["deit"].model_ema_decay == 0.99996
    assert (
        train_classifier(
            setting, dataclasses.replace(PLAIN, model_ema_decay=FINETUNE_PRESETS["deit"].model_ema_decay)
        ).top1
        > 60
    )


@pytest.mark.slow
def test_the_probe_shrinks_its_batch_to_the_images_and_says_so(setting: Setting, monkeypatch, capsys):
    setting = dataclasses.replace(setting, frozen=True, feature_batch=10)
    largest = 0
    forward = VisionTransformer.forward_features

    def watched(self: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(images))
        return forward(self, images)

    monkeypatch.setattr(VisionTransformer, "forward_features", watched)
    train_classifier(setting, dataclasses.replace(PROBE, epochs=10), progress=Progress(live=True))
    assert (
        "--batch-size 16384 is more than there are images: a step takes 44, and the peak learning rate is 0.0172 "
        "instead of 6.4"
    ) in capsys.readouterr().err
    assert largest == 10
    rows = [json.loads(line) for line in (setting.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))


@pytest.mark.parametrize(
    ("change", "images", "size"),
    [
        ({}, 1023, 1022),
        ({}, 1025, 1024),
        ({"accumulate": 8}, 999, 992),
        ({"mixup": 0.0, "cutmix": 0.0}, 7, 7),
        ({}, 1, 1024),
    ],
)
def test_a_batch_is_fitted_to_the_images(change: dict, images: int, size: int):
    config = FinetuneConfig(**change)
    assert config.fitted(images) == dataclasses.replace(config, batch_size=size)


@pytest.mark.slow
def test_the_probe_leaves_the_network_alone_and_learns(setting: Setting):
    config = dataclasses.replace(PROBE, epochs=4, batch_size=22, warmup_epochs=1.0, blr=1.0, opt="sgd")
    scores = train_classifier(dataclasses.replace(setting, frozen=True), config)
    kept = load_file(setting.folder / "classifier.safetensors")
    assert set(kept) == {
        "head.weight",
        "head.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    assert scores.top1 > 36  # the largest class has 34 % of the images


def test_targets_are_smoothed_and_mixed_as_timm_says():
    images, labels = torch.rand(8, 3, 16, 16), torch.tensor([0, 1, 2, 3, 4, 0, 2, 1])
    plain = Mixing(FinetuneConfig(mixup=0.0, cutmix=0.0, reprob=0.0, smoothing=0.1), 5, CPU)
    same, target = plain(images, labels)
    assert torch.equal(same, images)
    loss = -(target * torch.eye(5)[labels].log_softmax(dim=1)).sum(dim=1).mean()
    expected = torch.nn.functional.cross_entropy(torch.eye(5)[labels], labels, label_smoothing=0.1)
    assert loss == pytest.approx(expected)
    mixed = Mixing(FinetuneConfig(cutmix=0.0, reprob=0.0, smoothing=0.0), 5, CPU)
    with drawn_from(STEP, 1):
        blend, target = mixed(images.clone(), labels)
    one_hot = torch.eye(5)[labels]
    share = target[0, 0]  # the last image, which this one is mixed with, is of another class
    assert 0.01 < share < 0.99
    assert torch.allclose(target, share * one_hot + (1 - share) * one_hot.flip(0), atol=1e-6)
    assert torch.allclose(blend, share * images + (1 - share) * images.flip(0), atol=1e-6)


def test_draws_depend_on_the_key_alone_and_leave_no_trace():
    before = torch.get_rng_state()
    with drawn_from(STEP, 3, 4):
        one = (torch.rand(1).item(), np.random.random(), random.random())  # noqa: NPY002
    torch.rand(1)
    with drawn_from(STEP, 3, 4):
        other = (torch.rand(1).item(), np.random.random(), random.random())  # noqa: NPY002
    assert one == other
    torch.set_rng_state(before)
    with drawn_from(STEP, 3, 5):
        assert torch.rand(1).item() != one[0]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("recipe", ["rand-m10-n8-inc1", "rand-m0-n8-inc0"])
def test_rand_augment_reaches_the_end_of_its_magnitudes(recipe: str):
    images = np.full((16, 3, 32, 32), 200, dtype=np.uint8)
    with RandAugment(recipe, 32, (0.5, 0.5, 0.5), seed=1) as augment:
        changed = augment.collect(augment.submit(images, 0, np.arange(16)))
    # posterized to no bits at all, as by every Pillow before 13
    assert any(not image.any() for image in changed)


@pytest.mark.slow
def test_rand_augment_in_processes_gives_what_it_gives_here():
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    samples = np.arange(10, 15)
    with RandAugment("rand-m9-mstd0.5-inc1", 32, (0.5, 0.5, 0.5), seed=1) as here:
        expected = here.collect(here.submit(images, 2, samples))
        assert not np.array_equal(expected, images)
        again = here.collect(here.submit(images[2:], 2, samples[2:]))
        assert np.array_equal(again, expected[2:])
        assert not np.array_equal(here.collect(here.submit(images, 3, samples)), expected)
    with RandAugment("rand-m9-mstd0.5-inc1", 32, (0.5, 0.5, 0.5), seed=1, workers=2) as there:
        assert np.array_equal(there.collect(there.submit(images, 2, samples)), expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"epochs": 0}, "--epochs 0 must be at least 1"),
        ({"accumulate": 3}, "--accumulate 3 must be a divisor of 1024"),
        ({"batch_size": 3}, "--batch-size 3 must be even in each part"),
        ({"warmup_epochs": 200.0}, r"--warmup-epochs 200.0 must be in \[0, 100\]"),
        ({"layer_decay": 1.5}, "--layer-decay 1.5 must be at most 1"),
        ({"drop_path": 1.0}, r"--drop-path 1.0 must be in \[0, 1\)"),
        ({"betas": (0.9, 2.0)}, r"--betas 0.9 2.0 must be in \[0, 1\)"),
        ({"betas": (float("nan"), 0.9)}, "--betas nan 0.9 must be finite"),
        ({"blr": None, "lr": float("inf")}, "--lr inf must be finite"),
        ({"mixup": float("inf")}, "--mixup inf must be finite"),
        ({"scale": (1.0, 0.5)}, "--scale 1.0 0.5 must be two shares"),
        ({"seed": -1}, "--seed -1 must be between 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        FinetuneConfig(**change)


def test_a_negative_number_of_steps_is_refused_before_anything_is_written(setting: Setting):
    with pytest.raises(UserError, match="--steps -5: 0 or more"):
        train_classifier(setting, CONFIG, steps=-5)
    assert not setting.folder.exists()


def test_an_unknown_rand_augment_is_refused():
    with pytest.raises(UserError, match="timm knows no such RandAugment"):
        RandAugment("augmix-m3", 32, (0.5, 0.5, 0.5), seed=0)


def test_registers_are_grouped_as_the_class_token_is():
    """timm before 1.0.28 took them for what follows the blocks, and let them decay."""
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3, reg_tokens=2)
    config = dataclasses.replace(CONFIG, layer_decay=0.5)
    for group in make_optimizer(vit, config).param_groups:
        if any(parameter is vit.reg_token for parameter in group["params"]):
            assert (group["lr_scale"], group["weight_decay"]) == (0.5**3, 0.0)
            assert any(parameter is vit.cls_token for parameter in group["params"])
            break
    else:
        raise AssertionError("no group holds the registers")
