"""What the trainer asks of its loader: the views that are looked at, colours where they are wanted."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastpmae import PRESETS, Config
from fastpmae.distributed.ranks import Ranks
from fastpmae.model.build import views_needed
from fastpmae.plan.plan import Plan, make_plan
from fastpmae.pretraining.data import batches_ahead, make_loader, shared_out
from fastpmae.run.folder import resolve
from fastpmae.train import pretrain
from fastpmae_loaders import Beton, DaliSettings, machine
from fastpmae_loaders.engines import runner
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.write.sets import write_set
from tests.made import write_tree


@pytest.mark.parametrize(
    ("preset", "changes", "count"),
    [
        ("paper", {}, 2),
        ("ablation", {}, 2),
        ("single-step", {}, 2),
        ("single-epoch", {}, 2),
        ("demo", {}, 2),
        ("mae", {}, 1),
        ("sdae", {}, 1),
        ("sdae", {"reconstruction_view": "complex"}, 2),
        ("paper", {"labelling_view": "simple"}, 1),
        ("paper", {"labelling_view": "simple", "reconstruction_view": "complex"}, 2),
    ],
)
def test_only_views_that_are_looked_at_are_made(preset: str, changes: dict[str, str], count: int) -> None:
    assert len(views_needed(PRESETS[preset].using(**changes))) == count


def losses(config: Config) -> list[float]:
    rows = (pretrain(config) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["mae", "sdae"])
def test_a_run_with_one_view(tiny: Config, preset: str) -> None:
    teachers, loss = PRESETS[preset].teacher, PRESETS[preset].loss
    config = tiny.using(teachers=teachers.teachers, target=loss.target, lambda_c=0.0, lambda_p=0.0, steps=3)
    assert len(views_needed(config)) == 1
    assert len(losses(config)) == 3


@pytest.mark.slow
def test_colours_on_the_device_train_alike(tiny: Config, tmp_path) -> None:
    """Within 2 of 255 the same views, so the first steps' losses are nearly the same."""
    here = losses(tiny.using(steps=3, out=tmp_path / "here"))
    there = losses(tiny.using(steps=3, out=tmp_path / "there", augment_on="device"))
    assert here == pytest.approx(there, rel=5e-3)


@pytest.mark.slow
def test_duplicates_of_a_set_are_no_part_of_an_epoch(tiny: Config, tmp_path: Path, capsys) -> None:
    """A run over the end of its epochs, alone and in a mixture; 15 images of which 4 are copies."""
    tree = write_tree(tmp_path / "tree", 11)
    for number in range(4):
        shutil.copy(tree / "class_1" / "0004.jpg", tree / "class_2" / f"again-{number}.jpg")
    write_set(tree, tmp_path / "set", 3, workers=1, deduplicate=True)
    config = tiny.using(beton=tmp_path / "set", batch_size=4, log_every=1, epochs=2, warmup_epochs=0.0)
    assert len(losses(config.using(out=tmp_path / "run"))) == 2 * (11 // 4)
    assert f"15 images, 4 of them duplicates that are left out in {tmp_path / 'set'}: 2 steps of 4" in one_line(capsys)
    write_set(tree, tmp_path / "whole", 1, workers=1)
    mixed = config.using(beton=(f"{tmp_path / 'set'}:1", f"{tmp_path / 'whole'}:1"), out=tmp_path / "mixed")
    assert len(losses(mixed)) == 2 * ((11 + 15) // 4)
    assert make_plan(Plan(config, loader_rate=100.0)).steps == 2 * (11 // 4)
    with pytest.raises(UserError, match="15 images, 4 of them duplicates that are left out, less than one batch of 12"):
        pretrain(config.using(batch_size=12, out=tmp_path / "none"))


def one_line(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("size", "ahead"), [(1, 64), (16, 32), (64, 8), (100, 6), (768, 2)])
def test_small_batches_are_made_further_ahead(size: int, ahead: int) -> None:
    assert batches_ahead(size, Config()) == ahead
    assert batches_ahead(size, Config().using(loader="dali")) == 2


def test_auto_is_decided_by_the_device(tiny: Config, small_beton) -> None:
    for device, place in (("cpu", "cpu"), ("cuda", "device")):
        settled = resolve(tiny.using(precision="fp32"), torch.device(device), Beton(small_beton))
        assert settled.efficiency.augment_on == place


@pytest.mark.parametrize(
    ("cores", "ranks", "asked", "threads"),
    [(1, 1, 0, 1), (16, 1, 0, 16), (16, 8, 0, 2), (4, 8, 0, 1), (384, 1, 0, 256), (384, 4, 0, 96), (64, 4, 5, 5)],
)
def test_ranks_share_the_cores_that_may_be_used(
    tiny: Config, small_beton, monkeypatch, cores: int, ranks: int, asked: int, threads: int
) -> None:
    seen = threads_of_loaders(monkeypatch, cores)
    several = Ranks(0, ranks, ranks, torch.device("cpu"), None)
    with make_loader(Beton(small_beton), tiny.using(workers=asked), several):
        assert seen == [threads]


def test_dalis_settings_reach_its_engine(tiny: Config, small_beton) -> None:
    pytest.importorskip("nvidia.nvimgcodec", reason="NVIDIA DALI is not installed (the extra dali-cuda130)")
    ranks = Ranks(0, 1, 1, torch.device("cpu"), None)
    config = tiny.using(loader="dali", dali_part=5, hw_decoder_load=0.25)
    with make_loader(Beton(small_beton), config, ranks) as loader:
        assert loader._source.dali == DaliSettings(part=5, hw_decoder_load=0.25)


def threads_of_loaders(monkeypatch: pytest.MonkeyPatch, cores: int) -> list[int]:
    """On a machine of so many cores: the threads of every loader that is opened from now on."""
    seen, make = [], runner.make_engine
    monkeypatch.setattr(machine, "usable_cores", lambda: cores)
    monkeypatch.setattr(runner, "make_engine", lambda name, source: seen.append(source.workers) or make(name, source))
    return seen


@pytest.mark.parametrize(
    ("batch", "asked", "ranks", "taken"),
    [
        (768, 1, 8, 1), (768, 2, 8, 2), (768, 3, 6, 4), (768, 5, 8, 6), (12, 4, 6, 2), (7, 1, 7, 1), (24, 7, 4, 6),
    ],
)  # fmt: skip
def test_a_number_of_ranks_picks_its_micro_batches(batch: int, asked: int, ranks: int, taken: int):
    config, remarks = shared_out(PRESETS["paper"].using(batch_size=batch, accumulate=asked), ranks)
    assert config.optimizer.accumulate == taken
    assert batch % (ranks * taken) == 0
    assert taken == asked or f"--accumulate {asked} does not share {batch} images out over {ranks} ranks" in remarks[0]
    assert (remarks == []) is (config.optimizer.accumulate == asked)


@pytest.mark.parametrize(
    ("batch", "ranks", "fit"),
    [
        (768, 5, "4 or 6 ranks do, as --batch-size 765 and 770 would on 5"),
        (7, 3, "1 or 7 ranks do, as --batch-size 6 and 9 would on 3"),
        (4, 6, "4 ranks do, as --batch-size 6 would on 6"),
        (1, 2, "1 rank does, as --batch-size 2 would on 2"),
    ],
)
def test_ranks_that_share_no_batch_are_told_which_do(batch: int, ranks: int, fit: str):
    with pytest.raises(
        UserError, match=f"^--batch-size {batch} does not share out evenly over {ranks} ranks, .*: {fit}$"
    ):
        shared_out(PRESETS["paper"].using(batch_size=batch), ranks)


@pytest.mark.slow
def test_a_run_whose_micro_batches_would_be_others_is_not_resumed(tiny: Config) -> None:
    pretrain(tiny.using(steps=1, accumulate=2))
    words = "--accumulate was 2 and is now 4; --accumulate 3 does not share 8 images out over 1 rank: it is 4 here"
    with pytest.raises(UserError, match=words):
        pretrain(tiny.using(steps=2, accumulate=3, resume="auto"))
