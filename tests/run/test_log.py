"""When a row of metrics is written: with the next step under way, or before what must not come before it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastpmae import Config
from fastpmae.run.log import Log, about_run

LOSSES = {"loss": 1.0, "loss_m": 1.0, "loss_c": 0.0, "loss_p": 0.0}
LATER: dict[str, Callable[[Log], object]] = {
    "the next step": lambda log: log.step(2, 0, []),
    "a sentence": lambda log: log.say("done"),
    "a checkpoint": lambda log: log.settle(),
    "the next row": lambda log: log.row({"step": 2, "epoch": 0.2}, lambda: LOSSES, 0.0, partial=False),
    "an evaluation": lambda log: log.evaluation(1, 1, lambda: {"knn_student": 50.0}),
}


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("what", LATER)
def test_a_row_is_written_before(what: str, tmp_path: Path):
    with Log(tmp_path, about_run(Config()), 0, 10) as log:
        log.start_clock(0)
        log.row({"step": 1, "epoch": 0.1}, lambda: LOSSES, 0.0, partial=False)
        assert rows(tmp_path) == []
        LATER[what](log)
        found = rows(tmp_path)
        assert found[0]["step"] == 1
        assert set(found[0]) == {"step", "epoch", *LOSSES, "images_per_second", "data_wait"}
        assert len(found) == (2 if what == "an evaluation" else 1)
    assert len(rows(tmp_path)) == (2 if what in ("an evaluation", "the next row") else 1)


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ({"loss": 0.5, "loss_m": 0.5}, "loss 0.500  "),
        (
            {"loss": 5.5, "loss_m": 0.5, "loss_p": 5.0, "patch_divergence": 1.25},
            "loss 5.500 (m 0.500 p 5.000, KL p 1.250)  ",
        ),
        (
            LOSSES | {"class_divergence": 0.75, "patch_divergence": 1.25},
            "loss 1.000 (m 1.000 c 0.000 p 0.000, KL c 0.750 p 1.250)  ",
        ),
    ],
)
def test_the_log_tells_what_a_run_has(figures: dict[str, float], told: str, tmp_path: Path, capfd: Any):
    with Log(tmp_path, about_run(Config()), 0, 10) as log:
        log.start_clock(0)
        log.row({"step": 1, "epoch": 0.1}, lambda: figures, 0.0, partial=False)
    assert f"step 1  epoch 0.10  {told}" in capfd.readouterr().err


def test_a_run_that_breaks_off_writes_its_last_row(tmp_path: Path):
    def breaks() -> None:
        with Log(tmp_path, about_run(Config()), 0, 10) as log:
            log.start_clock(0)
            log.row({"step": 1, "epoch": 0.1}, lambda: LOSSES, 0.0, partial=True)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks()
    assert [row["partial"] for row in rows(tmp_path)] == [True]


def test_a_tensorboard_that_fails_costs_no_row(tmp_path: Path):
    class Full:
        name = "TensorBoard"

        def row(self, row: dict[str, float]) -> None:
            raise OSError(28, "No space left on device")

        close = row

    with Log(tmp_path, about_run(Config().using(tensorboard=False)), 0, 10) as log:
        log.writers.append(Full())
        log.start_clock(0)
        for step in (1, 2):
            log.row({"step": step, "epoch": 0.1}, lambda: LOSSES, 0.0, partial=False)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert (tmp_path / "train.log").read_text().count("warning: TensorBoard takes no more rows") == 1
