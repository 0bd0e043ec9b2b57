"""What Triton needs beside its wheel, looked for on a PATH of our own."""

import sysconfig
from pathlib import Path

import pytest
import torch

from fastpmae.distributed.ranks import choose_device
from fastpmae_kernels import toolchain
from fastpmae_kernels.toolchain import missing_tools
from fastpmae_loaders.errors import UserError

COMPILER, HEADERS = "a C compiler", "Python's headers (Python.h)"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with Triton, an empty folder for programs, and an empty one for headers."""
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path / "include"))
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: object())
    return tmp_path


def put(path: Path) -> None:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def test_what_is_missing_is_named(system: Path, monkeypatch: pytest.MonkeyPatch):
    assert missing_tools() == f"{COMPILER} and {HEADERS}"
    put(system / "bin/cc")  # which Triton does not ask for
    assert missing_tools() == f"{COMPILER} and {HEADERS}"
    put(system / "bin/gcc")
    assert missing_tools() == HEADERS
    (system / "include/Python.h").touch()
    assert missing_tools() == ""
    monkeypatch.setenv("CC", "icx")  # Triton then asks for no other
    assert missing_tools() == COMPILER
    put(system / "bin/icx")
    assert missing_tools() == ""


def test_headers_may_lie_where_compilers_are_told_to_look(system: Path, monkeypatch: pytest.MonkeyPatch):
    (system / "elsewhere").mkdir()
    (system / "elsewhere/Python.h").touch()
    monkeypatch.setenv("CPATH", f"/nowhere:{system / 'elsewhere'}")
    assert missing_tools() == COMPILER


def test_without_triton_nothing_is_missed(system: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    assert missing_tools() == ""


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_without_a_compiler_gets_one_sentence(system: Path, monkeypatch: pytest.MonkeyPatch, device):
    """Before anything is made: without it the first step would end in Triton's traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="Triton needs a C compiler and Python's headers") as caught:
        choose_device(device)
    assert "\n" not in str(caught.value)
    assert "--device cpu" in str(caught.value)
    assert choose_device("cpu").type == "cpu"
    put(system / "bin/gcc")
    (system / "include/Python.h").touch()
    assert choose_device(device) == torch.device("cuda", 0)
