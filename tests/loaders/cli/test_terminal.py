"""A terminal, a pipe or a disk behind what a command says may go away: no work ends by that, and none is told done."""

import ast
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastpmae import Config
from fastpmae.pretraining.cli import read_command
from fastpmae.run.checkpoint import checkpoints_in, step_of
from fastpmae.run.log import Log, about_run, read_rows
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.cli.terminal import Outlet, say, tell
from fastpmae_loaders.errors import UserError
from tests.made import REPOSITORY, write_tree
from tests.test_train import environment, flags_of, killed_at_end, rows_of, wait_for

FULL = Path("/dev/full")


class Broken(io.StringIO):
    """A stream that fails as a full disk (28) or a pipe without a reader (32) does."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("stream", [None, Broken(28), Broken(32)])
def test_what_cannot_be_written_is_dropped(stream: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    say("nobody hears it")
    outlet = Outlet(stream)
    print("nor this", file=outlet, flush=True)
    assert not outlet.isatty()
    assert (outlet.lost is None) == (stream is None)


def test_a_stream_that_was_closed_is_no_error() -> None:
    stream = io.StringIO()
    stream.close()
    outlet = Outlet(stream)
    outlet.write("lost")
    outlet.flush()
    outlet.end()
    assert isinstance(outlet.lost, ValueError)


def test_signs_that_an_encoding_lacks_are_written_as_numbers() -> None:
    bytes_written = io.BytesIO()
    outlet = Outlet(io.TextIOWrapper(bytes_written, encoding="ascii"))
    print("class 猫, ü", file=outlet, flush=True)
    assert bytes_written.getvalue() == b"class \\u732b, \\xfc\n"


@pytest.mark.parametrize(("number", "status"), [(28, 1), (32, 0)])
def test_status_0_only_when_what_is_printed_arrives(
    number: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a full disk it does not; whoever closed a pipe (head, less) has seen enough."""
    monkeypatch.setattr(sys, "stdout", Broken(number))
    done = []

    def command() -> None:
        print("a figure")
        done.append(True)

    assert exit_with_sentence("fastpmae-made", command) == status
    assert done == [True]
    sentence = "fastpmae-made: error: the work is done, but what it prints cannot be written: No space left on device\n"
    assert capsys.readouterr().err == (sentence if status else "")


HOSTILE = "\x1b]0;owned\x07\x1b[31mred\r\x9b2J\u202e"
"""A name that sets a title and a colour, goes back over what stands there, clears it, and turns words round."""


def test_names_are_shown_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.log").touch()
    say(f"of {HOSTILE}\nand on")
    tell(f"of {HOSTILE}\nand on")
    Progress(live=True).tell(f"of {HOSTILE}")
    with Log(tmp_path, about_run(Config().using(tensorboard=False)), 0, 1) as log:
        log.say(f"of {HOSTILE}")
    for sentence in (
        str(UserError(f"of {HOSTILE}\nand on")),
        (tmp_path / "train.log").read_text(),
        *capsys.readouterr(),
    ):
        assert "of \\x1b]0;owned\\x07\\x1b[31mred\\r\\x9b2J\\u202e" in sentence
        assert all(char.isprintable() or char == "\n" for char in sentence)


def test_names_are_shown_and_not_obeyed_beside_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal, where the bar itself is drawn with escapes."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(live=True)
    with progress.count(1, "images"):
        progress.tell(f"a progress of {HOSTILE}")
    with Log(tmp_path, about_run(Config().using(tensorboard=False)), 0, 1) as log:
        log.say(f"a log of {HOSTILE}")
    said = terminal.getvalue()
    assert "a progress of \\x1b]0;owned" in said
    assert "a log of \\x1b]0;owned" in said
    assert "\x1b]0;" not in said
    assert "\x9b" not in said


def test_names_are_shown_and_not_obeyed_as_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a stranger's run or settings, in the help for it."""
    hostile = Config().using(beton=f"/{HOSTILE}", name=HOSTILE, progressive_resolution=(HOSTILE, "224"))
    (tmp_path / "config.json").write_text(json.dumps(hostile.groups()))
    for words in (["--config", str(tmp_path / "config.json")], ["--resume", "--out", str(tmp_path)]):
        with pytest.raises(SystemExit):
            read_command([*words, "--help"])
        said = capsys.readouterr().out
        assert "\\x1b]0;owned" in said
        assert all(char.isprintable() or char == "\n" for char in said)


def test_nothing_is_printed_past_the_terminal() -> None:
    """Whatever a command says goes through `say` and `tell`, which make names printable."""
    found = [
        f"{path.name}:{node.lineno}"
        for package in ("fastpmae", "loaders/fastpmae_loaders")
        for path in sorted((REPOSITORY / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert [place.split(":")[0] for place in found] == ["terminal.py"]


def in_shell(words: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A line for bash, in which "$@" are `arguments`."""
    return subprocess.run(
        ["bash", "-c", words, "bash", *map(str, arguments)],
        env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize(
    ("where", "status"),
    [
        (">&- 2>&-", 0),
        ("<&- >&- 2>&-", 0),
        ("> /dev/full", 1),
        ("2> /dev/full", 0),
        ("| true; exit ${PIPESTATUS[0]}", 0),
    ],
)
def test_a_file_is_written_whoever_listens(where: str, status: int, tmp_path: Path) -> None:
    source, out = write_tree(tmp_path / "tree", 4), tmp_path / "out.beton"
    command = [sys.executable, "-m", "fastpmae_loaders.write.cli", source, out, "--workers", "1"]
    done = in_shell(f'"$@" {where}', *command)
    assert done.returncode == status, done.stderr
    assert out.exists()
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.slow
def test_bad_input_is_bad_input_whoever_listens(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "tree", 4)
    (source / "class_0" / "bad.jpg").write_text("no image")
    command = [sys.executable, "-m", "fastpmae_loaders.write.cli", source, tmp_path / "out.beton", "--workers", "1"]
    assert in_shell('"$@" 2>&1 | true; exit ${PIPESTATUS[0]}', *command).returncode == 2
    assert in_shell('"$@" > /dev/full 2>&1', *command).returncode == 2
    assert not (tmp_path / "out.beton").exists()


def rows_so_far(folder: Path) -> int:
    """The rows of a run that goes on: of one that is being written, a reader may see a part."""
    return len(read_rows(folder / "metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_run_whose_reader_has_gone_saves_what_it_has_done(number: signal.Signals, tiny: Config) -> None:
    """`fastpmae-train ... 2>&1 | tee log` and ctrl-C, which ends tee; or the terminal's window is closed."""
    config = tiny.using(epochs=10_000, log_every=1, save_every=60.0)
    folder = config.run.out
    assert folder is not None
    process = subprocess.Popen(
        [sys.executable, "-m", "fastpmae.train", *flags_of(config)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    with killed_at_end(process):
        assert process.stdout is not None
        while "step 2 " not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        wait = rows_so_far(folder) + 3
        while rows_so_far(folder) < wait:
            assert process.poll() is None, "a run ends because nobody reads what it says"
        process.send_signal(number)
        assert process.wait(timeout=120) == 128 + number
    assert step_of(checkpoints_in(folder)[0]) == rows_of(folder)[-1]["step"] >= wait


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
def test_a_run_goes_to_its_end_when_it_cannot_say_so(tiny: Config) -> None:
    config = tiny.using(steps=3)
    done = in_shell('"$@" >&- 2> /dev/full', sys.executable, "-m", "fastpmae.train", *flags_of(config))
    assert done.returncode == 0
    assert config.run.out is not None
    assert [step_of(path) for path in checkpoints_in(config.run.out)] == [3]
    assert (config.run.out / "train.log").read_text().splitlines()[-1].startswith("done: 3 of")


@pytest.mark.slow
def test_nohup_is_heard(tiny: Config) -> None:
    """A run that was started deaf to the end of its terminal goes on after it."""
    config = tiny.using(epochs=10_000, log_every=1)
    assert config.run.out is not None
    process = subprocess.Popen(
        ["nohup", sys.executable, "-m", "fastpmae.train", *flags_of(config)],
        env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    with killed_at_end(process):
        wait_for(config.run.out / "metrics.jsonl", process)
        process.send_signal(signal.SIGHUP)
        seen = rows_so_far(config.run.out)
        while rows_so_far(config.run.out) < seen + 3:
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 128 + signal.SIGTERM
