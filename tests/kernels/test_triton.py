"""The GPU kernels without a GPU: interpreted, and built ahead of time. Each in a process of its own.

Triton decides at import whether it interprets, and a process that interprets cannot build.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastpmae_kernels import certify

triton = pytest.importorskip("triton", reason="this torch comes without Triton, so there are no GPU kernels to test")

ROOT = Path(__file__).parents[2]
TRITON, NUMPY = (tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, np))


def run(*command: str, timeout: float = 500, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment | changes, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.slow
@pytest.mark.skipif(
    TRITON < (3, 7) and NUMPY >= (2, 4),
    reason=f"the interpreter of Triton {triton.__version__} makes a number of an array of one, which NumPy "
    f"{np.__version__} refuses: Triton 3.7, or NumPy before 2.4",
)
@pytest.mark.parametrize("file", ["interpreted.py", "interpreted_limits.py"])
def test_every_kernel_is_right_when_interpreted(file: str):
    plugins = ("-p", "no:cacheprovider", "-p", "tests.kernels.interpreting")
    # the plugin imports the kernels before annotations could be checked
    result = run("-m", "pytest", "-q", "-o", "addopts=", *plugins, f"tests/kernels/{file}", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.slow
def test_every_kernel_builds_for_a_gpu_of_each_maker_and_its_code_passes_the_checks():
    """Of the four that `make certify` and the nightly workflow build for; and the proof that each check can fail."""
    result = run("-m", "fastpmae_kernels.certify", "--dry-run", "--gpus", "sm_90", "gfx942")
    # What is known of Triton 3.6, and written in kernels/README.md.
    spilt = [" in folds " in line and line.endswith("for gfx942: 5 spills") for line in result.stderr.splitlines()]
    known = TRITON == (3, 6) and spilt and all(spilt)
    assert result.returncode == 0 or known, result.stderr
    built = [line.split(" | ")[:2] for line in result.stdout.splitlines() if " | sm_90 | " in line]
    assert ["| cross_entropy fp16", "sm_90"] in built
    assert len(built) == result.stdout.count(" | gfx942 | ") > 30
    assert " | sm_100 | " not in result.stdout


@pytest.mark.slow
def test_certify_refuses_a_process_that_interprets():
    result = run("-m", "fastpmae_kernels.certify", "--dry-run", TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "unset TRITON_INTERPRET" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("gpus", "dry_run", "sentence"),
    [
        (("sm_70",), True, "--gpus sm_70: choose of sm_80, sm_90, sm_100, gfx942"),
        (("sm_90",), False, "needs --dry-run"),
    ],
)
def test_a_table_of_some_gpus_is_not_written(gpus, dry_run, sentence, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    before = certify.README.read_bytes()
    assert certify.certify(dry_run, gpus) == 2
    assert sentence in capsys.readouterr().err
    assert certify.README.read_bytes() == before
