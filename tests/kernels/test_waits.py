"""The Triton forms' own work on the host: with tensors that say they are on a GPU nothing waits or is copied."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpmae_kernels import nearest_patch_ref, patch_tokens_ref, sinkhorn_ref
from fastpmae_kernels.backend import written_on
from fastpmae_kernels.long_rows import LONGEST_ROW
from fastpmae_kernels.match import fold_of, nearest_patch_triton
from fastpmae_kernels.patch_tokens import patch_tokens_triton
from fastpmae_kernels.photometric_gpu import photometric_triton
from fastpmae_kernels.prototype_loss import (
    prototype_loss_gradient_triton,
    prototype_loss_over_triton,
    prototype_loss_triton,
    scale_rows_triton,
)
from fastpmae_kernels.sinkhorn import assigned_sums_triton, column_logsumexp_triton
from tests.devices import Waits

GPU = torch.device("cuda", 0)
MODULES = ("long_rows", "match", "patch_tokens", "photometric_gpu", "prototype_loss", "sinkhorn")


def there(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def logits(prototypes: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = there(6, dtype=torch.int64)
    return there(6, prototypes), there(6, prototypes), there(prototypes), index


def images() -> Tensor:
    return there(2, 3, 16, 16, dtype=torch.uint8)


NUMBERS = [0.5, 0.5, 0.5]
FORMS: dict[str, Callable[[], Any]] = {
    "match": lambda: nearest_patch_triton(there(2, 12, 8), there(2, 12, 8), True, []),
    "match within folds": lambda: nearest_patch_triton(there(2, 12, 8), there(2, 12, 8), True, [5, 4, 3]),
    "its plain form": lambda: nearest_patch_ref(there(2, 12, 8), there(2, 12, 8), "cosine", "fold", (5, 4, 3)),
    "loss": lambda: prototype_loss_triton(*logits(), 0.05, 0.1),
    "loss over the logits": lambda: prototype_loss_over_triton(*logits(), 0.05, 0.1, 1.0),
    "loss and gradient": lambda: prototype_loss_gradient_triton(*logits(), 0.05, 0.1, 1.0),
    "loss of long rows": lambda: prototype_loss_over_triton(*logits(LONGEST_ROW + 1), 0.05, 0.1, 1.0),
    "gradient's rows": lambda: scale_rows_triton(there(6, 40), there(6)),
    "columns": lambda: column_logsumexp_triton(there(70, 40), 0.05),
    "sweep": lambda: assigned_sums_triton(there(70, 40), there(40), 0.05),
    "sweep over long rows": lambda: assigned_sums_triton(there(70, LONGEST_ROW + 1), there(LONGEST_ROW + 1), 0.05),
    "the labels' plain form": lambda: sinkhorn_ref(there(70, 40)),
    "patches": lambda: patch_tokens_triton(
        images(), there(2, 3, dtype=torch.int64), 4, torch.bfloat16, NUMBERS, NUMBERS
    ),
    "patches' plain form": lambda: patch_tokens_ref(images(), there(2, 3, dtype=torch.int64), 4),
    "colours": lambda: photometric_triton(
        images(), there(2, 5, dtype=torch.float64), there(2, 9, dtype=torch.uint8), 128, torch.bfloat16, NUMBERS,
        NUMBERS,
    ),
}  # fmt: skip


class Launched:
    """In a Triton kernel's place: takes a grid and arguments, and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **meta: None


@pytest.mark.parametrize("form", FORMS)
def test_no_form_for_a_gpu_waits_or_copies(form: str, monkeypatch: pytest.MonkeyPatch):
    for name in MODULES:
        module = importlib.import_module(f"fastpmae_kernels.{name}")
        for kernel in [each for each in vars(module) if each.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Launched())
    with FakeTensorMode(), Waits() as waits:
        result = FORMS[form]()
        for tensor in result if isinstance(result, tuple) else [result]:
            assert tensor is None or tensor.device == GPU
    assert waits.found == []


def test_what_a_device_writes_itself_is_what_a_list_says():
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(
            written_on(torch.device("cpu"), (0.485, 0.1, 3), dtype), torch.tensor([0.485, 0.1, 3], dtype=dtype)
        )
    assert fold_of((3, 0, 2), torch.device("cpu")).tolist() == [0, 0, 0, 2, 2]
    assert fold_of((1,), torch.device("cpu")).dtype == torch.int32
