"""The settings: what the presets stand for, and that a file of settings says what it means or is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

from fastpmae import PRESETS, Config, UserError, preset, pretrain, read_config
from fastpmae.config import Efficiency, Optimizer
from fastpmae.config_file import config_from, write_config
from fastpmae.evaluate.cli import Finetune, Probe
from fastpmae.evaluate.cli import read_command as read_evaluation
from fastpmae.evaluate.recipe import FINETUNE_PRESETS, PROBE, FinetuneConfig
from fastpmae.model.build import SHAPES, check, shape_of, view_settings, warmup_epochs
from fastpmae.model.phases import phases_of
from fastpmae.pretraining.cli import read_command
from fastpmae.run.checkpoint import settings_in
from fastpmae.run.folder import folder_of
from fastpmae.settings.rates import rate_changes

# the paper: section 3.2 (teachers), 3.3 (prototypes), equation 5 (weights), 4 and appendix A (everything else)
PAPER: dict[str, Any] = {
    "model": "vit_base",
    "image_size": 224,
    "mask_ratio": 0.75,
    "folds": 3,
    "prototypes": 4096,
    "teachers": "dual",
    "teacher_init": "copy",
    "reconstruction_cadence": "epoch",
    "reconstruction_momentum": (0.96, 0.99),
    "labelling_cadence": "step",
    "labelling_momentum": (0.996, 1.0),
    "reconstruction_view": "simple",
    "labelling_view": "complex",
    "target": "tokens",
    "lambda_m": 1.0,
    "lambda_c": 1.0,
    "lambda_p": 1.0,
    "epochs": 300,
    "batch_size": 768,
    "blr": 2.666e-4,
    "weight_decay": 0.05,
    "decay_tokens": False,
    "drop_path": 0.25,
    # left open by the paper; MAE's, DINO's, SwAV's and MC-SSL's own
    "simple_scale": (0.2, 1.0),
    "complex_scale": (0.14, 1.0),
    "complex_recipe": "coin",
    "decoder_depth": 8,
    "decoder_width": 512,
    "decoder_heads": 16,
    "head_hidden": 2048,
    "head_bottleneck": 256,
    "cosine_axis": "feature",
    "match_metric": "cosine",
    "match_scope": "image",
    "epsilon": 0.05,
    "sinkhorn_iterations": 3,
    "student_temperature": 0.1,
    "betas": (0.9, 0.95),
    "clip_grad": 0.0,
}
WITHOUT_LABELS = {"teachers": "reconstruction", "lambda_c": 0.0, "lambda_p": 0.0}
ABLATION = {"model": "vit_small", "epochs": 100}
DIFFERENT: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper-800": {"epochs": 800},
    "ablation": ABLATION,
    "dual": ABLATION,
    "sdae": WITHOUT_LABELS,
    # engine_pretrain.py, main_pretrain.py and models_teacher.py of AbrahamYabo/SdAE; timm 0.3.2 decides what is decayed
    "sdae-code": {
        **WITHOUT_LABELS,
        "cosine_axis": "token",
        "teacher_init": "random",
        "weight_decay": 0.04,
        "decay_tokens": True,
    },
    "single-step": {**ABLATION, "teachers": "single"},
    "single-epoch": {
        **ABLATION,
        "teachers": "single",
        "labelling_cadence": "epoch",
        "labelling_momentum": (0.96, 0.99),
    },
    "mae": {
        "teachers": "none",
        "target": "pixels",
        "lambda_c": 0.0,
        "lambda_p": 0.0,
        "drop_path": 0.0,
        "epochs": 1600,
        "batch_size": 4096,
        "blr": 1.5e-4,
        "decay_tokens": True,
    },
}
WARMUP = {"paper": 60, "paper-800": 60, "ablation": 20, "dual": 20, "sdae": 60, "sdae-code": 60, "single-step": 20,
          "single-epoch": 20, "mae": 40, "demo": 10, "small-data": 5}  # fmt: skip


def value_of(config: Config, name: str) -> Any:
    (group,) = (field.name for field in dataclasses.fields(Config) if hasattr(getattr(config, field.name), name))
    return getattr(getattr(config, group), name)


@pytest.mark.parametrize("name", DIFFERENT)
def test_presets_carry_their_numbers(name: str) -> None:
    config = PRESETS[name]
    expected = PAPER | DIFFERENT[name]
    assert {setting: value_of(config, setting) for setting in expected} == expected
    assert config.run.preset == name


def test_these_are_the_presets() -> None:
    assert set(PRESETS) == {*DIFFERENT, "demo", "small-data"}


@pytest.mark.parametrize("name", WARMUP)
def test_every_preset_fits_together(name: str) -> None:
    check(PRESETS[name])
    assert warmup_epochs(PRESETS[name]) == pytest.approx(WARMUP[name])


@pytest.mark.parametrize(("name", "epochs"), [("demo", (43, 7)), ("small-data", (15, 10))])
def test_small_presets_learn_pixels_first(name: str, epochs: tuple[int, int]) -> None:
    pixels, tokens = phases_of(PRESETS[name])
    assert (pixels.config.optimizer.epochs, tokens.config.optimizer.epochs) == epochs
    assert (pixels.config.loss.target, tokens.config.loss.target) == ("pixels", "tokens")
    # momenta of the run's own length let labels follow the student at once, and lose more than they gain
    assert PRESETS[name].teacher.momentum_for is None


def test_the_demo_shows_both_teachers_and_small_data_takes_the_one_that_pays() -> None:
    assert PRESETS["demo"].teacher == PRESETS["paper"].teacher
    small = PRESETS["small-data"]
    assert small.teacher.teachers == "reconstruction"
    assert (small.loss.lambda_c, small.loss.lambda_p) == (0, 0)


def test_the_papers_patches() -> None:
    """Appendix A: 49 patches for the student, three groups of 49 for the teachers."""
    views = view_settings(PRESETS["paper"])
    assert (views.patches, views.visible, views.fold_sizes) == (196, 49, (49, 49, 49))


@pytest.mark.parametrize("folds", [1, 2, 4, 5, 7, 146])
def test_fold_sizes_differ_by_at_most_one(folds: int) -> None:
    sizes = view_settings(PRESETS["paper"].using(folds=folds)).fold_sizes
    assert len(sizes) == folds
    assert sum(sizes) == 147
    assert list(sizes) == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("vit_tiny", (16, 192, 12, 3)),
        ("vit_small", (16, 384, 12, 6)),
        ("vit_base", (16, 768, 12, 12)),
        ("vit_large", (16, 1024, 24, 16)),
        ("vit_huge", (14, 1280, 32, 16)),
    ],
)
def test_model_sizes(model: str, shape: tuple[int, ...]) -> None:
    found = shape_of(PRESETS["paper"].using(model=model).network)
    assert (found.patch_size, found.width, found.depth, found.heads) == shape
    assert found.mlp_ratio == 4
    assert set(SHAPES) == {"vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"}


def test_timms_names_mean_timms_sizes() -> None:
    found = shape_of(PRESETS["paper"].using(model="vit_small_patch32_224").network)
    assert (found.patch_size, found.width, found.depth, found.heads) == (32, 384, 12, 6)


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "resnet50"},
        {"model": "nothing_of_the_sort"},
        {"model": "swin_tiny_patch4_window7_224"},
        {"image_size": 225},
        {"folds": 0},
        {"folds": 500},
        {"mask_ratio": 1.0},
        {"width": 100, "heads": 3},
        {"decoder_width": 30},
        {"teachers": "reconstruction"},
        {"teachers": "none", "lambda_c": 0.0, "lambda_p": 0.0},
        {"target": "pixels"},
        {"lambda_m": 0.0, "lambda_c": 0.0, "lambda_p": 0.0},
        {"lambda_m": -1.0},
        {"epsilon": 0.0},
        {"student_temperature": 0.0},
        {"sinkhorn_iterations": 0},
        {"epochs": 0},
        {"warmup_epochs": 301.0},
        {"batch_size": 0},
        {"accumulate": 0},
        {"prototypes_chunk": -1},
        {"labelling_momentum": (0.9, 1.1)},
        {"reconstruction_momentum": (-0.1, 0.99)},
        {"drop_path": 1.0},
        {"prototypes": 0},
        {"log_every": 0},
        {"loader": "dali", "dali_part": -1},
        {"loader": "dali", "hw_decoder_load": 1.01},
        {"hw_decoder_load": 1.0},
        {"dali_part": 64},
        {"seed": -1},
        {"blr": -1.0},
        {"blr": float("nan")},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"weight_decay": -0.1},
        {"betas": (0.9, 1.0)},
        {"clip_grad": -1.0},
        {"lambda_m": float("nan")},
        {"lambda_m": float("inf")},
        {"epsilon": float("inf")},
        {"depth": -1},
        {"patch_size": -16},
        {"warmup_epochs": float("nan")},
        {"decoder_heads": 0},
        {"decoder_depth": 0},
        {"decoder_width": 0},
        {"heads": -3},
        {"width": -192},
        {"save_every": float("inf")},
        {"labelling_momentum": (float("nan"), 1.0)},
        {"drop_path": float("nan")},
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"\w+ \w+"):
        check(PRESETS["paper"].using(**settings))


def test_every_name_is_there_once() -> None:
    hints = get_type_hints(Config)
    names = [leaf.name for kind in hints.values() for leaf in dataclasses.fields(kind)]
    assert len(names) == len(set(names))
    assert list(PRESETS["paper"].flat()) == names


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["paper"].optimizer.epochs = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_using_changes_a_copy() -> None:
    config = PRESETS["paper"].using(epochs=100, seed=1, beton=Path("a.beton"), labelling_momentum=(0.9, 1.0))
    assert (config.optimizer.epochs, config.run.seed, config.data.beton) == (100, 1, Path("a.beton"))
    assert config.teacher.labelling_momentum == (0.9, 1.0)
    assert PRESETS["paper"].optimizer.epochs == 300
    changed = {name for name, value in config.flat().items() if value != PRESETS["paper"].flat()[name]}
    assert changed == {"epochs", "seed", "beton", "labelling_momentum"}
    with pytest.raises(UserError, match="epoch_count"):
        config.using(epoch_count=3)


def test_using_converts_what_loses_nothing() -> None:
    """What reading a checkpoint would refuse is refused before anything is trained, and what it would take is taken."""
    settings: dict[str, Any] = {"epochs": 1.0, "batch_size": np.int64(16), "blr": 1, "out": "runs/x",
                                "seed": np.uint8(3), "simple_scale": [0.3, 1], "resume": Path("runs/x"),
                                "steps": None}  # fmt: skip
    config = PRESETS["demo"].using(**settings)
    plain = PRESETS["demo"].using(
        epochs=1,
        batch_size=16,
        blr=1.0,
        out=Path("runs/x"),
        seed=3,
        simple_scale=(0.3, 1.0),
        resume="runs/x",
        steps=None,
    )
    assert config == plain
    kinds = [type(value_of(config, name)) for name in settings]
    assert kinds == [type(value_of(plain, name)) for name in settings]
    assert config_from(json.loads(json.dumps(config.groups())), "it") == config
    assert Optimizer(epochs=2.0) == Optimizer(epochs=2)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precision": "bfloat16"}, "precision is 'bfloat16'; expected 'auto' or 'fp32' or 'bf16'"),
        ({"device": "cuda:1"}, "device is 'cuda:1'; expected 'auto' or 'cpu' or 'cuda' .*CUDA_VISIBLE_DEVICES=1"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"compile": False}, r"compile is False; expected 'auto' or 'on' or 'off' \(False is 'off'\)"),
        ({"compile": True}, r"\(True is 'on'\)"),
        ({"page_order": True}, "page_order is True"),
        ({"tensorboard": 0}, "tensorboard is 0; expected True or False"),
        ({"eval_every": False}, "eval_every is False; expected a whole number"),
        ({"epochs": 1.5}, r"epochs is 1\.5; expected a whole number"),
        ({"epochs": "2"}, "epochs is '2'; expected a whole number"),
        ({"blr": "1e-3"}, "blr is '1e-3'; expected a number"),
        ({"betas": 0.9}, r"betas is 0\.9; expected 2 values"),
        ({"resume": True}, "resume is True; expected a text or None"),
        ({"beton": 3}, "beton is 3; expected a path or several values, each a text or None"),
        ({"model": None}, "model is None; expected a text"),
        *(({name: "hdfs://bucket/run"}, "hdfs://bucket/run: hdfs:// is not supported")
          for name in ("beton", "out", "upload", "init", "resume", "eval_train", "eval_val")),
        ({"out": Path("s3://key:word@bucket/run")}, "holds no credentials"),
        ({"cache_size": "much"}, "a cache's size is 'much'"),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_another_kind_is_refused_when_it_is_set(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PRESETS["demo"].using(**settings)


@pytest.mark.parametrize("change", [{"epochs": "2"}, {"compile": False}])
def test_nor_is_it_taken_by_another_way(change: dict[str, Any]) -> None:
    group = Optimizer if "epochs" in change else Efficiency
    with pytest.raises(UserError, match=f"{next(iter(change))} is "):
        group(**change)
    with pytest.raises(UserError, match=f"{next(iter(change))} is "):
        dataclasses.replace(group(), **change)
    with pytest.raises(UserError, match="optimizer is "):
        Config(optimizer=change)  # pyright: ignore[reportArgumentType]


def test_a_course_is_checked_as_settings_are() -> None:
    assert dataclasses.replace(FINETUNE_PRESETS["small"], epochs=30.0, scale=[0.5, 1]) == dataclasses.replace(
        FINETUNE_PRESETS["small"], epochs=30, scale=(0.5, 1.0)
    )
    for name, value in (("epochs", "3"), ("pool", True), ("blr", "fast"), ("opt", "adam"), ("betas", (0.9,))):
        with pytest.raises(UserError, match=f"{name} is "):
            dataclasses.replace(FINETUNE_PRESETS["small"], **{name: value})


@pytest.mark.parametrize("words", [["--out", "hf://b/run"], ["--out=hf://b/run"], ["--resume", "hf://b/run"],
                                   ["--config", "hf://b/c.json"], ["--beton", "hf://b/x.beton"],
                                   ["--init", "hf://b/w.pth"]])  # fmt: skip
def test_addresses_on_the_command_line(words: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^\w+://b/\S+: \w+:// is not supported"):
        read_command(words)
    assert list(tmp_path.iterdir()) == []


def test_what_may_lie_in_a_store_may_be_an_address(tmp_path: Path) -> None:
    config = read_command(["--beton", "s3://b/set/", "--out", "gs://b/run", "--cache", str(tmp_path)])
    assert (config.data.beton, config.run.out, config.run.upload) == (("s3://b/set",), None, "gs://b/run")
    assert folder_of(config).parent == tmp_path / "runs"
    assert config.using(out=tmp_path).run.upload == "gs://b/run"
    several = PRESETS["demo"].using(beton=("s3://b/set:0.5", "here.beton:0.5")).data.beton
    assert several == ("s3://b/set:0.5", "here.beton:0.5")
    assert config_from(config.groups(), "a file") == config


@pytest.mark.parametrize("wrong", [None, {"epochs": 1}, "demo"])
@pytest.mark.untyped
def test_only_a_config_is_trained_by(wrong: Any) -> None:
    with pytest.raises(UserError, match="pretrain takes a Config"):
        pretrain(wrong)


PAPERS_PEAK = 2.666e-4 * 768 / 256


def test_a_peak_rate_takes_the_place_of_the_base_rate_and_the_reverse() -> None:
    """MAE's `--lr` is the rate itself: a value from its scripts means the same here, whatever the batch size."""
    paper = PRESETS["paper"]
    assert (paper.optimizer.lr, paper.optimizer.peak_lr) == (None, PAPERS_PEAK)
    absolute = paper.using(lr=1e-3)
    assert (absolute.optimizer.blr, absolute.optimizer.peak_lr) == (None, 1e-3)
    assert absolute.using(batch_size=64).optimizer.peak_lr == 1e-3
    back = absolute.using(blr=1e-3)
    assert (back.optimizer.lr, back.optimizer.peak_lr) == (None, 3e-3)
    assert absolute.using(lr=None, blr=2.666e-4) == paper == paper.using(lr=None)
    for name, config in PRESETS.items():
        assert config.optimizer.lr is None, name
    tuned = FINETUNE_PRESETS["paper"].using(lr=1e-3)
    assert (tuned.blr, tuned.peak_lr, tuned.using(batch_size=64).peak_lr) == (None, 1e-3, 1e-3)
    assert tuned.using(blr=5e-4) == FINETUNE_PRESETS["paper"]
    assert tuned.fitted(100).peak_lr == 1e-3


def test_both_rates_or_none_are_refused() -> None:
    both, none = r"--blr 0\.001 and --lr 0\.002 are both set", "no learning rate is set"
    for base in (PRESETS["paper"], PRESETS["paper"].using(lr=1.0), FINETUNE_PRESETS["paper"]):
        with pytest.raises(UserError, match=both):
            base.using(blr=1e-3, lr=2e-3)
        with pytest.raises(UserError, match=none):
            base.using(blr=None, lr=None)
    for kind in (Optimizer, FinetuneConfig):
        with pytest.raises(UserError, match=both):
            kind(blr=1e-3, lr=2e-3)
        with pytest.raises(UserError, match=none):
            kind(blr=None)
    with pytest.raises(UserError, match=r"--lr 0\.0 must be above 0"):
        PROBE.using(lr=0.0)


@pytest.mark.parametrize(
    ("words", "blr", "lr"),
    [
        ([], 2.666e-4, None),
        (["--lr", "1e-3"], None, 1e-3),
        (["--lr=1e-3", "--batch-size", "64"], None, 1e-3),
        (["--blr", "1e-3"], 1e-3, None),
        (["--preset", "mae", "--lr", "0"], None, 0.0),
        (["--config", "recorded.json"], None, 0.5),
        (["--config", "recorded.json", "--blr", "1e-3"], 1e-3, None),
        (["--config", "recorded.json", "--lr", "1e-3"], None, 1e-3),
    ],
)
def test_rates_on_the_command_line(words: list[str], blr: Any, lr: Any, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(PRESETS["demo"].using(lr=0.5), Path("recorded.json"))
    optimizer = read_command(words).optimizer
    assert (optimizer.blr, optimizer.lr) == (blr, lr)


@pytest.mark.parametrize("words", [["--lr", "1e-3", "--blr", "1e-3"], ["--blr=1", "--preset", "mae", "--lr=1"]])
def test_both_rates_on_the_command_line(words: list[str]) -> None:
    with pytest.raises(UserError, match="are both set"):
        read_command(words)
    images = ["--train", "t.beton"]
    for kind in ("finetune", "probe"):
        with pytest.raises(UserError, match="are both set"):
            read_evaluation([kind, "weights", *images, *[word for word in words if word not in ("--preset", "mae")]])
        for flag in ("--lr", "--blr"):
            command = read_evaluation([kind, "weights", *images, flag, "0.5", "--batch-size", "512"])
            assert isinstance(command, Probe | Finetune)
            assert command.config.peak_lr == (0.5 if flag == "--lr" else 1.0)


def test_rates_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for config in (PRESETS["mae"].using(lr=1e-3), PRESETS["mae"].using(blr=1e-3)):
        write_config(config, path)
        assert read_config(path) == config
    path.write_text('{"run": {"preset": "mae"}, "optimizer": {"blr": null, "lr": 0.5}}')
    assert read_config(path) == PRESETS["mae"].using(lr=0.5)
    path.write_text('{"optimizer": {"blr": 0.1, "lr": 0.5}}')
    with pytest.raises(UserError, match=r"c\.json sets optimizer\.blr and optimizer\.lr: leave one out"):
        read_config(path)
    # Alone it may be of an earlier version, whose lr was the rate for 256 images.
    for text in ('{"optimizer": {"lr": 0.5}}', '{"optimiser": {"lr": 0.5}}', '{"optimizer": {"lr": 1, "epochs": 3}}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"c\.json names .*lr, the rate for 256 images, is now blr"):
            read_config(path)
    path.write_text('{"optimizer": {"lr": null}}')
    assert read_config(path) == Config()


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"blr": 1e-3}, {"blr": 1e-3}, []),
        ({"blr": 1e-3}, {"lr": 3e-3}, []),
        ({"lr": 3e-3}, {"blr": 1e-3}, []),
        ({"blr": 1e-3}, {"blr": 2e-3}, ["--blr was 0.001 and is now 0.002"]),
        ({"lr": 1e-3}, {"lr": 2e-3}, ["--lr was 0.001 and is now 0.002"]),
        ({"blr": 1.0}, {"lr": 1.0}, ["the peak learning rate was 3.0 and is now 1.0"]),
        ({"lr": 1.0}, {"blr": 1.0}, ["the peak learning rate was 1.0 and is now 3.0"]),
        # the batch size is a difference of its own
        ({"blr": 1e-3}, {"blr": 1e-3, "batch_size": 64}, []),
        ({"lr": 1e-3}, {"lr": 1e-3, "batch_size": 64}, []),
    ],
)
def test_a_resumed_run_compares_the_peak_rate(before: dict[str, Any], now: dict[str, Any], said: list[str]) -> None:
    paper = PRESETS["paper"]
    assert rate_changes(paper.using(**before).flat(), paper.using(**now).flat()) == said
    tuned = FinetuneConfig(batch_size=768)
    found = tuned.using(**now).differences(json.loads(json.dumps(dataclasses.asdict(tuned.using(**before)))))
    assert [phrase for phrase in found if "batch" not in phrase] == said
    assert rate_changes({"blr": "x", "lr": [], "batch_size": None}, paper.flat()) == [
        "--blr was x and is now 0.0002666"
    ]
    assert rate_changes({}, paper.flat()) == [f"the peak learning rate was None and is now {PAPERS_PEAK}"]


def test_a_preset_by_name() -> None:
    assert preset("sdae") is PRESETS["sdae"]
    with pytest.raises(UserError, match="paper-800"):
        preset("papre")


@pytest.mark.parametrize("name", WARMUP)
def test_settings_come_back_from_their_file(name: str, tmp_path: Path) -> None:
    config = PRESETS[name].using(beton=tmp_path / "a.beton", out=tmp_path, steps=7, warmup_epochs=1.5, seed=2**62)
    write_config(config, tmp_path / "config.json")
    assert read_config(tmp_path / "config.json") == config
    write_config(PRESETS[name], tmp_path / "config.json")
    assert read_config(tmp_path / "config.json") == PRESETS[name]


def test_a_file_may_name_a_preset_and_a_few_settings(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"run": {"preset": "sdae"}, "optimizer": {"epochs": 5, "blr": 1}}')
    assert read_config(tmp_path / "c.json") == PRESETS["sdae"].using(epochs=5, blr=1.0)
    (tmp_path / "c.json").write_text("{}")
    assert read_config(tmp_path / "c.json") == Config()


def test_what_a_run_has_recorded_is_not_completed_from_todays_preset(tmp_path: Path) -> None:
    """What an earlier version wrote lacks the settings that came later, which its preset may have by now."""
    groups = PRESETS["demo"].groups()
    del groups["optimizer"]["pixel_epochs"], groups["optimizer"]["decay_tokens"]
    expected = PRESETS["demo"].using(pixel_epochs=0.0, decay_tokens=False)
    assert settings_in({"config": groups}, tmp_path) == expected
    # and a preset that is gone is a name
    groups["run"]["preset"] = "gone"
    assert settings_in({"config": groups}, tmp_path) == expected.using(preset="gone")
    (tmp_path / "c.json").write_text(json.dumps(groups))
    assert read_config(tmp_path / "c.json", recorded=True) == expected.using(preset="gone")
    with pytest.raises(UserError, match="there is no preset 'gone'"):
        read_config(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("optimizer", "epochs", "ten"),
        ("optimizer", "epochs", 1.5),
        ("optimizer", "epochs", True),
        ("optimizer", "epochs", None),
        ("optimizer", "blr", "1e-3"),
        ("optimizer", "blr", [1e-3]),
        ("optimizer", "betas", [0.9]),
        ("optimizer", "betas", [0.9, 0.95, 0.99]),
        ("optimizer", "betas", 0.9),
        ("optimizer", "betas", ["0.9", "0.95"]),
        ("optimizer", "warmup_epochs", "1"),
        ("teacher", "teachers", "triple"),
        ("teacher", "teachers", 1),
        ("teacher", "teachers", ["dual"]),
        ("network", "decoder_class_token", 1),
        ("network", "decoder_class_token", None),
        ("optimizer", "decay_tokens", 1),
        ("data", "beton", 3),
        ("run", "preset", "papre"),
        ("run", "preset", 3),
        ("run", "steps", 1.0),
        ("run", "name", None),
        ("optimizer", "epoch", 3),
        ("optimiser", "epochs", 3),
        ("run", "epochs", 3),
    ],
)
def test_a_setting_of_the_wrong_kind_is_named(group: str, name: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({group: {name: value}}))
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert group in str(caught.value) or str(value) in str(caught.value)


def test_a_decoder_without_the_class_token_is_refused_and_one_with_it_is_the_only_one(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{"run": {"preset": "sdae"}, "network": {"decoder_class_token": true}}')
    assert read_config(path) == PRESETS["sdae"]
    path.write_text('{"network": {"decoder_class_token": false}}')
    with pytest.raises(
        UserError, match=r"settings\.json asks for a decoder without the class token \(network\.decoder_"
    ):
        read_config(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"run": 3}', '{"run": null}', '{"run": []}', "\x00"])
def test_a_file_of_something_else_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(UserError, match="settings"):
        read_config(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError, match=path.name):
            read_config(path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="binary"):
        read_config(tmp_path / "binary.json")
