"""The GPU kernels without a GPU: interpreted, and built ahead of time. Each in a process of its own.

Triton decides at import whether it interprets, and a process that interprets cannot build.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="this torch comes without Triton, so there are no GPU kernels to test")

ROOT = Path(__file__).parents[2]


def run(*command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment | changes, capture_output=True, text=True, timeout=500
    )


@pytest.mark.slow
@pytest.mark.parametrize("file", ["interpreted.py", "interpreted_limits.py"])
def test_every_kernel_is_right_when_interpreted(file: str):
    plugins = ("-p", "no:cacheprovider", "-p", "tests.kernels.interpreting")
    result = run("-m", "pytest", "-q", *plugins, f"tests/kernels/{file}", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.slow
def test_every_kernel_builds_for_every_gpu_and_its_code_passes_the_checks():
    result = run("-m", "fastpmae_kernels.certify", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "| cross_entropy fp16 | sm_90 |" in result.stdout


def test_certify_refuses_a_process_that_interprets():
    result = run("-m", "fastpmae_kernels.certify", "--dry-run", TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "unset TRITON_INTERPRET" in result.stderr
    assert "Traceback" not in result.stderr
