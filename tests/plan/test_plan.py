import functools
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rich.console import Console

from fastpmae import PRESETS
from fastpmae.model.phases import phases_of
from fastpmae.plan import plan as plan_module
from fastpmae.plan.costs import step_costs
from fastpmae.plan.figures import Report
from fastpmae.plan.gpus import GPUS
from fastpmae.plan.loader_rate import measure, write_made_images
from fastpmae.plan.plan import OF_A_METHOD, Plan, fitting_accumulate, make_plan
from fastpmae.plan.report import show
from fastpmae.pretraining.cli import parse
from fastpmae.pretraining.step import compute_targets
from fastpmae_loaders import Beton
from fastpmae_loaders.errors import UserError
from tests.made import REPOSITORY
from tests.tiny import made_batch, tiny_config, tiny_networks


def planned(*words: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(REPOSITORY / part) for part in (".", "kernels", "loaders"))
    return subprocess.run(
        [sys.executable, "-m", "fastpmae.plan.plan", *words],
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "110"},
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture(autouse=True, scope="module")
def counted_once() -> Iterator[None]:
    """Plans of the same settings count the same: with annotations checked that takes ten seconds each time."""
    with pytest.MonkeyPatch.context() as patch:
        for function in ("step_costs", "flops_of_an_image"):
            patch.setattr(plan_module, function, functools.cache(getattr(plan_module, function)))
        yield


SMALL = PRESETS["demo"].using(depth=2, decoder_depth=1, batch_size=64, pixel_epochs=0)
"""Images that the patches of every known model fit."""
TINY = ["--preset", "demo", "--depth", "2", "--decoder-depth", "1", "--pixel-epochs", "0", "--batch-size", "64",
        "--epochs", "5", "--loader-rate", "250"]  # fmt: skip


@pytest.mark.slow
def test_command_line(tmp_path: Path):
    file, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    done = planned(
        *TINY, "--gpu", "L40S", "--gpus", "4", "--images", "50000", "--json", str(file), "--plot", str(picture)
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in ("decoder", "optimizer", "hours", "cores", "ASSUMED", "1,600 epochs", "single-epoch", "1,024"):
        assert words in done.stdout
    assert picture.stat().st_size > 10_000
    found = json.loads(file.read_text())
    assert found["gpu"]["words"] == GPUS["l40s"].words
    assert found["steps"] == 50000 // 64 * 5
    assert found["hours"] == pytest.approx(found["steps"] * found["step"]["seconds"] / 3600)
    assert found["needed_rate"] == pytest.approx(64 / found["step"]["seconds"])
    assert found["needed_cores"] == pytest.approx(found["needed_rate"] / 4 / 250)
    # 16 images on each GPU
    assert found["costs"]["images"] == 16
    assert found["step"]["compute"] == pytest.approx(found["costs"]["flops"] / (362.05e12 * 0.35))
    assert [row["name"] for row in found["methods"]] == [
        "mae", "sdae", "single-step", "single-epoch", "dual", "single-chunk", "dual-chunk",
    ]  # fmt: skip
    assert found["methods"][4]["costs"] == found["costs"]
    assert found["methods"][6]["costs"]["flops"] > found["costs"]["flops"]
    assert "--prototypes-chunk 1024" in done.stdout
    assert [row["gpus"] for row in found["weak"]] == [2**power for power in range(11)]
    assert found["config"]["network"]["depth"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.png"]


@pytest.mark.slow
def test_a_run_of_two_phases_takes_the_time_of_both():
    config = SMALL.using(epochs=10, pixel_epochs=4)
    whole = make_plan(Plan(config, images=6400, loader_rate=1e6))
    pixels, tokens = (make_plan(Plan(phase.config, images=6400, loader_rate=1e6)) for phase in phases_of(config))
    assert whole.pixels is not None
    assert (whole.pixels.epochs, whole.pixels.steps, whole.steps) == (4, 400, 600)
    assert whole.pixels.costs == pixels.costs
    assert whole.costs == tokens.costs
    assert whole.pixels.hours == pytest.approx(pixels.hours)
    assert whole.hours == pytest.approx(pixels.hours + tokens.hours)
    assert "hours of 4 epochs of pixels before" in shown(whole)
    assert "of pixels before" not in shown(tokens)


@pytest.mark.slow
def test_sizes_of_views_take_each_their_own_time():
    """The parts are plans of runs on images of their size, and what is saved is told against the last size."""
    config = SMALL.using(epochs=10, pixel_epochs=4, progressive_resolution=("32:0.2", "48:0.3", "64"))
    whole = make_plan(Plan(config, images=6400, loader_rate=1e6))
    pixels, tokens = phases_of(config)
    parts = [(part.phase, part.size, part.epochs, part.steps) for part in whole.sizes]
    assert parts == [
        ("pixels", 32, 2, 200), ("pixels", 48, 2, 200), ("tokens", 48, 1, 100), ("tokens", 64, 5, 500)
    ]  # fmt: skip
    for part, phase in zip(whole.sizes, (pixels, pixels, tokens, tokens), strict=True):
        alone = make_plan(Plan(phase.config.using(image_size=part.size), images=6400, loader_rate=1e6))
        assert part.costs == alone.costs
        assert part.seconds == pytest.approx(alone.step.seconds)
        assert part.images_per_second == pytest.approx(alone.needed_rate)
    assert whole.hours == pytest.approx(sum(part.hours for part in whole.sizes))
    last = make_plan(Plan(config.using(progressive_resolution=()), images=6400, loader_rate=1e6))
    assert last.sizes == []
    assert (last.saved_flops, last.hours_at_last) == (0, last.hours)
    assert whole.hours_at_last == pytest.approx(last.hours)
    assert whole.costs == last.costs
    assert last.pixels is not None
    flops = 400 * last.pixels.costs.flops + 600 * last.costs.flops
    assert whole.saved_flops == pytest.approx(1 - sum(part.steps * part.costs.flops for part in whole.sizes) / flops)
    said = " ".join(shown(whole).split())
    assert "Sizes of the views" in said
    assert f"which take {last.hours:,.2f} hours, this saves {whole.saved_flops:.0%} of the FLOPs" in said
    assert "Sizes of the views" not in shown(last)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--progressive-resolution", "32", "64"], "32 needs a share of the epochs"),
        (["--gpu", "h1000"], "choose one of a100-40"),
        (["--gpus", "5"], "does not share out evenly"),
        (["--gpus", "0"], "at least 1"),
        (["--images", "10"], "less than one batch"),
        (["--efficiency-of-peak", "1.5"], "not in (0, 1]"),
        (["--loader-rate", "0"], "above 0"),
        (["--beton", "none.beton"], "none.beton"),
        (["--plot", "plan.gif"], "must end in"),
        (["--prototypes", "0"], "--prototypes"),
    ],
)
def test_what_makes_no_plan(words: list[str], said: str):
    with pytest.raises(UserError, match=re.escape(said)):
        make_plan(parse(Plan, "fastpmae-plan", "", [*TINY, *words]))


@pytest.mark.slow
def test_bad_input_is_one_sentence():
    done = planned("--gpu", "h1000")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fastpmae-plan: error: --gpu h1000")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_largest_batch_fits_and_no_larger_one():
    config = tiny_config(batch_size=64, depth=1)
    report = make_plan(Plan(config, gpu="a10", loader_rate=100.0))
    usable = GPUS["a10"].usable
    assert step_costs(config, report.largest_batch).peak <= 1.005 * usable
    assert step_costs(config, int(1.01 * report.largest_batch)).peak > usable
    assert report.fitting_accumulate == 1


def test_parts_that_fit():
    assert fitting_accumulate(768, 1000) == 1
    assert fitting_accumulate(768, 300) == 3
    assert fitting_accumulate(7, 3) == 7
    assert fitting_accumulate(768, 0) is None


@pytest.mark.slow
def test_a_faster_loader_needs_fewer_cores_and_more_parts_take_as_long():
    config = SMALL
    slow, fast = (make_plan(Plan(config, loader_rate=rate)) for rate in (100.0, 400.0))
    assert slow.needed_cores == pytest.approx(4 * fast.needed_cores)
    assert slow.models
    for one, other in zip(slow.models, fast.models, strict=True):
        assert one.cores["h100"] == pytest.approx(4 * other.cores["h100"])
    parts = make_plan(Plan(config.using(accumulate=4), loader_rate=100.0))
    assert parts.costs.flops == slow.costs.flops
    assert parts.costs.peak < slow.costs.peak


@pytest.mark.slow
def test_fp32_needs_fewer_cores_than_bf16():
    low, full = (make_plan(Plan(SMALL.using(precision=kind), loader_rate=100.0)) for kind in ("bf16", "fp32"))
    slower = GPUS["h100"].bf16 / GPUS["h100"].fp32
    assert low.models
    for one, other in zip(low.models, full.models, strict=True):
        assert one.cores["h100"] == pytest.approx(slower * other.cores["h100"])
    assert "67 TFLOP/s in fp32" in shown(full)


def shown(report: Report) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    show(report, console)
    return console.export_text(styles=True)


@pytest.mark.slow
def test_the_loaders_sentence_is_of_the_cores_there_are():
    usual, few = (make_plan(Plan(SMALL, loader_rate=5000.0, cores=cores)) for cores in (None, 1))
    assert "the usual machine has, 14 for the h100's" in shown(usual)
    assert "--cores 1 for the h100, than the usual machine has for others" in shown(few)
    models = [needs for needs in few.models if needs.cores["h100"] < 14]
    assert models, "nothing to tell apart"
    for needs in models:
        (usual_row,), (few_row,) = (
            [line for line in shown(report).splitlines() if needs.model in line][-1:] for report in (usual, few)
        )
        assert few_row.count("\x1b[1m") > usual_row.count("\x1b[1m"), needs.model


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.untyped
def test_sinkhorns_messages_are_those_that_are_sent(chunk: int, monkeypatch: pytest.MonkeyPatch):
    config = tiny_config(prototypes_chunk=chunk)
    sent: list[int] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *others: sent.append(tensor.nbytes))
    _, teachers = tiny_networks(config)
    for teacher in teachers.modules().values():
        teacher.float()
    group: Any = object()
    compute_targets(teachers, made_batch(), config, group)
    report = make_plan(Plan(config.using(batch_size=64), gpus=2, loader_rate=100.0))
    assert list(report.messages.assignments) == sent


@pytest.mark.slow
def test_each_method_waits_for_its_own_messages():
    """MAE and SdAE have no pseudo labels to agree on, and smaller gradients."""
    config = tiny_config(batch_size=64, prototypes=4096)
    report = make_plan(Plan(config, gpus=4, loader_rate=100.0, jitter=0.0))
    rows = {row.name: row for row in report.methods}
    assert rows["dual"].seconds == pytest.approx(report.step.seconds)
    for name in ("mae", "sdae"):
        own = {key: PRESETS[name].flat()[key] for key in OF_A_METHOD}
        alone = make_plan(Plan(config.using(**own), gpus=4, loader_rate=100.0, jitter=0.0))
        assert alone.step.assignments < report.step.assignments
        assert rows[name].seconds == pytest.approx(alone.step.seconds)


@pytest.mark.slow
def test_what_a_short_run_tells_of_the_peak():
    report = make_plan(Plan(tiny_config(batch_size=64), loader_rate=100.0))
    said = " ".join(shown(report).split())
    assert f"times {report.costs.flops / report.costs.images / 1e9:,.1f} GFLOP an image, over 989 TFLOP/s" in said


@pytest.mark.slow
def test_the_rate_of_real_and_of_made_images(small_beton: Path, tmp_path: Path):
    config = PRESETS["demo"].using(workers=1, loader="torch")
    of_file = measure(config.using(beton=small_beton), seconds=0.2)
    assert of_file.source == str(small_beton)
    assert of_file.images_per_second > 1
    assert measure(config, seconds=0.2).images_per_second > 1
    write_made_images(tmp_path / "made.beton", 8)
    made = Beton(tmp_path / "made.beton")
    assert len(made) == 8
    assert {tuple(made.decode(number).shape) for number in range(8)} == {(375, 500, 3)}
