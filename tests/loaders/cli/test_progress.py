"""What a count says of its rate, and the one bar there is."""

import ast
import io
import sys

import pytest

from fastpmae_loaders.cli import progress
from fastpmae_loaders.cli.progress import Bar, Progress
from tests.made import HOMES


@pytest.mark.parametrize(("pause", "said"), [(4.0, "4.0 s each"), (0.01, "100 parts/s"), (1.0, "1 parts/s")])
def test_the_rate_leaves_out_the_first_and_reads_well_when_slow(monkeypatch, pause: float, said: str):
    now = 50.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    counted = Progress()
    with counted.count(3, "parts"):
        now += 30  # a slow start is no part of the rate
        for _ in range(3):
            counted.advance()
            now += pause
        now -= pause
        assert counted.rate() == said


def test_nothing_done_has_no_rate():
    counted = Progress()
    with counted.count(3, "parts"):
        assert counted.rate() == "0 parts/s"


def test_a_count_within_a_count_is_no_part_of_it(monkeypatch, capsys):
    """A training tests itself in its midst, and goes on counting its own images after that."""
    now = 50.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    counted = Progress(live=True)
    with counted.count(8, "images"):
        for _ in range(4):
            counted.advance()
            now += 10
        with counted.count(2, "test images"):
            for _ in range(2):
                counted.advance()
                now += 100
        assert counted.rate() == "13.3 s each"
        for _ in range(4):
            counted.advance()
            now += 10
    assert counted.rate() == "11.4 s each"
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == ["2 of 8 images, 10.0 s each", "3 of 8 images, 10.0 s each", "4 of 8 images, 10.0 s each"]
    assert said[3] == "2 of 2 test images, 100.0 s each"
    assert said[-1] == "8 of 8 images, 10.0 s each"


def test_the_bar_of_a_count_comes_back_after_one_within_it(monkeypatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_UPDATES", 0.0)
    counted = Progress(live=True)
    with counted.count(8, "images"):
        counted.advance(3)
        with counted.count(5, "test images"):
            counted.advance(2)
        within = len(stream.getvalue())
        counted.advance(4)
    assert "3/8" in stream.getvalue()[:within]
    assert "2/5" in stream.getvalue()[:within]
    assert "7/8" in stream.getvalue()[within:]
    assert "2/5" not in stream.getvalue()[within:]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_in_a_terminal_alone(monkeypatch) -> None:
    for stream, live in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with Bar(4, "counting", done=1, stays=True) as bar:
            assert bar.live == live
            bar.update(3, note="[red]loss 2.5")
            bar.tell("a [bold]line")
        said = stream.getvalue()
        # what stands in brackets is no markup
        assert "a [bold]line" in said
        assert ("[red]loss 2.5" in said) == ("3/4" in said) == ("counting" in said) == live
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert not Bar(4, shown=False).live


def test_there_is_one_bar() -> None:
    """Every other goes through it, and so through what makes names printable and lets a terminal go away."""
    users = [
        path.name
        for package, home in HOMES.items()
        for path in (home / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and node.module == "rich.progress")
        or (isinstance(node, ast.ImportFrom) and node.module == "rich" and node.names[0].name == "progress")
    ]
    assert users == ["progress.py"]
