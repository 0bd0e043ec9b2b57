"""Runs of two phases: pixels first, then teachers, in one run that is the same whenever it is stopped."""

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpmae import Config, UserError, embed_images, load_encoder, pretrain
from fastpmae.config_file import read_config
from fastpmae.distributed.ranks import Ranks
from fastpmae.export.network import read_export
from fastpmae.model.build import check, check_label_schedules
from fastpmae.model.phases import Phase, describe_phase, phase_after, phases_of
from fastpmae.pictures.analysis import analyse, prototype_use
from fastpmae.pictures.report import write_report
from fastpmae.pretraining.data import Prefetcher, make_loader
from fastpmae.pretraining.networks import make_networks
from fastpmae.pretraining.optimizer import learning_rate, make_optimizer
from fastpmae.pretraining.step import student_loss, teacher_forward
from fastpmae.pretraining.train_step import Training, train_step
from fastpmae.run.checkpoint import checkpoint_path, collect_state, read_checkpoint
from fastpmae.run.images import open_images
from tests.made import tiny_settings
from tests.test_train import assert_same_run, rows_of

PIXELS = {"teachers": "none", "target": "pixels", "lambda_c": 0.0, "lambda_p": 0.0, "drop_path": 0.0}


def test_a_run_without_pixel_epochs_is_one_phase():
    config = Config().using(epochs=10)
    (phase,) = phases_of(config)
    assert (phase.config, phase.first_epoch, phase.last_epoch, phase.number) == (config, 0, 10, None)


@pytest.mark.parametrize("given", [15, 0.6])
def test_phases_share_the_epochs_and_the_schedule(given: float):
    config = Config().using(epochs=25, warmup_epochs=5.0, drop_path=0.2, pixel_epochs=given)
    pixels, tokens = phases_of(config)
    assert (pixels.first_epoch, pixels.last_epoch, pixels.number) == (0, 15, 1)
    assert (tokens.first_epoch, tokens.last_epoch, tokens.number) == (15, 25, 2)
    assert pixels.config == config.using(pixel_epochs=0.0, epochs=15, warmup_epochs=3.0, **PIXELS)
    assert tokens.config == config.using(pixel_epochs=0.0, epochs=10, warmup_epochs=2.0)
    for phase in (pixels, tokens):
        check(phase.config)
        rates = [learning_rate(phase.config, step, 10) for step in range(10 * phase.config.optimizer.epochs)]
        assert rates[0] == 0
        assert max(rates) == pytest.approx(config.optimizer.peak_lr)
        assert rates[-1] < 0.01 * config.optimizer.peak_lr
    assert "epochs 1 to 15" in describe_phase(pixels)
    assert "epochs 16 to 25" in describe_phase(tokens)


def test_a_run_without_teachers_is_one_phase():
    config = Config().using(epochs=10, pixel_epochs=5, **PIXELS)
    check(config)
    assert phases_of(config) == (Phase(None, config),)


def test_after_its_last_step_a_phases_networks_are_its_own():
    config = Config().using(epochs=5, pixel_epochs=2)
    numbers = [phase_after(config, step, 10).number for step in (0, 1, 20, 21, 50)]
    assert numbers == [1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"pixel_epochs": 2.5}, "--pixel-epochs 2.5: a whole number of epochs"),
        ({"pixel_epochs": 10}, "leaves less than an epoch"),
        ({"pixel_epochs": 11}, "leaves less than an epoch"),
        ({"pixel_epochs": -1}, "leaves less than an epoch"),
    ],
)
def test_phases_that_are_none_are_refused(settings: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        check(Config().using(epochs=10, **settings))


@pytest.mark.parametrize(
    ("share", "epochs", "first"), [(0.6, 25, 15), (0.01, 10, 1), (0.99, 10, 9), (0.6, 2, 1), (0.6, 1, 0)]
)
def test_a_share_leaves_an_epoch_on_either_side(share: float, epochs: int, first: int):
    config = Config().using(epochs=epochs, pixel_epochs=share)
    check(config)
    assert phases_of(config)[-1].first_epoch == first
    assert len(phases_of(config)) == (2 if first else 1)


TWO_PHASES: dict[str, Any] = {"epochs": 4, "pixel_epochs": 2, "log_every": 2, "warmup_epochs": 1.0}
"""Two epochs of pixels and two of teachers."""


@pytest.fixture
def phased(tiny: Config) -> Config:
    return tiny.using(**TWO_PHASES)


@pytest.fixture(scope="module")
def whole(small_beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped, with a checkpoint of each phase: read, and not changed."""
    out = tmp_path_factory.mktemp("phases") / "whole"
    return pretrain(tiny_settings(small_beton).using(**TWO_PHASES, keep=9, out=out))


@pytest.mark.slow
def test_each_phase_is_the_run_that_its_settings_make_alone(whole: Path, phased: Config, tmp_path: Path):
    rows = rows_of(whole)
    steps = max(int(row["step"]) for row in rows)
    half = steps // 2

    alone = pretrain(phased.using(**PIXELS, epochs=2, warmup_epochs=0.5, pixel_epochs=0, out=tmp_path / "alone"))
    assert [{k: v for k, v in row.items() if k != "phase"} for row in rows if row["step"] <= half] == rows_of(alone)
    first, last = (read_checkpoint(checkpoint_path(whole, step)) for step in (half, steps))
    assert first.phase.name == "pixels"
    assert last.phase.name == "tokens"
    theirs = read_checkpoint(checkpoint_path(alone, half)).tensors
    assert first.tensors.keys() == theirs.keys()
    assert all(torch.equal(first.tensors[name], theirs[name]) for name in theirs)

    assert all("loss_c" not in row for row in rows if row["step"] <= half)
    second = [row for row in rows if row["step"] > half]
    assert [row["phase"] for row in rows] == [1 if row["step"] <= half else 2 for row in rows]
    assert all(row["loss"] == row["loss"] and "class_divergence" in row for row in second)
    assert second[0]["labelling_momentum"] == pytest.approx(phased.teacher.labelling_momentum[0], abs=0.01)


@pytest.mark.slow
def test_the_first_phases_networks_are_gone_before_the_seconds_are_made(
    phased: Config, monkeypatch: pytest.MonkeyPatch
):
    students: list[weakref.ref] = []

    def made(*arguments: Any) -> Any:
        assert [student() for student in students] == [None] * len(students)
        networks = make_networks(*arguments)
        students.append(weakref.ref(networks[0]))
        return networks

    monkeypatch.setattr("fastpmae.train.make_networks", made)
    pretrain(phased)
    assert len(students) == 2


WITHOUT_LABELS = {"teachers": "reconstruction", "lambda_c": 0.0, "lambda_p": 0.0}


def test_the_log_says_how_the_teachers_begin():
    copied, random = (Config().using(epochs=4, pixel_epochs=2, teacher_init=init) for init in ("copy", "random"))
    assert describe_phase(phases_of(copied)[1]).endswith("which begin as the encoder is now")
    assert describe_phase(phases_of(random)[1]).endswith("which begin at random")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"freeze_prototypes": 4}, "--freeze-prototypes 4 leaves no epoch .* --epochs 10, 4 have labels, after 6 of"),
        ({"warmup_epsilon": 0.03, "warmup_epsilon_epochs": 5}, "-epochs 5 never reaches --epsilon: of --epochs 10, 4"),
        ({"freeze_prototypes": 10, "pixel_epochs": 0}, "of --epochs 10, 10 have labels$"),
        (WITHOUT_LABELS | {"class_epsilon": 0.025, "center_bottleneck": True},
         "--teachers reconstruction gives no pseudo labels: leave out --class-epsilon and --center-bottleneck"),
    ],
)  # fmt: skip
def test_label_schedules_are_held_against_the_epochs_with_labels(settings: dict[str, Any], sentence: str):
    config = Config().using(**{"epochs": 10, "pixel_epochs": 6} | settings)
    check(config)  # a run that was begun so before is read
    with pytest.raises(UserError, match=sentence):
        check_label_schedules(config)
    check_label_schedules(Config().using(epochs=10, pixel_epochs=6, freeze_prototypes=3))


@pytest.mark.slow
def test_a_run_does_not_begin_with_schedules_that_do_not_fit(phased: Config, tmp_path: Path):
    with pytest.raises(UserError, match="--freeze-prototypes 2 leaves no epoch"):
        pretrain(phased.using(freeze_prototypes=2, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(1,), (3, 5), "boundary", "before and after"])
def test_a_stop_in_any_phase_changes_nothing(whole: Path, phased: Config, tmp_path: Path, stops: Any):
    steps = max(int(row["step"]) for row in rows_of(whole))
    half = steps // 2
    stops = {"boundary": (half,), "before and after": (half - 1, half + 1)}.get(stops, stops)
    part = phased.using(out=tmp_path / "part", resume="auto")
    for stop in stops:
        pretrain(part.using(steps=stop))
    pretrain(part)
    assert_same_run(whole, tmp_path / "part", steps)


@pytest.mark.slow
def test_the_second_phase_by_hand(whole: Path):
    """New networks around the encoder of the first, epochs of images that go on, and schedules that begin anew."""
    settings, rows = read_config(whole / "config.json"), rows_of(whole)
    steps = max(int(row["step"]) for row in rows)
    half, ranks = steps // 2, Ranks(0, 1, 1, torch.device("cpu"), None)
    config = phases_of(settings)[1].config
    start = checkpoint_path(whole, half)
    student, teachers = make_networks(config, half, ranks.device, start)
    for name, tensor in student.encoder.state_dict().items():
        assert torch.equal(tensor, read_checkpoint(start).tensors[f"student.encoder.{name}"])
    training = Training(
        config, ranks, student, teachers, student, make_optimizer(student, config), teacher_forward, student_loss,
        torch.autocast("cpu", enabled=False),
    )  # fmt: skip
    with make_loader(open_images(config), config, ranks) as loader:
        prefetcher = Prefetcher(loader, config, ranks.device)
        for epoch in (0, 1):
            batches = prefetcher.epoch(2 + epoch, 0)
            for place in range(half // 2):
                step = epoch * half // 2 + place
                train_step(training, batches, step, epoch, learning_rate(config, step, half // 2), lambda: None)
            teachers.update_ema(student, "epoch", epoch)
    last = read_checkpoint(checkpoint_path(whole, steps))
    found = collect_state(student, teachers, training.optimizer)
    assert all(torch.equal(last.tensors[name], tensor) for name, tensor in found.items() if "rng" not in name)
    assert teachers.momenta(half - 1, 1).items() <= rows[-1].items()


@pytest.mark.slow
def test_every_reader_takes_a_checkpoint_of_either_phase(whole: Path, phased: Config, tmp_path: Path):
    steps = max(int(row["step"]) for row in rows_of(whole))
    images = open_images(phased)
    for step in (steps // 2, steps):
        path = checkpoint_path(whole, step)
        encoder, config = load_encoder(path)
        assert config == read_checkpoint(path).phase.config
        weights = read_checkpoint(path).part("student.encoder")
        assert all(torch.equal(tensor, weights[name]) for name, tensor in encoder.state_dict().items())
        assert len(embed_images(path, str(images.path))[0]) == len(images)
        assert read_export(path, "student").shape == read_export(whole, "student").shape
        assert (analyse(read_checkpoint(path), images, 2).match is None) == (step == steps // 2)
        pretrain(phased.using(init=path, out=tmp_path / f"from-{step}", steps=1))
    early = checkpoint_path(whole, steps // 2)
    learning_pixels = r"its run was still learning pixels without a teacher \(--pixel-epochs\)"
    with pytest.raises(UserError, match=f"holds no labelling_teacher: {learning_pixels}"):
        load_encoder(early, "labelling_teacher")
    with pytest.raises(UserError, match=f"holds no prototypes: {learning_pixels}"):
        prototype_use(read_checkpoint(early), images)


@pytest.mark.slow
def test_the_report_of_a_run_in_its_first_phase(phased: Config):
    run = pretrain(phased.using(steps=2))
    page = Path(write_report(run)).read_text(encoding="utf-8")
    assert "What was learnt of a few images" in page
    assert "Patches nearest" not in page


@pytest.mark.slow
def test_other_pixel_epochs_are_another_run(phased: Config):
    pretrain(phased.using(steps=1))
    with pytest.raises(UserError, match=r"--pixel-epochs was 2\.0 and is now 1\.0"):
        pretrain(phased.using(pixel_epochs=1, resume="auto"))


def test_settings_of_phases_are_those_of_the_run_but_for_what_differs():
    config = Config().using(epochs=10, pixel_epochs=3)
    pixels, tokens = phases_of(config)
    for phase in (pixels, tokens):
        for group in dataclasses.fields(config):
            if group.name not in ("optimizer", "teacher", "loss", "network"):
                assert getattr(phase.config, group.name) == getattr(config, group.name)
