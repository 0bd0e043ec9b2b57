"""`bench_dense`: what is there is not computed again, what failed goes on, and the page says what was found."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_dense
from benchmarks.bench_dense import BEGIN, END, Evening
from benchmarks.common import SHARED
from fastpmae_loaders.errors import RunError, UserError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The calls of our commands, which leave results of made figures at once."""
    made: list[list[str]] = []

    def call(module: str, *words: object) -> None:
        made.append([module, *map(str, words)])
        if module.endswith("protocols"):
            kind, folder = str(words[0]), Path(str(words[words.index("--out") + 1]))
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            network, seed = words[words.index("--network") + 1], int(str(words[words.index("--seed") + 1]))
            value = (50.0 if network == "student" else 40.0) + seed
            table = [{"features": "student", "knn": {"miou": 36.51}, "linear": {"miou": 26.49}},
                     {"features": "place alone", "knn": {"miou": 16.6}, "linear": None}]  # fmt: skip
            found = {"miou": value, "ap50": value, "ap": value / 2, "table": table}
            (folder / f"{kind}-{network}.json").write_text(json.dumps(found))

    monkeypatch.setattr(bench_dense, "run", call)
    monkeypatch.setattr(Evening, "prepare", lambda self: None)
    return made


def bench(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: Any) -> int:
    command = ["bench_dense", "--out", folder, "--plot", folder / "plot.png", *words]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    return bench_dense.bench()


def test_the_page_holds_every_seed_and_nothing_is_computed_twice(tmp_path: Path, monkeypatch, calls):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    words = ("--results", tmp_path / "results", "--page", page, "--seeds", 0, 1, "--json", tmp_path / "rows.json")
    assert bench(monkeypatch, tmp_path, *words) == 0
    assert len(calls) == 1 + 1 + 2 * 2 + 2 * 2
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| student | 36.5 | 26.5 |\n| place alone | 16.6 |  |" in text
    assert "| `segment` | mIoU | 50.0, 51.0 | 40.0, 41.0 |" in text
    assert "| `detect` | AP50 | 50.0, 51.0 | 40.0, 41.0 |\n| `detect` | AP | 25.0, 25.5 | 20.0, 20.5 |" in text
    ratios = {row["case"]: row["ratio"] for row in json.loads((tmp_path / "rows.json").read_text())}
    assert ratios["segment, student"] == pytest.approx(50.5 / 40.5)
    (tmp_path / "results/segment-random-1.json").unlink()
    assert bench(monkeypatch, tmp_path, *words) == 0
    # the pretraining looks whether it is done, and the run that is there goes on
    assert [call[0].rpartition(".")[2] for call in calls[10:]] == ["train", "protocols"]
    assert calls[-1][-1] == "--resume"
    assert page.read_text() == text


def test_a_page_without_a_place_is_told(tmp_path: Path, monkeypatch, calls):
    (tmp_path / "page.md").write_text("nothing\n")
    with pytest.raises(UserError, match=r"page.md has no place for these tables: put the lines"):
        bench(monkeypatch, tmp_path, "--tasks", "patches", "--page", tmp_path / "page.md")
    assert len(calls) == 2


def test_a_command_that_fails_ends_it():
    with pytest.raises(RunError, match=r"fastpmae.train failed; the same command goes on where it stopped"):
        bench_dense.run("fastpmae.train", "--no-such-flag")


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_a_quick_one_runs(tmp_path: Path, monkeypatch):
    assert bench(monkeypatch, tmp_path, "--quick", "--tasks", "segment", "--networks", "random", "--seeds", 0) == 0
    found = json.loads((tmp_path / "results/segment-random-0.json").read_text())
    assert (found["images"], found["classes"]) == (101, 11)
    assert found["segment"]["iterations"] == 2
