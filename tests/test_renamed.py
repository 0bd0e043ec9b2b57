"""Names of earlier versions: every command that meets one says what it is called now, and changes nothing."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastpmae import Config, UserError, pretrain, read_config
from fastpmae import train as loop
from fastpmae.config import settings_by_name
from fastpmae.evaluate import features, protocols
from fastpmae.evaluate.features import load_encoder
from fastpmae.evaluate.recipe import FINETUNE_PRESETS, FinetuneConfig
from fastpmae.export import export
from fastpmae.pictures import report, view
from fastpmae.pictures.report import write_report
from fastpmae.plan import plan
from fastpmae.renamed import FINETUNE_SETTINGS, GROUPS, SETTINGS
from fastpmae.run.checkpoint import checkpoint_path, checkpoints_in, read_checkpoint, write_checkpoint
from fastpmae.run.init_weights import header_of
from fastpmae.weights.tensor_file import save_tensors

OLD_FINETUNE = {new: old for old, new in FINETUNE_SETTINGS.items()} | {"blr": "lr"}
Command = Callable[[], int]


def say(main: Command, words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """A command's exit status and what it says."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *words])
        try:
            status = main()
        except SystemExit as ended:
            status = int(ended.code or 0)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return status, said.out + said.err


def old_groups(groups: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A run's settings as the version before the new names wrote them."""
    names = {new: old for old, new in SETTINGS.items()} | {"blr": "lr"}
    old = {name: group for group, name in GROUPS.items()}
    found = {
        old.get(group, group): {names.get(name, name): value for name, value in settings.items() if name != "lr"}
        for group, settings in groups.items()
    }
    if found["optimiser"]["balance"] == "micro-batch":
        found["optimiser"]["balance"] = "part"
    return found


def as_old_run(folder: Path) -> Path:
    """Make a run one of the version before: its settings, and its tensors' names. Returns the newest checkpoint."""
    for path in checkpoints_in(folder):
        found = read_checkpoint(path)
        tensors = {re.sub(r"^optimizer\.", "optimiser.", name): tensor for name, tensor in found.tensors.items()}
        progress = found.progress | {"config": old_groups(found.progress["config"])}
        write_checkpoint(path, tensors, progress, keep=99)
    groups = old_groups(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(groups))
    return checkpoints_in(folder)[0]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_new_names_are_settings_and_old_ones_are_not() -> None:
    names, kinds = settings_by_name(), {field.name for field in dataclasses.fields(FinetuneConfig)}
    assert set(GROUPS.values()) <= set(names.values())
    assert not set(GROUPS) & set(names.values())
    assert set(SETTINGS.values()) <= set(names)
    assert not set(SETTINGS) & set(names)
    assert set(FINETUNE_SETTINGS.values()) <= kinds
    assert not set(FINETUNE_SETTINGS) & kinds


@pytest.mark.parametrize(
    ("main", "words", "sentence"),
    [
        (loop.main, ["--balance", "part"], "--balance part is now --sinkhorn-over micro-batch"),
        (loop.main, ["--balance=step"], "--balance step is now --sinkhorn-over step"),
        (loop.main, ["--sinkhorn-over", "part"], "--sinkhorn-over part is now --sinkhorn-over micro-batch"),
        (loop.main, ["--checkpoint-blocks", "2"], "--checkpoint-blocks 2 is now --activation-checkpointing 2"),
        (loop.main, ["--checkpoint_blocks"], "--checkpoint_blocks is now --activation-checkpointing"),
        (plan.main, ["--preset", "mae", "--balance", "part"], "--balance part is now --sinkhorn-over micro-batch"),
        (plan.main, ["--checkpoint-blocks=1"], "--checkpoint-blocks 1 is now --activation-checkpointing 1"),
        (view.main, ["a", "b", "--picture", "learnt"], "--picture learnt is now --picture analysis"),
        (protocols.main, ["finetune", "x", "--rand-augment", ""], "--rand-augment is now --aa"),
        (protocols.main, ["finetune", "x", "--erase", "0.1"], "--erase 0.1 is now --reprob 0.1"),
        (protocols.main, ["finetune", "x", "--switch", "0"], "--switch 0 is now --mixup-switch-prob 0"),
        (protocols.main, ["probe", "x", "--jitter=0.4"], "--jitter 0.4 is now --color-jitter 0.4"),
        (protocols.main, ["finetune", "x", "--ema", "0.99"], "--ema 0.99 is now --model-ema-decay 0.99"),
        (protocols.main, ["probe", "x", "--optimiser", "sgd"], "--optimiser sgd is now --opt sgd"),
        (loop.main, ["--balance", "\x1b[31mx"], r"--balance \x1b[31mx is now --sinkhorn-over \x1b[31mx"),
    ],
)
def test_an_old_flag(main: Command, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = say(main, words, capsys)
    assert (status, said.strip().partition("error: ")[2]) == (2, sentence)


def test_plans_own_jitter_is_no_old_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--jitter 2.0 is not in [0, 1)" in say(plan.main, ["--jitter", "2", "--loader-rate", "1"], capsys)[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"optimiser": {"epochs": 3}}', "the group optimiser is now optimizer"),
        ('{"teachers": {}}', "the group teachers is now teacher"),
        ('{"model": {"model": "vit_tiny"}}', "the group model is now network"),
        ('{"optimizer": {"balance": "part"}}', "optimizer.balance is now sinkhorn_over and its value part micro-batch"),
        ('{"optimizer": {"balance": "step"}}', "optimizer.balance is now sinkhorn_over"),
        ('{"efficiency": {"checkpoint_blocks": 2}}', "efficiency.checkpoint_blocks is now activation_checkpointing"),
        (
            '{"optimiser": {"lr": 1e-3}}',
            "the group optimiser is now optimizer; lr, the rate for 256 images, is now blr",
        ),
        ('{"optimizer": {"lr": 1e-3}}', "lr, the rate for 256 images, is now blr, and lr the peak rate itself, beside"),
        ('{"optimizer": {"balance": [3]}}', "optimizer.balance is now sinkhorn_over"),
    ],
)
def test_an_old_setting_in_a_file(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path} names settings as earlier versions did: .*{re.escape(words)}"):
        read_config(path)
    for main in (loop.main, plan.main):
        status, said = say(main, ["--config", str(path)], capsys)
        assert status == 2
        assert words in said


@pytest.mark.slow
def test_an_old_run(tiny: Config, small_beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of it is touched; its encoder still starts a new run, since weights have kept their names."""
    folder = pretrain(tiny.using(steps=2, loader="torch"))
    path = as_old_run(folder)
    before, run, beton = contents(folder), str(folder), str(small_beton)
    out = str(tmp_path / "out")
    commands: list[tuple[Command, list[str]]] = [
        (loop.main, ["--resume", "--out", run]),
        (loop.main, ["--resume", str(path), "--steps", "3"]),
        (loop.main, ["--resume", "--preset", "demo", "--beton", beton, "--out", run, "--batch-size", "8"]),
        (loop.main, ["--config", str(folder / "config.json"), "--out", out]),
        (plan.main, ["--config", str(folder / "config.json")]),
        (plan.main, ["--resume", run]),
        (protocols.main, ["knn", run, "--train", beton]),
        (protocols.main, ["finetune", str(path), "--train", beton, "--val", beton]),
        (features.main, [run, beton, f"{out}.npz"]),
        (export.main, [run, out]),
        (report.main, [run]),
        (view.main, [beton, f"{out}.png", "--run", run]),
    ]
    for main, words in commands:
        status, said = say(main, words, capsys)
        assert status == 2, words
        assert re.search(r"(step-00000002\.safetensors|config\.json) names settings as earlier versions did: ", said)
        for phrase in ("optimiser is now optimizer", "lr, the rate for 256 images, is now blr", "model is now network",
                       "balance is now sinkhorn_over and its value part micro-batch"):  # fmt: skip
            assert phrase in said
    assert contents(folder) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == [folder.name]
    began = pretrain(tiny.using(init=folder, steps=1, blr=0.0, out=tmp_path / "next"))
    assert torch.equal(load_encoder(began)[0].cls_token, load_file(path)["student.encoder.cls_token"])


@pytest.mark.slow
def test_a_run_with_a_peak_rate_goes_on_with_it(tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """And with the base rate that gives the same peak; the report names the peak."""
    folder = pretrain(tiny.using(lr=1e-3, steps=2, loader="torch"))
    recorded = json.loads((folder / "config.json").read_text())["optimizer"]
    assert (recorded["blr"], recorded["lr"]) == (None, 1e-3)
    assert "peak learning rate 0.001" in capsys.readouterr().err
    assert say(loop.main, ["--resume", "--out", str(folder), "--steps", "3"], capsys)[0] == 0
    flags = ["--resume", "--out", str(folder), "--steps", "4"]
    status, said = say(loop.main, [*flags, "--blr", "1e-3"], capsys)
    assert status == 2
    assert "the peak learning rate was 0.001 and is now 3.125e-05" in said
    assert say(loop.main, [*flags, "--blr", str(1e-3 * 256 / 8)], capsys)[0] == 0
    assert "--blr was 0.032 and is now 0.01" in say(loop.main, [*flags, "--blr", "1e-2"], capsys)[1]
    assert read_checkpoint(checkpoint_path(folder, 4)).config.optimizer.peak_lr == 1e-3
    assert "peak learning rate 0.001" in Path(write_report(folder)).read_text()


def old_finetune(settings: dict[str, Any]) -> dict[str, Any]:
    return {OLD_FINETUNE.get(name, name): value for name, value in settings.items() if name != "lr"}


@pytest.mark.slow
def test_an_old_classifier(tiny: Config, small_beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretrain(tiny.using(steps=1))
    tuned = tmp_path / "tuned"
    given = ["--train", str(small_beton), "--val", str(small_beton)]
    words = ["finetune", str(run), *given, "--out", str(tuned), "--preset", "small", "--epochs", "1",
             "--warmup-epochs", "0", "--batch-size", "22", "--workers", "1", "--device", "cpu"]  # fmt: skip
    assert say(protocols.main, [*words, "--lr", "1e-3"], capsys)[0] == 0
    assert json.loads((tuned / "finetune-student.json").read_text())["peak_lr"] == 1e-3
    file = tuned / "classifier.safetensors"
    header, tensors = dict(header_of(file)), load_file(file)
    header["course"] = json.dumps(old_finetune(json.loads(header.pop("finetune"))))
    save_tensors(tensors, file, header)
    (path,) = checkpoints_in(tuned)
    found = read_checkpoint(path)
    config = found.progress["config"]
    config["course"] = old_finetune(config.pop("finetune"))
    write_checkpoint(path, found.tensors, found.progress, keep=0)
    before = contents(tuned)
    out = str(tmp_path / "out")
    for main, use in (
        (protocols.main, [*words, "--resume"]),
        (protocols.main, ["knn", str(tuned), "--train", str(small_beton)]),
        (protocols.main, ["knn", str(file), "--train", str(small_beton)]),
        (protocols.main, ["knn", str(path), "--train", str(small_beton)]),
        (export.main, [str(tuned), out]),
        (features.main, [str(tuned), str(small_beton), f"{out}.npz"]),
        (
            loop.main,
            ["--preset", "demo", "--beton", str(small_beton), "--init", str(tuned), "--out", out, "--batch-size", "8"],
        ),
    ):
        status, said = say(main, use, capsys)
        assert status == 2, use
        assert "the settings of its training are called 'course' in it, now 'finetune'" in said
    file.unlink()
    status, said = say(export.main, [str(tuned), out], capsys)
    assert (status, "now 'finetune'" in said) == (2, True)
    del before[file]
    assert {name: data for name, data in contents(tuned).items() if name.name != ".lock"} == {
        name: data for name, data in before.items() if name.name != ".lock"
    }
    assert set(OLD_FINETUNE.values()) <= old_finetune(dataclasses.asdict(FINETUNE_PRESETS["paper"])).keys()
