"""The loop: what it leaves behind, and that no stop of any kind changes what it computes."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpmae import PRESETS, Config, RunError, UserError, preset, pretrain, write_beton
from fastpmae import train as loop
from fastpmae.evaluate.features import load_encoder
from fastpmae.run import checkpoint_writer as saving
from fastpmae.run import malloc
from fastpmae.run.checkpoint import checkpoint_path, checkpoints_in, read_checkpoint, step_of, write_checkpoint
from fastpmae.run.log import TIMINGS
from fastpmae_loaders.errors import Interrupted
from tests.engines import FFCV
from tests.made import REPOSITORY, tiny_settings, write_tree


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without the figures that a clock gives."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Weights, teachers, optimizer and metrics of two runs, bit for bit."""
    first, second = (read_checkpoint(checkpoint_path(folder, step)) for folder in (one, other))
    assert first.tensors.keys() == second.tensors.keys()
    different = [name for name, tensor in first.tensors.items() if not torch.equal(tensor, second.tensors[name])]
    assert different == []
    assert rows_of(one) == rows_of(other)


def environment() -> dict[str, str]:
    paths = os.pathsep.join(str(REPOSITORY / part) for part in ("", "kernels", "loaders"))
    return {**os.environ, "PYTHONPATH": paths}


def flags_of(config: Config) -> list[str]:
    """The command line that asks for these settings."""
    flags = ["--preset", config.run.preset]
    for name, value in config.flat().items():
        if value == preset(config.run.preset).flat()[name]:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, *map(str, value if isinstance(value, list) else [value])]
    return flags


@contextlib.contextmanager
def killed_at_end(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A test that fails leaves no run behind that would go on for hours, beside every later test."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastpmae.train", *arguments]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def command(*arguments: str) -> tuple[int, str]:
    process = start(*arguments)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output + errors


def called(*arguments: str) -> int:
    """The command's exit status, in this process, whose allocator stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "tune_allocator", lambda device: None)
        patch.setattr(sys, "argv", ["fastpmae-train", *arguments])
        return loop.main()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until a file is there; it is an error if the process ends before."""
    limit = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.005)


@pytest.mark.slow
def test_run_folder_holds_what_a_user_looks_for(tiny: Config):
    folder = pretrain(tiny.using(steps=7, log_every=2, tensorboard=True, keep=0))

    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    assert [row.get("partial", False) for row in rows] == [False, False, False, True]
    for row in rows:
        parts = row["loss_m"] + row["loss_c"] + row["loss_p"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
        assert row["entropy_limit"] == pytest.approx(3.178, abs=1e-3)
        assert 0 < row["patch_label_entropy"] <= row["entropy_limit"]
        assert 1 <= row["patch_prototypes_used"] <= 24
        assert row["labelling_rank"] > 1
        assert row["labelling_std"] > 0
        assert row["grad_norm"] > 0
    assert rows[0]["epoch"] == pytest.approx(2 / 5)
    assert rows[-1]["labelling_momentum"] > 0.996
    assert rows[-1]["reconstruction_momentum"] > rows[0]["reconstruction_momentum"] == pytest.approx(0.96)
    assert [path.name for path in checkpoints_in(folder)] == ["step-00000007.safetensors"]
    assert list(folder.glob("events.out.tfevents.*"))
    assert "44 images" in (folder / "train.log").read_text()
    assert {path.name for path in folder.iterdir()} >= {"config.json", "machine.jsonl", "train.log"}


@pytest.mark.slow
def test_a_run_on_a_folder_says_what_of_it_is_trained_on(tiny: Config, tmp_path: Path):
    images = write_tree(tmp_path / "images" / "train", 12)
    write_tree(tmp_path / "images" / "val2017", 3)
    (images / "class_0" / "empty.jpg").touch()
    folder = pretrain(tiny.using(steps=1, beton=tmp_path / "images", loader="torch"))
    log = (folder / "train.log").read_text()
    assert "12 images" in log
    assert "Taking the split train; not taken: val2017 (3 files)" in log
    assert "1 images are left out (the first: " in log


@pytest.mark.slow
def test_same_settings_give_the_same_run(tiny: Config, tmp_path: Path):
    one = pretrain(tiny.using(steps=6))
    other = pretrain(tiny.using(steps=6, out=tmp_path / "other", workers=3))
    assert_same_run(one, other, 6)


@pytest.mark.slow
@pytest.mark.parametrize("as_a_command", [False, True])
def test_the_command_alone_changes_its_process_for_good(
    as_a_command: bool, tiny: Config, monkeypatch: pytest.MonkeyPatch
):
    tuned: list[str] = []
    monkeypatch.setattr(malloc, "tune_allocator", lambda device: tuned.append("mallopt"))
    monkeypatch.setattr(loop, "tune_allocator", lambda device: tuned.append("mallopt"))
    if as_a_command:
        monkeypatch.setattr(sys, "argv", ["fastpmae-train", *flags_of(tiny.using(steps=1))])
        assert loop.main() == 0
    else:
        pretrain(tiny.using(steps=1))
    assert tuned == ["mallopt"] * as_a_command


@pytest.mark.slow
def test_another_seed_gives_another_run(tiny: Config, tmp_path: Path):
    one = pretrain(tiny.using(steps=2))
    other = pretrain(tiny.using(steps=2, out=tmp_path / "other", seed=1))
    assert rows_of(one)[0]["loss"] != rows_of(other)[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("log_every", [1, 3])
def test_a_run_stopped_and_resumed_is_the_run_never_stopped(tiny: Config, tmp_path: Path, log_every: int):
    """After its first step, at the end of an epoch, and in the middle of one."""
    tiny = tiny.using(log_every=log_every)
    straight = pretrain(tiny.using(steps=12))
    for cut in (1, 5, 7):
        parted = pretrain(tiny.using(steps=cut, out=tmp_path / f"parted-{cut}"))
        assert pretrain(tiny.using(steps=12, out=parted, resume="auto", workers=2)) == parted
        assert_same_run(straight, parted, 12)


@pytest.mark.slow
def test_saving_at_an_epoch_end_includes_the_epoch_update(tiny: Config, tmp_path: Path):
    """The reconstruction teacher follows at the epoch's end; a checkpoint of that very step must hold the update."""
    straight = pretrain(tiny.using(steps=10))
    parted = pretrain(tiny.using(steps=5, out=tmp_path / "parted", save_steps=5))
    teacher, student = (
        read_checkpoint(checkpoint_path(parted, 5)).part(part) for part in ("reconstruction_teacher", "student")
    )
    assert not torch.equal(teacher["encoder.norm.bias"], torch.zeros_like(teacher["encoder.norm.bias"]))
    assert not torch.equal(teacher["encoder.norm.bias"], student["encoder.norm.bias"])
    pretrain(tiny.using(steps=10, out=parted, resume="auto"))
    assert_same_run(straight, parted, 10)


@pytest.mark.slow
def test_kill_9_then_resume_is_bit_for_bit(tiny: Config, tmp_path: Path):
    straight = pretrain(tiny.using(steps=12))
    out = tmp_path / "killed"
    with killed_at_end(start(*flags_of(tiny.using(out=out, save_steps=5)))) as process:
        wait_for(checkpoint_path(out, 5), process)
    status, text = command(*flags_of(tiny.using(out=out, steps=12, workers=2)), "--resume")
    assert status == 0, text
    assert "resumed from" in text
    assert_same_run(straight, out, 12)


@pytest.mark.slow
def test_kills_at_random_moments_and_in_the_middle_of_a_checkpoint_lose_nothing(tiny: Config, tmp_path: Path):
    """`python -m tests.kills` does it for longer, with other signals and on busy cores."""
    tiny = tiny.using(epochs=60, save_steps=1, head_hidden=512)
    straight = pretrain(tiny.using(steps=80, save_steps=80))
    out = tmp_path / "killed"
    result = subprocess.run(
        [sys.executable, "-m", "tests.programs.killed_often", out, straight / "config.json", tmp_path / "error"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 2, "no kill fell into the writing of a checkpoint"
    pretrain(tiny.using(out=out, resume="auto", steps=80))
    assert_same_run(straight, out, 80)
    assert not list(out.glob("checkpoints/.*"))
    assert len(checkpoints_in(out)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP], ids=lambda s: s.name)
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tiny: Config, tmp_path: Path, number: signal.Signals):
    out = tmp_path / "signalled"
    flags = flags_of(tiny.using(out=out, epochs=1000, save_steps=3))
    with killed_at_end(start(*flags)) as process:
        wait_for(checkpoint_path(out, 3), process)
        process.send_signal(number)
        _, text = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert number.name in text
    assert f"--resume --out {out}" in text
    newest = read_checkpoint(checkpoints_in(out)[0])
    assert f"after step {newest.progress['step']} of" in text
    pretrain(tiny.using(out=out, epochs=1000, steps=newest.progress["step"] + 1, resume="auto"))
    assert f"resumed from {newest.path}" in (out / "train.log").read_text()


@pytest.mark.slow
def test_damaged_checkpoints_are_passed_over_for_the_one_before(tiny: Config, tmp_path: Path):
    straight = pretrain(tiny.using(steps=9))
    parted = pretrain(tiny.using(steps=8, out=tmp_path / "parted", save_steps=1, keep=3))
    torn, altered = checkpoint_path(parted, 8), checkpoint_path(parted, 7)
    torn.write_bytes(torn.read_bytes()[:-1000])
    data = bytearray(altered.read_bytes())
    data[-1000] ^= 1
    altered.write_bytes(data)
    pretrain(tiny.using(steps=9, out=parted, resume="auto"))
    said = (parted / "train.log").read_text()
    assert said.count("is damaged") == 2
    assert f"resumed from {checkpoint_path(parted, 6)}" in said
    assert_same_run(straight, parted, 9)


@pytest.mark.slow
def test_keep_older_checkpoints(tiny: Config):
    folder = pretrain(tiny.using(steps=7, save_steps=1, keep=2))
    assert [int(path.stem[5:]) for path in checkpoints_in(folder)] == [7, 6, 5]


@pytest.mark.slow
def test_a_folder_that_holds_a_run_is_refused(tiny: Config):
    folder = pretrain(tiny.using(steps=1))
    with pytest.raises(UserError, match=r"already holds a run: add --resume"):
        pretrain(tiny.using(steps=2))
    assert len(rows_of(folder)) == 1


@pytest.mark.slow
def test_resume_lists_changed_settings_and_refuses(tiny: Config, small_beton: Path, tmp_path: Path):
    folder = pretrain(tiny.using(steps=2))
    changed = tiny.using(steps=4, resume="auto", blr=1e-2, folds=3)
    with pytest.raises(UserError, match=r"--folds was 5 and is now 3; --blr was 0.004 and is now 0.01") as refusal:
        pretrain(changed)
    assert "--accept-changes" in str(refusal.value)
    assert pretrain(changed.using(accept_changes=True)) == folder
    assert "changed setting: --blr was 0.004" in (folder / "train.log").read_text()
    # another place, pace and speed are no changes; the same images under another name are the same images
    copy = tmp_path / "copy.beton"
    copy.write_bytes(small_beton.read_bytes())
    pretrain(changed.using(steps=5, beton=copy, workers=2, log_every=2, save_steps=1, keep=5, save_every=1.0))


@pytest.mark.slow
def test_what_a_run_was_left_to_decide_is_decided_once(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The command of a requeued job names a preset, whose `auto` another machine would decide otherwise."""
    whole = pretrain(tiny.using(steps=4, page_order="on", augment_on="device", out=tmp_path / "whole"))
    assert tiny.run.out is not None
    # as on a machine with less memory, and a GPU
    monkeypatch.setattr("fastpmae.run.folder.by_page", lambda images: True)
    pretrain(tiny.using(steps=2, augment_on="device"))
    monkeypatch.undo()
    assert called(*flags_of(tiny), "--steps", "4", "--resume") == 0, capsys.readouterr().err
    assert_same_run(tiny.run.out, whole, 4)
    settled = read_checkpoint(checkpoint_path(tiny.run.out, 4)).config
    assert (settled.data.page_order, settled.efficiency.augment_on) == ("on", "device")
    # what is named is meant
    assert called(*flags_of(tiny), "--steps", "4", "--resume", "--page-order", "off") == 2
    assert "--page-order was on and is now off" in capsys.readouterr().err


@pytest.mark.slow
def test_resume_refuses_other_images(tiny: Config, tmp_path: Path):
    pretrain(tiny.using(steps=1))
    other = tmp_path / "other.beton"
    write_beton(write_tree(tmp_path / "tree", 40), other)
    with pytest.raises(UserError, match="holds other images"):
        pretrain(tiny.using(steps=2, resume="auto", beton=other))


@pytest.mark.slow
def test_resume_with_nothing_to_resume_starts_anew(tiny: Config):
    folder = pretrain(tiny.using(steps=1, resume="auto"))
    assert "nothing to resume" in (folder / "train.log").read_text()


@pytest.mark.slow
def test_going_back_to_an_older_checkpoint_keeps_the_new_work(tiny: Config):
    """As after a step that was not finite: back, with a lower rate. What came after is set aside, not resumed."""
    folder = pretrain(tiny.using(steps=6, save_steps=1, keep=9))
    back = tiny.using(resume=str(checkpoint_path(folder, 2)), blr=1e-4, accept_changes=True, keep=1)
    pretrain(back.using(steps=4))
    assert [step_of(path) for path in checkpoints_in(folder)] == [4, 2]
    assert len(list(folder.glob("checkpoints/past-step-00000002/step-*"))) == 4
    assert [row["step"] for row in rows_of(folder)] == [1, 2, 3, 4]
    pretrain(tiny.using(resume="auto", blr=1e-4, steps=5))
    assert [row["step"] for row in rows_of(folder)] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_start_that_fails_leaves_the_folder_free(tiny: Config, tmp_path: Path):
    with pytest.raises(UserError, match="there is no such file"):
        pretrain(tiny.using(init=tmp_path / "nothing.pth"))
    folder = pretrain(tiny.using(steps=2))
    with pytest.raises(UserError, match="does not fit this run"):
        pretrain(tiny.using(steps=3, resume="auto", accept_changes=True, depth=3))
    pretrain(tiny.using(steps=3, resume="auto"))
    assert len(rows_of(folder)) == 3


@pytest.mark.slow
def test_one_process_at_a_time_in_a_folder(tiny: Config):
    folder = pretrain(tiny.using(steps=1))
    with (folder / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training in"):
            pretrain(tiny.using(steps=2, resume="auto"))
    pretrain(tiny.using(steps=2, resume="auto"))


@pytest.mark.slow
@pytest.mark.parametrize("resume", ["auto", None])
def test_a_checkpoint_that_a_run_writes_while_another_start_looks_is_not_set_aside(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str | None
):
    """Ctrl-C, a slow save, and the command again at once: the old process saves before the new one has the lock."""
    longer = pretrain(tiny.using(steps=3, out=tmp_path / "longer"))
    assert tiny.run.out is not None
    last = checkpoint_path(tiny.run.out, 3)
    if resume:
        pretrain(tiny.using(steps=2))
    make = loop.make_networks

    def make_while_the_other_saves(*arguments: Any) -> Any:
        last.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkpoint_path(longer, 3), last)
        return make(*arguments)

    monkeypatch.setattr(loop, "make_networks", make_while_the_other_saves)
    with pytest.raises(UserError, match=r"has written step-00000003\.safetensors since this start"):
        pretrain(tiny.using(steps=5, resume=resume))
    assert checkpoints_in(tiny.run.out)[0] == last
    assert not list(last.parent.glob("past-*"))
    assert len(rows_of(tiny.run.out)) == 2 if resume else not (tiny.run.out / "config.json").exists()
    monkeypatch.undo()
    pretrain(tiny.using(steps=5, resume="auto"))
    assert [row["step"] for row in rows_of(tiny.run.out)][-2:] == [4, 5]


@pytest.mark.slow
def test_a_run_needs_no_locks(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    """Lustre mounted without flock: one remark, and nothing that says that the folder is another's."""

    def refuses(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuses)
    folder = pretrain(tiny.using(steps=1))
    assert [step_of(path) for path in checkpoints_in(folder)] == [1]
    assert (folder / "train.log").read_text().count("keeps no locks") == 1


@pytest.mark.slow
def test_a_batch_that_moves_the_epochs_is_refused_whatever_is_accepted(tiny: Config):
    pretrain(tiny.using(steps=1))
    with pytest.raises(UserError, match="counts 5 steps an epoch, and these images and --batch-size give 11"):
        pretrain(tiny.using(steps=2, resume="auto", batch_size=4, accept_changes=True))


@pytest.mark.slow
@pytest.mark.parametrize("other", ["torch", FFCV])
def test_the_native_and_the_other_loaders_are_one_run(tiny: Config, tmp_path: Path, other: Any):
    """Their pixels are the same, so a run may change from one to the other, and nothing needs to be said."""
    straight = pretrain(tiny.using(steps=4, out=tmp_path / "straight"))
    pretrain(tiny.using(steps=1, loader=other))
    pretrain(tiny.using(steps=3, resume="auto", loader="native"))
    folder = pretrain(tiny.using(steps=4, resume="auto", loader=other))
    assert_same_run(straight, folder, 4)
    assert "changed" not in (folder / "train.log").read_text()


@pytest.mark.slow
def test_another_decoder_is_a_changed_setting(tiny: Config):
    pytest.importorskip("nvidia.dali")
    pretrain(tiny.using(steps=1))
    with pytest.raises(UserError, match="--loader was native and is now dali"):
        pretrain(tiny.using(steps=2, resume="auto", loader="dali"))


def forge(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    """Alter a checkpoint as a stranger could, with a digest that fits."""
    checkpoint = read_checkpoint(path)
    tensors = dict(checkpoint.tensors)
    change(tensors, checkpoint.progress)
    write_checkpoint(path, tensors, checkpoint.progress, keep=9)


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["native", FFCV, "torch"])
def test_a_checkpoint_from_before_the_accurate_dct_goes_on_with_one_remark(tiny: Config, loader: str):
    """Of the FFCV engine's; the others decode as they did."""
    folder = pretrain(tiny.using(steps=1, loader=loader))
    forge(checkpoint_path(folder, 1), lambda _, progress: progress.pop("decoder"))
    for steps in (2, 3):
        pretrain(tiny.using(steps=steps, resume="auto", loader=loader))
    assert (folder / "train.log").read_text().count("0.8/255 darker") == (loader == "ffcv")


@pytest.fixture(scope="module")
def one_step(small_beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, to be copied and not to be changed."""
    return pretrain(tiny_settings(small_beton).using(steps=1, out=tmp_path_factory.mktemp("one") / "step"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, _: tensors.update({n: t.reshape(-1)[:1] for n, t in tensors.items() if ".exp_avg" in n}),
        lambda tensors, _: [tensors.pop(name) for name in list(tensors) if name.startswith("optimizer.")],
        lambda tensors, _: tensors.update({n: t.to(torch.int8) for n, t in tensors.items() if "student." in n}),
        lambda tensors, _: tensors.pop("student.encoder.cls_token"),
        lambda tensors, _: tensors.update({"student.extra": torch.zeros(1)}),
        lambda tensors, _: tensors.pop("rng.cpu"),
        lambda tensors, _: tensors.update({"rng.cpu": torch.zeros(3, dtype=torch.uint8)}),
        lambda tensors, _: tensors.pop("log.sums"),
        lambda _, progress: progress.pop("config"),
        lambda _, progress: progress.update(step="1"),
        lambda _, progress: progress.pop("fingerprint"),
        lambda _, progress: progress["config"].update(model={"width": "wide"}),
    ],
)
def test_a_forged_checkpoint_gets_a_sentence(tiny: Config, one_step: Path, change: Callable[..., None]):
    assert tiny.run.out is not None
    folder = Path(shutil.copytree(one_step, tiny.run.out))
    forge(checkpoint_path(folder, 1), change)
    with pytest.raises(UserError, match=r"step-00000001.safetensors|the checkpoint holds"):
        pretrain(tiny.using(steps=2, resume="auto"))


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_the_last_checkpoint_named(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    folder = pretrain(tiny.using(steps=1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fastpmae.run.checkpoint.save_file", full)
    with pytest.raises(RunError, match=r"No space left on device. Last checkpoint: .*step-00000001"):
        pretrain(tiny.using(steps=2, resume="auto"))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000001.safetensors"]


@pytest.mark.slow
def test_a_full_disk_is_told_at_the_next_step(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    """The checkpoint is written beside the steps, which go on for the moment that the disk takes to refuse it."""
    tiny = tiny.using(epochs=1000)
    written, write = 0, saving.write_checkpoint

    def fills_up(*arguments: Any) -> None:
        nonlocal written
        written += 1
        if written == 2:
            raise RunError("No space left on device. Last checkpoint: none but the first")
        write(*arguments)

    monkeypatch.setattr(saving, "write_checkpoint", fills_up)
    with pytest.raises(RunError, match="No space left on device"):
        pretrain(tiny.using(save_steps=4))
    assert tiny.run.out is not None
    assert [step_of(path) for path in checkpoints_in(tiny.run.out)] == [4]
    assert 8 <= rows_of(tiny.run.out)[-1]["step"] < 100
    monkeypatch.undo()
    pretrain(tiny.using(resume="auto", steps=9))


def on_a_disk(kind: str, config: Config) -> tuple[int, str]:
    """`fastpmae-train` in a process of its own, on a disk that is "slow", "full" at step 6, or "dies" there."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.programs.train_on_a_disk", kind, *flags_of(config)],
        env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_disks_that_are_slow_full_or_gone(tiny: Config, tmp_path: Path):
    straight = pretrain(tiny.using(steps=12, out=tmp_path / "straight"))
    tiny = tiny.using(save_steps=3, keep=9)
    folder = tiny.run.out
    assert folder is not None
    # killed in the middle of a write: the checkpoint before is there, and what is half done goes at the next start
    status, text = on_a_disk("dies", tiny)
    assert status == -signal.SIGKILL, text
    assert [step_of(path) for path in checkpoints_in(folder)] == [3]
    assert len(list(folder.glob("checkpoints/.partial-*"))) == 1
    status, text = on_a_disk("full", tiny.using(resume="auto", epochs=3))
    assert status == 1, text
    assert text.splitlines()[-1].endswith(f"No space left on device. Last checkpoint: {checkpoint_path(folder, 3)}")
    assert text.count("fastpmae-train: stopped: ") == 1
    assert "Traceback" not in text
    assert not list(folder.glob("checkpoints/.*"))
    status, text = on_a_disk("slow", tiny.using(resume="auto", steps=12))
    assert status == 0, text
    assert [step_of(path) for path in checkpoints_in(folder)] == [12, 9, 6, 3]
    assert_same_run(straight, folder, 12)


@pytest.mark.slow
def test_steps_go_on_while_a_checkpoint_is_written(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And each holds the step that it names: the same as of a run that waits for each."""
    tiny = tiny.using(save_steps=4, keep=99, steps=11)
    steps, seen, write, step, save = [0], [], saving.write_checkpoint, loop.Log.step, saving.Saver.save

    def counted(log: Any, number: int, *others: Any) -> None:
        steps[0] = number
        step(log, number, *others)

    def slow(path: Path, *others: Any) -> None:
        limit = time.monotonic() + 60
        while steps[0] < min(step_of(path) + 3, 11) and time.monotonic() < limit:
            time.sleep(0.005)
        seen.append((step_of(path), steps[0]))
        write(path, *others)

    monkeypatch.setattr(loop.Log, "step", counted)
    monkeypatch.setattr(saving, "write_checkpoint", slow)
    beside = pretrain(tiny)
    # three steps later, while the write before the last is waited for when the last is due
    assert [(number, later - number) for number, later in seen] == [(4, 3), (8, 3), (11, 0)]
    monkeypatch.setattr(saving, "write_checkpoint", write)

    def waits(saver: Any, *arguments: Any) -> None:
        save(saver, *arguments)
        saver.wait()

    monkeypatch.setattr(saving.Saver, "save", waits)
    plain = pretrain(tiny.using(out=tmp_path / "plain"))
    for number in (4, 8, 11):
        one, other = (read_checkpoint(checkpoint_path(folder, number)) for folder in (beside, plain))
        assert one.progress == other.progress
        assert one.tensors.keys() == other.tensors.keys()
        assert [name for name in one.tensors if not torch.equal(one.tensors[name], other.tensors[name])] == []


@pytest.mark.slow
def test_epoch_ends_save_when_it_is_time(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    saved, save = [], saving.Saver.save

    def noted(saver: Any, path: Path, *others: Any) -> None:
        saved.append(step_of(path))
        save(saver, path, *others)

    monkeypatch.setattr(saving.Saver, "save", noted)
    folder = pretrain(tiny.using(steps=11))
    assert saved == [11]
    saved.clear()
    pretrain(tiny.using(steps=13, save_every=0.0, resume="auto"))
    assert saved == [12, 13]
    assert [step_of(path) for path in checkpoints_in(folder)] == [13, 12]


@pytest.mark.slow
def test_a_signal_waits_for_the_write(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    write = saving.write_checkpoint

    def signalled(path: Path, *others: Any) -> None:
        if step_of(path) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        write(path, *others)

    monkeypatch.setattr(saving, "write_checkpoint", signalled)
    with pytest.raises(Interrupted) as stopped:
        pretrain(tiny.using(save_steps=2, epochs=1000, keep=9))
    assert tiny.run.out is not None
    newest = step_of(checkpoints_in(tiny.run.out)[0])
    assert f"SIGTERM after step {newest} of" in str(stopped.value)
    assert read_checkpoint(checkpoint_path(tiny.run.out, newest)).progress["step"] == newest


@pytest.mark.slow
def test_resume_from_a_checkpoint_by_its_path(tiny: Config, tmp_path: Path):
    folder = pretrain(tiny.using(steps=6, save_steps=3, keep=5))
    branch = pretrain(tiny.using(steps=6, out=tmp_path / "branch", resume=str(checkpoint_path(folder, 3))))
    first, second = (read_checkpoint(checkpoint_path(f, 6)) for f in (folder, branch))
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())


@pytest.mark.slow
def test_a_step_that_is_not_finite_stops_the_run_and_spares_the_weights(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    calls = 0

    def learn(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        losses = LEARN(*arguments)
        return losses._replace(total=losses.total * float("nan")) if calls == 4 else losses

    LEARN = loop.student_loss
    monkeypatch.setattr(loop, "student_loss", learn)
    with pytest.raises(RunError, match=r"step 4 is not finite") as stopped:
        pretrain(tiny.using(log_every=3, save_steps=1, keep=9))
    folder = tiny.run.out
    assert folder is not None
    # nothing was saved after the bad step, and what was saved before is named
    assert [int(path.stem[5:]) for path in checkpoints_in(folder)] == [3, 2, 1]
    assert str(checkpoint_path(folder, 3)) in str(stopped.value)
    samples = str(stopped.value).split("Samples of that step: [")[1].split("]")[0]
    assert len(samples.split(",")) == 8
    # a run that goes on without the bad step is the run that never met it
    monkeypatch.setattr(loop, "student_loss", LEARN)
    pretrain(tiny.using(steps=6, resume="auto", log_every=3))
    assert all(torch.isfinite(t).all() for t in read_checkpoint(checkpoint_path(folder, 6)).part("student").values())


@pytest.mark.slow
def test_accumulated_parts_give_the_gradient_of_the_whole_batch(tiny: Config, tmp_path: Path):
    """Without pseudo labels, which are balanced within a part, parts add up to the batch."""
    sdae = tiny.using(teachers="reconstruction", lambda_c=0.0, lambda_p=0.0, steps=3, warmup_epochs=0.0)
    whole = rows_of(pretrain(sdae))
    parts = rows_of(pretrain(sdae.using(accumulate=4, out=tmp_path / "parts")))
    for one, other in zip(whole, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_torchrun_passes_a_preemption_on_and_the_run_goes_on_alone(tiny: Config, tmp_path: Path):
    """SIGTERM to torchrun, as a scheduler sends it: both ranks stop after the same step, and one process resumes."""
    tiny = tiny.using(epochs=1000, save_steps=3)
    out = tmp_path / "ranks"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    process = subprocess.Popen(
        [*launch, "fastpmae.train", *flags_of(tiny.using(out=out))],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    with killed_at_end(process):
        wait_for(checkpoint_path(out, 3), process)
        process.terminate()
        _, text = process.communicate(timeout=60)
    assert process.returncode != 0
    newest = read_checkpoint(checkpoints_in(out)[0])
    step = newest.progress["step"]
    assert text.count(f"SIGTERM after step {step} of") == 1, text
    pretrain(tiny.using(out=out, resume="auto", steps=step + 2))
    assert rows_of(out)[-1]["step"] == step + 2
    assert f"resumed from {newest.path}" in (out / "train.log").read_text()


@pytest.mark.slow
@pytest.mark.untyped  # torch.compile traces the step whole
def test_compiled_passes_compute_the_same(tiny: Config, tmp_path: Path):
    """With torch's code generator, which takes minutes; tests/pretraining/test_compile.py looks at the graphs."""
    tiny = tiny.using(depth=1, decoder_depth=1, folds=4)
    eager = rows_of(pretrain(tiny.using(steps=4)))
    compiled = rows_of(pretrain(tiny.using(steps=4, compile="on", out=tmp_path / "compiled")))
    for one, two in zip(eager, compiled, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_teachers_without_a_loss_for_labels_are_one(tiny: Config, tmp_path: Path):
    dual = pretrain(tiny.using(lambda_c=0.0, lambda_p=0.0, steps=3))
    one = pretrain(tiny.using(lambda_c=0.0, lambda_p=0.0, steps=3, teachers="reconstruction", out=tmp_path / "one"))
    assert_same_run(dual, one, 3)


@pytest.mark.slow
def test_bf16_trains_close_to_fp32(tiny: Config, tmp_path: Path):
    full = rows_of(pretrain(tiny.using(steps=4)))
    half = rows_of(pretrain(tiny.using(steps=4, precision="bf16", out=tmp_path / "half")))
    for one, other in zip(full, half, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
        assert one["loss"] != other["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "sdae", "sdae-code", "mae", "single-step", "single-epoch"])
def test_every_method_trains(tiny: Config, name: str):
    method = PRESETS[name]
    settings = {
        setting: getattr(getattr(method, group), setting)
        for group in ("teacher", "loss")
        for setting in type(getattr(method, group)).__dataclass_fields__
    }
    folder = pretrain(tiny.using(**settings, steps=11, warmup_epochs=0.0, blr=0.05))
    rows = rows_of(folder)
    assert rows[-1]["loss_m"] < rows[0]["loss_m"]


@pytest.mark.slow
def test_config_file_of_a_run_gives_the_run_again(tiny: Config, tmp_path: Path):
    one = pretrain(tiny.using(steps=2))
    assert called("--config", str(one / "config.json"), "--out", str(tmp_path / "again")) == 0
    assert_same_run(one, tmp_path / "again", 2)


@pytest.mark.slow
def test_resume_alone_needs_nothing_but_the_folder(tiny: Config):
    one = pretrain(tiny.using(steps=2))
    assert called("--resume", "--out", str(one), "--steps", "3") == 0
    assert [row["step"] for row in rows_of(one)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--preset", "demo"], "--beton FILE is missing"),
        (["--beton", "/nowhere.beton"], "/nowhere.beton"),
        (["--preset", "papper"], "there is no preset 'papper': choose one of paper,"),
        (["--preset", "x" * 10_000], f"there is no preset '{'x' * 119}…': choose one of paper,"),
        (["--config", "/nowhere.json"], "the config /nowhere.json cannot be read"),
        (["--model", "resnet50"], "--model resnet50: it is no plain ViT"),
        (["--preset", "demo", "--image-size", "60"], "image_size 60 must be a multiple of patch_size 8"),
        (["--preset", "demo", "--teachers", "none"], "--teachers none gives no pseudo labels"),
        (["--resume", "/nowhere.safetensors"], "there is no checkpoint /nowhere.safetensors"),
        (
            ["--preset", "demo", "--compile", "off", "--compile-mode", "max-autotune"],
            "--compile-mode max-autotune says",
        ),
        (["--preset", "demo", "--epsilon", "1e-300"], "--epsilon must be at least 1e-06: logits are divided by it"),
        (
            ["--preset", "demo", "--activation-checkpointing", "-2"],
            "--activation-checkpointing -2: every so many blocks",
        ),
        (["--batch-size", "sixty"], "--batch-size"),
        (["--epoch", "3"], "--epochs"),
        (["--preset", "sdae", "--no-decoder-class-token"], "--no-decoder-class-token: every decoder keeps the class"),
        (["--decoder_class_token"], "--decoder_class_token: every decoder keeps the class token now"),
    ],
)
def test_bad_flags_get_a_sentence_and_status_2(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fastpmae-train", *flags])
        try:
            status = loop.main()
        except SystemExit as ended:
            status = ended.code
    said = capsys.readouterr()
    assert status == 2
    assert sentence in said.err + said.out
    assert "Traceback" not in said.err


def as_written_before(folder: Path, step: int, **model: bool) -> Path:
    """Make a checkpoint one of an earlier version, which knew one more setting of the model, and one less of AdamW."""
    path = checkpoint_path(folder, step)
    found = read_checkpoint(path)
    config = found.progress["config"]
    config["network"] |= model
    del config["optimizer"]["decay_tokens"]
    write_checkpoint(path, found.tensors, found.progress, keep=0)
    return path


@pytest.mark.slow
def test_a_run_whose_decoder_had_no_class_token_ends_in_a_sentence(tiny: Config, capsys: pytest.CaptureFixture[str]):
    """It cannot go on; its encoder is read as ever."""
    folder = pretrain(tiny.using(teachers="reconstruction", lambda_c=0.0, lambda_p=0.0, steps=2))
    path = as_written_before(folder, 2, decoder_class_token=False)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    capsys.readouterr()
    for flags in (["--resume", "--out", str(folder)], ["--resume", str(path)], ["--init", str(path), "--resume"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["fastpmae-train", *flags, "--out", str(folder), "--steps", "3"])
            assert loop.main() == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{path} asks for a decoder without the class token (network.decoder_class_token)" in line
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    encoder, config = load_encoder(folder)
    assert config.teacher.teachers == "reconstruction"
    assert torch.equal(encoder.cls_token, read_checkpoint(path).tensors["student.encoder.cls_token"])
    began = pretrain(tiny.using(init=path, steps=1, blr=0.0, out=folder.parent / "next"))
    assert torch.equal(load_encoder(began)[0].cls_token, encoder.cls_token)


@pytest.mark.slow
def test_a_run_of_an_earlier_version_goes_on_as_it_began(tiny: Config, tmp_path: Path):
    """MAE's tokens were not decayed, and are not when such a run goes on."""
    mae = tiny.using(
        preset="mae", teachers="none", target="pixels", lambda_c=0.0, lambda_p=0.0, warmup_epochs=0.0,
        weight_decay=0.5, blr=0.01,
    )  # fmt: skip
    as_written_before(pretrain(mae.using(steps=2)), 2, decoder_class_token=True)
    assert called("--resume", "--out", str(mae.run.out), "--steps", "4") == 0
    whole, decayed = (
        pretrain(mae.using(steps=4, decay_tokens=tokens, out=tmp_path / f"decayed-{tokens}"))
        for tokens in (False, True)
    )
    assert mae.run.out is not None
    assert_same_run(mae.run.out, whole, 4)
    states = [read_checkpoint(checkpoint_path(run, 4)).tensors["student.encoder.cls_token"] for run in (whole, decayed)]
    assert not torch.equal(*states)


@pytest.mark.slow
def test_a_run_that_was_started_with_relative_paths_goes_on_in_another_folder(
    tiny: Config, small_beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    weights = checkpoint_path(pretrain(tiny.using(steps=1, out=tmp_path / "weights")), 1)
    first, second = (tmp_path / name for name in ("first", "second"))
    for folder in (first, second):
        folder.mkdir()
    shutil.copy(small_beton, first / "small.beton")
    shutil.copy(weights, first / "weights.safetensors")
    monkeypatch.chdir(first)
    relative = tiny.using(
        beton="small.beton", eval_train="small.beton", eval_val=("small.beton",), eval_every=1, cache="cache",
        init="weights.safetensors", steps=5,
    )  # fmt: skip
    assert tiny.run.out is not None
    pretrain(relative)
    monkeypatch.chdir(second)
    assert called("--resume", "--out", str(tiny.run.out), "--steps", "10") == 0, capsys.readouterr().err
    assert [row["step"] for row in rows_of(tiny.run.out) if "knn_student" in row] == [5, 10]
    settled = read_checkpoint(checkpoint_path(tiny.run.out, 10)).config
    assert (settled.data.beton, settled.data.cache) == (first / "small.beton", first / "cache")
    assert settled.run.init == str(first / "weights.safetensors")
    assert (settled.run.eval_train, settled.run.eval_val) == (first / "small.beton", (str(first / "small.beton"),))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"attention": "xformers"}, "--attention xformers: it computes on GPUs alone"),
        (
            {"teacher_precision": "fp8", "width": 24},
            "--teacher-precision fp8: layers of 24 x 72 are no",
        ),
    ],
    ids=lambda value: "",
)
def test_what_this_machine_cannot_compute_leaves_no_folder(tiny: Config, settings: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        pretrain(tiny.using(**settings))
    assert tiny.run.out is not None
    assert not tiny.run.out.exists()


@pytest.mark.slow
def test_a_run_in_8_bits_is_another_run(tiny: Config):
    """Teachers in 8 bits and blocks computed anew train; on resuming only the former is a changed setting."""
    tiny = tiny.using(activation_checkpointing=1, teacher_precision="fp8", width=64, decoder_width=48)
    pretrain(tiny.using(steps=2))
    with pytest.raises(UserError, match="--teacher-precision was fp8 and is now auto"):
        pretrain(tiny.using(steps=3, resume="auto", teacher_precision="auto"))
    rows = rows_of(pretrain(tiny.using(steps=3, resume="auto", activation_checkpointing=0)))
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_a_file_with_less_than_a_batch_is_refused(tiny: Config):
    with pytest.raises(UserError, match=r"holds 44 images, less than one batch of 64: choose a smaller --batch-size"):
        pretrain(tiny.using(batch_size=64))
    assert tiny.run.out is not None
    assert not tiny.run.out.exists()
