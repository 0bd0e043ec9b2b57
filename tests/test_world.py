"""What a run computes on, and how it gets there."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpmae.labelled import half
from fastpmae.world import carried, has_bf16


@pytest.mark.parametrize("emulated", [False, True])
def test_emulated_bf16_counts_as_none(emulated: bool, monkeypatch: pytest.MonkeyPatch):
    """A GPU that torch says yes for by default, although its bf16 is emulated: a V100."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or not emulated
    )
    assert has_bf16(torch.device("cuda")) != emulated
    assert not has_bf16(torch.device("cpu"))
    assert not half(torch.device("cpu"))._enabled


@pytest.mark.parametrize("pinned", [False, True])
def test_what_goes_to_a_gpu_starts_in_pinned_memory(pinned: bool, monkeypatch: pytest.MonkeyPatch):
    """Nothing is pinned twice, and nothing that stays on the host."""
    done: list[Any] = []
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: pinned)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: done.append("pinned") or self)
    monkeypatch.setattr(
        Tensor, "to", lambda self, device, non_blocking: done.append((device.type, non_blocking)) or self
    )
    carried(torch.zeros(3), torch.device("cpu"))
    assert done == [("cpu", True)]
    carried(torch.zeros(3), torch.device("cuda"))
    assert done[1:] == ["pinned"] * (not pinned) + [("cuda", True)]
