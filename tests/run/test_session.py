"""A session says when a checkpoint is due, writes it, and ends a training in good order after a signal."""

import contextlib
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpmae.distributed.ranks import Ranks
from fastpmae.run.checkpoint import checkpoint_path, checkpoints_in, read_checkpoint
from fastpmae.run.log import About, Log
from fastpmae.run.session import Session, open_session
from fastpmae_loaders.errors import Interrupted

ALONE = Ranks(0, 1, 1, torch.device("cpu"), None)
WEIGHT = torch.zeros(3)


def state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {"model.weight": WEIGHT}, {"steps_per_epoch": 9, "bad_images": 0, "fingerprint": "", "config": {}}


def begin(session: Session, folder: Path, last_step: int = 9, **settings: Any) -> None:
    folder.mkdir(exist_ok=True)
    log = Log(folder, About("images", 4, 1, {}), 0, last_step)
    how = {"step": 0, "last_step": last_step, "keep": 9, "save_every": 1000.0} | settings
    session.begin(folder, log, **how)


def opened() -> contextlib.AbstractContextManager[Session]:
    return open_session(contextlib.nullcontext(ALONE), False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "due"), [({}, [9]), ({"save_steps": 4}, [4, 8, 9]), ({"save_every": 0.0}, list(range(1, 10)))]
)
def test_checkpoints_are_due_by_steps_by_the_clock_and_at_the_end(tmp_path: Path, settings: dict, due: list[int]):
    with opened() as session:
        begin(session, tmp_path, **settings)
        found = []
        while session.step < session.last_step:
            session.advance(0)
            if session.is_due:
                found.append(session.step)
                WEIGHT.fill_(session.step)
                session.save(state)
        session.wait()
    assert found == due
    assert checkpoints_in(tmp_path) == [checkpoint_path(tmp_path, step) for step in reversed(due)]
    for path, step in zip(checkpoints_in(tmp_path), reversed(due), strict=True):
        checkpoint = read_checkpoint(path)
        assert checkpoint.progress["step"] == step
        assert checkpoint.tensors["model.weight"].tolist() == [step] * 3


@pytest.mark.slow
@pytest.mark.parametrize("saved_step", [None, 0])
def test_a_signal_saves_what_is_not_saved_and_ends_the_training(tmp_path: Path, saved_step: int | None):
    def train(session: Session) -> None:
        begin(session, tmp_path, saved_step=saved_step)
        session.stop_if_signalled(state)
        signal.raise_signal(signal.SIGTERM)
        session.stop_if_signalled(state)  # nobody has been asked yet
        assert session.poll() == signal.SIGTERM
        session.stop_if_signalled(state)

    with pytest.raises(Interrupted, match="SIGTERM after step 0 of 9"), opened() as session:
        train(session)
    assert len(checkpoints_in(tmp_path)) == (saved_step is None)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_a_signal_in_a_step_makes_it_the_last_and_due(tmp_path: Path):
    with opened() as session:
        begin(session, tmp_path)
        session.advance(0)
        assert not session.ends
        signal.raise_signal(signal.SIGUSR1)
        session.advance(0)
        assert session.ends
        assert session.is_due


def test_what_a_session_entered_is_left_in_turn(tmp_path: Path):
    left: list[str] = []

    @contextlib.contextmanager
    def room(name: str):
        yield [name]
        left.append(name)

    with opened() as session:
        assert session.lock(room("folder")) == ["folder"]
        session.enter(room("loader"))
    assert left == ["loader", "folder"]
