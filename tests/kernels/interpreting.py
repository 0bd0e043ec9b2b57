"""What the tests of interpreted kernels share: a pytest plugin that `test_triton.py` names before Triton is imported.

Triton decides at import whether it interprets, so those tests run in processes of their own. Kernels write into memory
filled with NaN, and read matrices whose surroundings are NaN, so that neither a number that was never written nor one
from outside can pass unseen. bf16 is left to the compiled kernels: the interpreter's bf16 is wrong.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import math
import mmap

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpmae_kernels import traffic

DTYPES = (torch.float32, torch.float16)


def pytest_configure(config: pytest.Config) -> None:
    # Triton before 3.7 makes a number of an array of one: NumPy before 2.4 does it, and warns.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers allocate holds NaN (or a huge index) until a kernel writes to it."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def poisoned(tensor: Tensor) -> Tensor:
        return tensor.fill_(math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that interpreted kernels load and store from here on."""
    from triton.runtime.interpreter import InterpreterBuilder

    bytes_of = {"loaded": 0, "stored": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self, pointers, mask, *rest):
        bytes_of["loaded"] += int(mask.data.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        bytes_of["stored"] += int(mask.data.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
    return bytes_of


def assert_moved(counted: dict[str, int], model: traffic.Traffic) -> None:
    assert counted == {"loaded": model.read + model.again, "stored": model.written}
    counted.update(loaded=0, stored=0)


def amid_nan(values: Tensor) -> Tensor:
    """The same matrix inside a larger one of NaN: rows further apart than they are long."""
    rows, columns = values.shape
    around = torch.full((rows + 2, columns + 3), math.nan, dtype=values.dtype)
    around[1 : rows + 1, 1 : columns + 1] = values
    return around[1 : rows + 1, 1 : columns + 1]


def made_logits(rows: int, prototypes: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return amid_nan((torch.rand(rows, prototypes, generator=generator) * 2 - 1).to(dtype))


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def sparse(count: int, dtype: type) -> Tensor:
    """So many numbers, all 0, in memory that exists only where it is touched."""
    unreserved = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python knows the name from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | unreserved
    room = mmap.mmap(-1, count * np.dtype(dtype).itemsize, flags=flags)
    return torch.from_numpy(np.frombuffer(room, dtype=dtype))


def similarity_of(student: Tensor, teacher: Tensor, metric: str) -> Tensor:
    student, teacher = student.double(), teacher.double()
    if metric == "l2":
        return -(student.unsqueeze(2) - teacher.unsqueeze(1)).square().sum(dim=3)
    lengths = student.norm(dim=2).unsqueeze(2) * teacher.norm(dim=2).unsqueeze(1)
    return (student @ teacher.mT) / lengths


def made_draws(coins: list[tuple[int, ...]], sigma: float) -> tuple[Tensor, Tensor]:
    """An order of jitters of its own for each image, and these coins: jitter, gray, blur, solarise."""
    orders = [(0, 1, 2, 3), (3, 1, 2, 0), (2, 3, 0, 1), (1, 0, 3, 2)]
    choices = [(*orders[i % 4], *coin, 0) for i, coin in enumerate(coins)]
    factors = [(0.6 + 0.2 * i, 1.4 - 0.3 * i, 0.5 + 0.4 * i, 0.1 - 0.15 * i, sigma + i) for i in range(len(coins))]
    return torch.tensor(factors, dtype=torch.float64), torch.tensor(choices, dtype=torch.uint8)


def made_bytes(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
