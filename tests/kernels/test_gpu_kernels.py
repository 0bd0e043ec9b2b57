"""Every kernel against float64 where it runs: on a GPU the Triton form, and on the CPU, for trying, the CPU's own.

The references and bounds are those of `benchmarks.gpu.kernel_stages`: one place says how far a kernel may be off.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import kernel_stages
from benchmarks.gpu.kernel_stages import BF16, DTYPES, FP16, FP32, ODD


class Record:
    """Every check is asserted; a number that is none fails."""

    def check(self, name: str, away: float, limit: float, **more: Any) -> None:
        assert away <= limit, (name, more)

    def note(self, name: str, ok: bool = True, **more: Any) -> None:
        assert ok, (name, more)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def task(request: pytest.FixtureRequest) -> Any:
    """What the checks ask of a task: where to compute, and small sizes on the CPU."""
    device = torch.device(request.param)
    return SimpleNamespace(
        device=device, cuda=device.type == "cuda", tiny=device.type == "cpu", record=Record(),
    )  # fmt: skip


# beside odd ones a row longer than a program's registers hold
SHAPES = (*ODD, (48, 700))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_sinkhorn(task: Any, rows: int, columns: int, dtype: torch.dtype):
    kernel_stages.check_sinkhorn(task, rows, columns, dtype)


@pytest.mark.parametrize(
    ("dtype", "teacher"), [(FP32, FP32), (FP16, FP16), (BF16, BF16), (FP32, FP16), (BF16, FP16)], ids=str
)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_prototype_cross_entropy(task: Any, rows: int, columns: int, dtype: torch.dtype, teacher: torch.dtype):
    """The last pair is the trainer's under autocast: the student in bf16, the teacher in fp16."""
    kernel_stages.check_cross_entropy(task, rows, columns, dtype, teacher)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(9408, 4096), (48, 20_000)])
def test_at_the_paper_s_size(rows: int, columns: int, dtype: torch.dtype):
    task: Any = SimpleNamespace(device=torch.device("cuda"), cuda=True, tiny=False, record=Record())
    kernel_stages.check_sinkhorn(task, rows, columns, dtype)
    kernel_stages.check_cross_entropy(task, rows, columns, dtype, FP16)


@pytest.mark.parametrize("scope", ["image", "fold"])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("masked", "dim", "folds"), [(13, 24, (5, 4, 4)), (147, 384, (49, 49, 49))])
def test_nearest_patch(
    task: Any, masked: int, dim: int, folds: tuple[int, ...], dtype: torch.dtype, metric: str, scope: str
):
    kernel_stages.check_nearest(task, masked, dim, folds, dtype, metric, scope)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patch_tokens(task: Any, dtype: torch.dtype):
    kernel_stages.check_patch_tokens(task, dtype)


def test_photometric(task: Any):
    kernel_stages.check_photometric(task)


def test_from_features(task: Any):
    kernel_stages.check_from_features(task)


@pytest.mark.gpu
def test_offsets_past_32_bits():
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("takes 25 GB of the GPU's memory")
    task: Any = SimpleNamespace(device=torch.device("cuda"), cuda=True, tiny=False, record=Record())
    kernel_stages.check_far_offsets(task)


def test_a_number_that_is_none_is_no_pass():
    with pytest.raises(AssertionError):
        Record().check("x", float("nan"), 1.0)
