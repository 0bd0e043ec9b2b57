"""Sizes of the views over a run: smaller ones first, in one run that is the same whenever it is stopped."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastpmae import Config, UserError, load_encoder, pretrain
from fastpmae.distributed.ranks import Ranks
from fastpmae.model.build import check, make_student
from fastpmae.model.patches import positions_on, sincos_positions
from fastpmae.model.phases import phases_of, resolutions_in
from fastpmae.model.resolutions import Resolution, at_size, canonical, describe_resolution, resolutions_of
from fastpmae.pretraining import online_evaluation
from fastpmae.pretraining.data import make_loader
from fastpmae.run.checkpoint import checkpoint_path, read_checkpoint
from fastpmae.run.images import open_images
from fastpmae_loaders import Batch
from tests.test_train import assert_same_run, called, flags_of, rows_of

STEPS = 5
"""Of an epoch of the small images."""


def spans(config: Config) -> list[tuple[int, int, int]]:
    return [(each.size, each.first_epoch, each.last_epoch) for each in resolutions_of(config)]


def test_a_run_without_the_setting_has_one_size():
    assert spans(Config()) == [(224, 0, 300)]
    assert canonical(Config()) == ()
    (phase,) = phases_of(Config())
    assert phase.config is not None
    assert resolutions_in(phase, Config()) == (Resolution(224, 0, 300),)


@pytest.mark.parametrize(
    ("given", "epochs", "expected"),
    [
        (("128:0.5", "224"), 300, [(128, 0, 150), (224, 150, 300)]),
        (("128:0.3", "160:0.3", "224"), 10, [(128, 0, 3), (160, 3, 6), (224, 6, 10)]),
        (("128:0.3", "160:0.3", "224"), 100, [(128, 0, 30), (160, 30, 60), (224, 60, 100)]),
        (("128:.26", "224"), 10, [(128, 0, 3), (224, 3, 10)]),
        (("224",), 10, [(224, 0, 10)]),
        (("224:0.2", "192:0.4", "224"), 10, [(224, 0, 2), (192, 2, 6), (224, 6, 10)]),
    ],
)
def test_sizes_take_whole_epochs_by_their_shares(given: tuple[str, ...], epochs: int, expected: list[Any]):
    config = Config().using(progressive_resolution=given, epochs=epochs)
    check(config)
    assert spans(config) == expected


def test_when_a_size_is_shown_is_said():
    assert describe_resolution(Resolution(128, 0, 3)) == "epochs 1 to 3: views of 128 pixels"
    assert describe_resolution(Resolution(160, 3, 4)) == "epoch 4: views of 160 pixels"


def test_a_share_has_one_form():
    config = Config().using(progressive_resolution=("128:.50", "224"))
    assert canonical(config) == ("128:0.5", "224")
    for share in ("0.016666666666666666", "1.6666666666666667e-2", ".3", "1e-1"):
        given = config.using(progressive_resolution=(f"128:{share}", "224"))
        again = given.using(progressive_resolution=canonical(given))
        assert canonical(again) == canonical(given) == (f"128:{float(share)!r}", "224")
    small = config.using(progressive_resolution=("128:0.00001", "224"), epochs=1_000_000)
    again = small.using(progressive_resolution=canonical(small))
    assert spans(again) == spans(small) == [(128, 0, 10), (224, 10, 1_000_000)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("128", "224"), "128 needs a share of the epochs"),
        (("128:0.5",), "the last size takes what is left"),
        (("128:0.5", "224:0.5"), "the last size takes what is left"),
        (("128:0.5", "256"), "the last size must be --image-size, which is 224"),
        (("130:0.5", "224"), "130 is no multiple of the patches' 16 pixels"),
        (("8:0.5", "224"), "8 is no multiple"),
        (("16:0.5", "224"), "16 pixels are too few"),
        (("224:0.5", "224"), "each size must be another than the one before it"),
        (("128:0.2", "128:0.2", "224"), "each size must be another than the one before it"),
        (("256:0.2", "224"), "at most the last one's 224"),
        (("128:1", "224"), "shares of the epochs must be above 0"),
        (("128:0", "224"), "shares of the epochs must be above 0"),
        (("96:0.5", "128:0.5", "224"), "shares of the epochs must be above 0"),
        (("128:nan", "224"), "128:nan is neither SIZE:SHARE nor a last SIZE"),
        (("128:-0.5", "224"), "is neither"),
        (("a\x1b[2J", "224"), "is neither"),
        (("128:0.5:1", "224"), "is neither"),
        (("٣:0.5", "224"), "is neither"),
        (("99999:0.5", "224"), "is neither"),
        (("",), "'' is neither"),
        (("128:0.5 224",), "128:0.5 224 is one word: leave out the quotes"),
        (("128:0.5", "128:0." + 60 * "5", "224"), "is neither"),
        (("112:0.5", "224"), "no 3 equal folds (--folds); of the sizes below 224 these do: 32, 64, 96, 128, 160, 192"),
        (("128:0.001", "224"), "of 300 (--epochs) no epoch is left for 128 pixels"),
        (("128:0.999", "224"), "of 300 (--epochs) no epoch is left for 224 pixels"),
    ],
)
def test_what_makes_no_sizes_gets_a_sentence(given: tuple[str, ...], words: str):
    with pytest.raises(UserError) as refused:
        check(Config().using(progressive_resolution=given))
    sentence = str(refused.value)
    assert sentence.startswith("--progressive-resolution ")
    assert words in sentence
    assert "\n" not in sentence
    assert sentence.isprintable()


def test_folds_are_asked_for_where_there_are_any():
    half = ("112:0.5", "224")
    check(Config().using(progressive_resolution=half, teachers="none", target="pixels", lambda_c=0.0, lambda_p=0.0))
    check(Config().using(progressive_resolution=half, folds=5))  # uneven at 224 as well


@pytest.mark.slow
def test_the_command_ends_with_the_sentence_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--progressive-resolution", "128", "224", "--out", str(tmp_path / "run")]
    assert called("--beton", str(tmp_path / "x.beton"), *flags) == 2
    output = capsys.readouterr().err
    assert "--progressive-resolution 128 224: 128 needs a share" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_sizes_are_shared_out_over_phases():
    config = Config().using(epochs=10, pixel_epochs=6, progressive_resolution=("128:0.4", "160:0.3", "224"))
    check(config)
    pixels, tokens = phases_of(config)
    assert resolutions_in(pixels, config) == (Resolution(128, 0, 4), Resolution(160, 4, 6))
    assert resolutions_in(tokens, config) == (Resolution(160, 6, 7), Resolution(224, 7, 10))
    for phase in (pixels, tokens):  # the networks are those of the last size
        assert (phase.config.views.image_size, phase.config.views.progressive_resolution) == (224, ())


def test_positions_of_a_smaller_grid_lie_within_the_larger():
    """Each of four patches is at the mean place of the patches it covers, as sine and cosine of that place."""
    dim, table = 16, torch.cat([torch.zeros(1, 16), sincos_positions(4, 4, 16)])[None]
    small = positions_on(table, 2)
    assert torch.equal(small[:, 0], table[:, 0])
    frequency = 10000.0 ** -(np.arange(dim // 4) / (dim // 4))
    for row, y in enumerate((0.5, 2.5)):
        for column, x in enumerate((0.5, 2.5)):
            parts = [np.sin(x * frequency), np.cos(x * frequency), np.sin(y * frequency), np.cos(y * frequency)]
            expected = torch.from_numpy(np.concatenate(parts)).float()
            torch.testing.assert_close(small[0, 1 + 2 * row + column], expected, rtol=0, atol=1e-6)


def test_positions_of_the_own_grid_are_what_they_were():
    table = torch.randn(1, 17, 8)
    assert positions_on(table, 4) is table
    places = torch.arange(4, dtype=torch.float64)
    frequency = 10000.0 ** -(torch.arange(2, dtype=torch.float64) / 2)
    angle = places[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1).float()
    rows = sincos_positions(4, 4, 8).view(4, 4, 8)
    assert torch.equal(rows[2, :, :4], axis)
    assert torch.equal(rows[:, 1, 4:], axis)


def test_what_is_no_sine_or_cosine_is_interpolated_and_follows_by_the_same_average():
    """A teacher's positions that came half of the way to the student's have done so at every size."""
    generator = torch.Generator().manual_seed(0)
    fixed = torch.cat([torch.zeros(1, 8), sincos_positions(6, 6, 8)])[None]
    drawn = torch.randn(1, 37, 8, generator=generator)
    halfway = positions_on(torch.lerp(drawn, fixed, 0.5), 4)
    torch.testing.assert_close(halfway, torch.lerp(positions_on(drawn, 4), positions_on(fixed, 4), 0.5))
    even = fixed + 0.25  # what is the same everywhere stays so
    torch.testing.assert_close(positions_on(even, 4)[:, 1:], positions_on(fixed, 4)[:, 1:] + 0.25)


@pytest.fixture
def growing(tiny: Config) -> Config:
    """Two epochs at 16 pixels, two at 24 and two at 32; rows off the grid of sizes."""
    return tiny.using(
        progressive_resolution=("16:0.34", "24:0.33", "32"), epochs=6, patch_size=4, folds=3, log_every=4,
        warmup_epochs=1.0, teacher_init="random",
    )  # fmt: skip


def batches_of(config: Config, rank: int = 0, ranks: int = 1, **settings: Any) -> list[Batch]:
    """An epoch of a rank's loader."""
    config = config.using(augment_on="cpu", page_order="off", **settings)
    with make_loader(open_images(config), config, Ranks(rank, ranks, ranks, torch.device("cpu"), None)) as loader:
        loader.set_epoch(3)
        return list(loader)


@pytest.mark.slow
def test_images_and_crops_are_the_same_at_every_size(growing: Config):
    """And of one size the same bits by any number of threads and ranks, and by either engine."""
    of_size = {each.size: at_size(growing, each) for each in resolutions_of(growing)}
    batches = {size: batches_of(config) for size, config in of_size.items()}
    for size, (first, *_) in batches.items():
        side = size // 4
        assert first.simple.shape == first.complex.shape == (8, 3, size, size)
        assert sorted(torch.cat([first.visible, first.folds], 1)[0].tolist()) == list(range(side * side))
        assert first.visible.shape == (8, side * side // 4)  # the ratio stays
        assert first.fold_sizes == (side * side // 4,) * 3
    for one, *others in zip(*batches.values(), strict=True):
        for other in others:
            for name in ("index", "boxes", "flips", "factors", "choices", "label"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
    ways: list[dict[str, Any]] = [{"workers": 3}, {"loader": "torch"}]
    for way in ways:
        for one, other in zip(batches[24], batches_of(of_size[24], **way), strict=True):
            assert torch.equal(one.simple, other.simple)
            assert torch.equal(one.complex, other.complex)
            assert torch.equal(one.folds, other.folds)
    for one, *parts in zip(batches[24], *(batches_of(of_size[24], rank, 2) for rank in (0, 1)), strict=True):
        assert torch.equal(one.simple, torch.cat([part.simple for part in parts]))
        assert torch.equal(one.folds, torch.cat([part.folds for part in parts]))


@pytest.mark.slow
def test_sizes_change_in_one_run(growing: Config):
    run = pretrain(growing)
    rows = rows_of(run)
    assert [(row["step"], row["image_size"]) for row in rows] == [
        (4, 16), (8, 16), (10, 16), (12, 24), (16, 24), (20, 24), (24, 32), (28, 32), (30, 32)
    ]  # fmt: skip
    assert all(np.isfinite(row["loss"]) and "class_divergence" in row for row in rows)
    told = (run / "train.log").read_text().splitlines()
    for sentence in ("epochs 1 to 2: views of 16", "epochs 3 to 4: views of 24", "epochs 5 to 6: views of 32"):
        assert sum(line.startswith(sentence) for line in told) == 1
    # schedules as in a run without
    assert rows[3]["lr"] == pytest.approx(_rates(growing)[11])
    assert rows[-1]["lr"] == pytest.approx(_rates(growing)[29])
    # networks are those of the last size at any step
    encoder, config = load_encoder(run)
    assert config.views.image_size == 32
    assert encoder.pos_embed.shape == (1, 65, 32)


def _rates(config: Config) -> list[float]:
    from fastpmae.pretraining.optimizer import learning_rate

    return [learning_rate(config, step, STEPS) for step in range(6 * STEPS)]


@pytest.mark.slow
def test_a_stop_at_any_size_changes_nothing(growing: Config, tmp_path: Path):
    """Within the first size; just before and after a change; at each change and within the last."""
    whole = pretrain(growing)
    for number, stops in enumerate([(3,), (9, 11), (10, 20, 27)]):
        part = growing.using(out=tmp_path / f"part-{number}", resume="auto")
        for stop in stops:
            pretrain(part.using(steps=stop))
        assert_same_run(whole, pretrain(part), 30)


@pytest.mark.slow
def test_with_phases_too(growing: Config, tmp_path: Path):
    """A size that changes within a phase, and one that two phases share."""
    phased = growing.using(pixel_epochs=3, teacher_init="copy", out=tmp_path / "whole")
    whole = pretrain(phased)
    assert [(row["step"], row["phase"], row["image_size"]) for row in rows_of(whole)] == [
        (4, 1, 16), (8, 1, 16), (10, 1, 16), (12, 1, 24), (15, 1, 24),
        (16, 2, 24), (20, 2, 24), (24, 2, 32), (28, 2, 32), (30, 2, 32),
    ]  # fmt: skip
    for number, stops in enumerate([(10, 15), (14, 16)]):
        part = phased.using(out=tmp_path / f"part-{number}", resume="auto")
        for stop in stops:
            pretrain(part.using(steps=stop))
        assert_same_run(whole, pretrain(part), 30)


@pytest.mark.slow
def test_the_first_size_alone_is_a_run_on_smaller_images(growing: Config, tmp_path: Path):
    """Losses of a first size are those of networks of that size whose positions lie in the larger grid."""
    given = growing.using(teacher_init="copy", epochs=6)
    rows = rows_of(pretrain(given.using(steps=4)))
    small = given.using(progressive_resolution=(), image_size=16, steps=4, out=tmp_path / "small")
    other = rows_of(pretrain(small))
    # the same images, crops and first weights: only positions differ, by their scale
    assert rows[0]["lr"] == other[0]["lr"]
    assert rows[0]["loss"] == pytest.approx(other[0]["loss"], rel=0.2)
    assert rows[0]["loss"] != other[0]["loss"]


@pytest.mark.slow
def test_other_sizes_are_another_run(growing: Config):
    pretrain(growing.using(steps=1))
    check_same = growing.using(resume="auto", steps=2, progressive_resolution=("16:0.340", "24:.33", "32"))
    pretrain(check_same)
    with pytest.raises(UserError, match=r"--progressive-resolution was \['16:0.34', '24:0.33', '32'\] and is now"):
        pretrain(growing.using(resume="auto", progressive_resolution=("16:0.5", "32")))


@pytest.mark.slow
def test_evaluations_are_of_the_last_size(growing: Config, monkeypatch: pytest.MonkeyPatch):
    """What is evaluated in the epochs of 16 pixels is what the weights are worth at 32."""
    seen: list[int] = []
    over_images = online_evaluation.over_images

    def looked_at(*arguments: Any, **named: Any) -> Any:
        seen.append(named["image_size"])
        return over_images(*arguments, **named)

    monkeypatch.setattr(online_evaluation, "over_images", looked_at)
    run = pretrain(growing.using(eval_every=1, steps=STEPS, log_every=STEPS))
    assert [row["step"] for row in rows_of(run) if "knn_student" in row] == [STEPS]
    assert seen == [32]


@pytest.mark.slow
def test_flags_and_a_runs_settings(growing: Config):
    assert called(*flags_of(growing.using(steps=1))) == 0
    assert growing.run.out is not None
    settings = json.loads((growing.run.out / "config.json").read_text())
    assert settings["views"]["progressive_resolution"] == ["16:0.34", "24:0.33", "32"]
    assert "16 px  loss" in (growing.run.out / "train.log").read_text()
    checkpoint = read_checkpoint(checkpoint_path(growing.run.out, 1))
    assert checkpoint.config.views.progressive_resolution == ("16:0.34", "24:0.33", "32")
    student = make_student(checkpoint.phase.config, torch.Generator())
    assert student.encoder.pos_embed.shape == checkpoint.tensors["student.encoder.pos_embed"].shape
