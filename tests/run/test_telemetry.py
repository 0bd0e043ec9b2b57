"""What a run measures of itself, and that it leaves Python's garbage collector as it was."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch

from fastpmae import Config, UserError, pretrain
from fastpmae.config_file import read_config
from fastpmae.run import telemetry
from fastpmae.run.log import About, Log
from fastpmae.run.telemetry import collect_everything, garbage_between_steps, peak_memory


class Circle:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.slow
def test_garbage_is_collected_after_fixed_steps_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(telemetry, "COLLECT_EVERY", 3)
    before = gc.isenabled(), gc.get_freeze_count()
    with garbage_between_steps() as after:
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        for step in range(1, 7):
            Circle()
            after(step)
            left = sum(isinstance(each, Circle) for each in gc.get_objects())
            assert left == step % 3
    assert (gc.isenabled(), gc.get_freeze_count()) == before


def test_what_a_caller_has_frozen_and_switched_off_stays_so():
    gc.disable()
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with garbage_between_steps():
            pass
        assert not gc.isenabled()
        assert gc.get_freeze_count() == frozen
    finally:
        gc.unfreeze()
        gc.enable()


@pytest.mark.slow
def test_a_run_leaves_the_process_as_it_was_also_where_it_ends_by_an_error(tiny: Config):
    before = gc.isenabled(), gc.get_freeze_count()
    pretrain(tiny.using(steps=1))
    with pytest.raises(UserError, match="already holds a run"):
        pretrain(tiny.using(steps=2))
    assert (gc.isenabled(), gc.get_freeze_count()) == before


@pytest.mark.slow
def test_peak_memory_is_what_the_process_holds_and_stands_in_every_row(tiny: Config):
    before = peak_memory(torch.device("cpu"))
    large = torch.ones(int((before + 0.1) * 2**28))  # of four bytes each: more than has been held so far
    assert peak_memory(torch.device("cpu")) > before + 0.09
    del large
    lines = (pretrain(tiny.using(steps=2)) / "metrics.jsonl").read_text().splitlines()
    rows = list(map(json.loads, lines))
    assert all(row["peak_memory_gib"] > 0.1 and "mfu" not in row for row in rows)


def test_utilisation_is_the_rate_over_that_of_the_peak(tmp_path: Path):
    about = About("images", 100, 1, {}, images_at_peak=2000.0)
    with Log(tmp_path, about, 0, 10) as log:
        log.start_clock(0)
        log.row({"step": 1, "epoch": 0.1}, lambda: dict.fromkeys(("loss", "loss_m", "loss_c", "loss_p"), 1.0), 0.0,
                partial=False)  # fmt: skip
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["mfu"] == pytest.approx(row["images_per_second"] / 2000)
    assert "% of peak FLOPs" in (tmp_path / "train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("last", "traced"), [(8, 2), (5, 1)])
def test_a_trace_holds_the_steps_after_the_warm_up(tiny: Config, last: int, traced: int):
    folder = pretrain(tiny.using(steps=last, profile=2))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    # where a run ends within them, what it does behind its last step counts as the beginning of another
    assert {f"ProfilerStep#{4 + number}" for number in range(traced)} <= steps <= {"ProfilerStep#4", "ProfilerStep#5"}
    assert any(event.get("name") == "aten::addmm" for event in events)
    words = "2 steps lies" if traced == 2 else "1 step lies"
    assert f"a trace of {words} in {folder / 'trace.json'}" in (folder / "train.log").read_text()
    assert not list(folder.glob(".partial-*"))
    # a resumed run traces nothing unless it is told so again
    assert read_config(folder / "config.json").run.profile == 0


@pytest.mark.slow
def test_a_run_that_ends_in_the_warm_up_leaves_no_trace(tiny: Config):
    folder = pretrain(tiny.using(steps=4, profile=2))
    assert not (folder / "trace.json").exists()
    said = (folder / "train.log").read_text()
    assert "no trace is written: it begins after 4 steps, and this start ends after 4 steps" in said


def full_disk(profile: torch.profiler.profile, path: str) -> None:
    """What the profiler does on a full disk: it complains on stderr and leaves no file."""


@pytest.mark.slow
@pytest.mark.parametrize("disk_full", [True, False])
def test_a_trace_that_cannot_be_written_does_not_end_the_training(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk_full: bool
):
    out = tmp_path / "run"
    if disk_full:
        monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full_disk)
        reason = "cannot be written: is the disk full?"
    else:
        (out / "trace.json").mkdir(parents=True)
        reason = "is a folder; name the file to write"
    folder = pretrain(tiny.using(out=out, steps=8, profile=2))
    said = (folder / "train.log").read_text()
    assert f"no trace is written: {out / 'trace.json'} {reason}" in said
    assert "done: 8 of " in said
    assert not list(folder.glob(".partial-*"))


def test_a_trace_of_fewer_steps_than_none_is_refused(tiny: Config):
    with pytest.raises(UserError, match="--profile -1: 0 or more"):
        pretrain(tiny.using(profile=-1))


def test_what_was_there_at_the_start_can_be_collected_too():
    circle = Circle()
    gone = weakref.ref(circle)
    with garbage_between_steps() as after:
        del circle
        after(telemetry.COLLECT_EVERY)
        assert gone() is not None
        collect_everything()
        assert gone() is None
        assert gc.get_freeze_count() > 0
