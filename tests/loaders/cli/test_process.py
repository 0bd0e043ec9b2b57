"""ctrl-C at any moment: one sentence, no traceback; and a second one ends whatever goes on."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastpmae_loaders.cli.process import command_of
from tests.made import REPOSITORY, module_of
from tests.test_train import environment

COMMANDS = ("train", "write", "view", "report", "embed", "eval", "export", "plan")


@pytest.mark.parametrize(
    ("arguments", "original", "command"),
    [
        (
            ["/usr/bin/fastpmae-train", "--out", "x"],
            ["python", "/usr/bin/fastpmae-train", "--out", "x"],
            "fastpmae-train",
        ),
        (["-m", "--out", "x"], ["python", "-u", "-m", "fastpmae.train", "--out", "x"], "fastpmae-train"),
        (["-m", "train"], ["python", "-m", "torch.distributed.run", "-m", "fastpmae.train"], None),
        (["-m", "a", "b"], ["python", "-m", "fastpmae_loaders.write.cli", "a", "b"], "fastpmae-write"),
        (["-m", "a", "b"], ["python", "-m", "fastpmae.evaluate.features", "a", "b"], "fastpmae-embed"),
        (["-m", "knn"], ["python", "-m", "fastpmae.evaluate.protocols", "knn"], "fastpmae-eval"),
        (["-m"], ["python", "-m", "fastpmae_kernels.certify"], None),
        (["-m", "tests"], ["python", "-m", "pytest", "tests"], None),
        (["train.py"], ["python", "train.py"], None),
        (["-c"], ["python", "-c", "import fastpmae"], None),
        ([""], ["python"], None),
        ([], [], None),
    ],
)
def test_which_processes_are_commands(arguments: list[str], original: list[str], command: str | None) -> None:
    assert command_of(arguments, original) == command


def test_a_program_that_imports_us_keeps_its_signals() -> None:
    words = [sys.executable, "-m", "tests.programs.interrupt_handler"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "default_int_handler\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "later"), [*((name, 0) for name in COMMANDS), ("train", 60), ("train", 700), ("write", 60), ("eval", 700)]
)
def test_ctrl_c_while_a_command_starts_is_a_sentence(name: str, later: int) -> None:
    """At once when our package is there, which is each command's own; and so many imports later, which is Python's."""
    module = module_of(name)
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", module, "missing", "missing"],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        # what calls `begin`: the package itself, or of the loaders the part that is a command
        if line.split("|")[-1].strip() in ("fastpmae", "fastpmae_loaders.write"):
            break
    for _, _ in zip(range(later), process.stderr, strict=False):
        pass
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert "Traceback" not in said
    if process.returncode != 2:  # of one that has found out by then that nothing is there
        assert process.returncode == 130
        assert said.endswith(f"fastpmae-{name}: interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("stuck", ["compiled", "ending", "sleeping"])
def test_a_second_ctrl_c_ends_the_process_at_once(stuck: str, tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "tests/programs/stuck_command.py", tmp_path / "fastpmae-made")
    process = subprocess.Popen(
        [sys.executable, tmp_path / "fastpmae-made", tmp_path / "begun", stuck],
        env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    if stuck != "sleeping":
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == 130
    words = ["ended at once, by a second ctrl-C"] * (stuck != "sleeping") + ["interrupted"] * (stuck != "compiled")
    assert said.strip() in [f"fastpmae-made: {word}" for word in words]
