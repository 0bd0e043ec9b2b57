"""Rows at Weights & Biases, whose package is played: what it is told of a run, and what becomes of its errors."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastpmae import UserError
from fastpmae.run.trackers import WandB


class Server:
    """wandb, as far as a run uses it. Its steps only grow: a row of an earlier one is dropped, as wandb drops it."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.rows: dict[str, list[dict[str, float]]] = {}
        self.axes: list[tuple[str, str]] = []
        self.error: Exception | None = None

    def init(self, **given: Any) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        self.begun.append(given)
        (given["dir"] / "wandb").mkdir(exist_ok=True)
        rows = self.rows.setdefault(given["id"], [])
        newest = len(rows) - 1

        def log(row: dict[str, float], step: int | None = None) -> None:
            nonlocal newest
            if step is None or step >= newest:
                newest = newest + 1 if step is None else step
                rows.append(row)

        def define_metric(name: str, step_metric: str) -> None:
            self.axes.append((name, step_metric))

        return SimpleNamespace(log=log, define_metric=define_metric, finish=lambda: None)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setitem(sys.modules, "wandb", server)
    return server


def folder_of(place: Path) -> Path:
    (place / "run").mkdir(parents=True)
    return place / "run"


def test_folders_of_one_name_are_two_runs_and_a_resumed_one_is_one(server: Server, tmp_path: Path):
    first, second = (folder_of(tmp_path / name) for name in "ab")
    for folder in (first, second, first):
        WandB(folder, {"epochs": 3}).close()
    ids = [begun["id"] for begun in server.begun]
    assert ids[0] == ids[2] != ids[1]
    assert all(begun["name"] == "run" and begun["config"] == {"epochs": 3} for begun in server.begun)


def test_a_run_of_an_earlier_version_keeps_its_name_there(server: Server, tmp_path: Path):
    folder = folder_of(tmp_path)
    (folder / "wandb").mkdir()
    WandB(folder, {})
    WandB(folder, {})
    assert [begun["id"] for begun in server.begun] == ["run", "run"]


def test_rows_that_are_computed_again_are_not_dropped(server: Server, tmp_path: Path):
    folder = folder_of(tmp_path)
    for steps in ((10, 20, 30), (20, 30, 40)):  # killed after 30, and taken up after 10
        tracker = WandB(folder, {})
        for step in steps:
            tracker.row({"step": step, "loss": 1 / step})
    (rows,) = server.rows.values()
    assert [row["step"] for row in rows] == [10, 20, 30, 20, 30, 40]
    assert set(server.axes) == {("*", "step")}


def test_what_it_cannot_do_is_a_sentence(server: Server, tmp_path: Path):
    server.error = RuntimeError("api_key not configured (no-tty).\ncall wandb.login()")
    with pytest.raises(UserError, match=r"--wandb: no run can begin there \(api_key not configured .*wandb login"):
        WandB(folder_of(tmp_path), {})
