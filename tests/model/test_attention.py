"""Attention of packed sequences against a block-diagonal mask in memory, and xformers' side of the switch."""

import sys
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpmae.model import attention as switch
from fastpmae.model.attention import attention, use
from fastpmae.pretraining.step import compute_targets, student_loss
from fastpmae_loaders.errors import UserError
from tests.tiny import drop_path_scale_of, made_batch, tiny_config, tiny_networks

CPU = torch.device("cpu")


class Mask:
    """xformers' BlockDiagonalMask as far as its documentation promises: made from lengths, for a batch of one."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: Any = None, *, device: torch.device | None = None) -> "Mask":
        assert kv_seqlen is None
        assert device is not None, "on the wrong device the mask would be carried over at each call"
        return cls(q_seqlen)

    def materialize(self) -> Tensor:
        of = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        return torch.where(of[:, None] == of[None, :], 0.0, -torch.inf).double()


class Ops:
    """A stand-in for `xformers.ops` with its layout: [batch, tokens, heads, dim]."""

    fmha = SimpleNamespace(BlockDiagonalMask=Mask)

    def __init__(self) -> None:
        self.masks: list[Mask | None] = []

    def memory_efficient_attention(self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Mask | None) -> Tensor:
        self.masks.append(attn_bias)
        bias = 0.0
        if attn_bias is not None:
            assert len(query) == len(key) == len(value) == 1
            assert sum(attn_bias.lengths) == query.shape[1] == key.shape[1]
            bias = attn_bias.materialize()
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[3] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", (scores + bias).softmax(dim=-1), value)


def made(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in float64."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(3, *shape, generator=generator, dtype=torch.float64).requires_grad_()
    return whole[0], whole[1], whole[2]


def gradients(result: Tensor, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 2, result.numel(), dtype=torch.float64).view(result.shape)
    return torch.autograd.grad((result * weights).sum(), operands, retain_graph=True)


@pytest.mark.parametrize(
    "runs", [((2, 5), (3, 4)), ((1, 1), (1, 7)), ((4, 3),), ((1, 6), (1, 5), (2, 1)), ((3, 1), (1, 2))], ids=str
)
@pytest.mark.parametrize("ops", [None, Ops()], ids=["sdpa", "xformers"])
def test_packed_sequences_are_those_of_a_block_diagonal_mask(runs: switch.SequenceLengths, ops: Ops | None):
    lengths = [length for count, length in runs for _ in range(count)]
    operands = made(1, sum(lengths), 2, 8)
    query, key, value = (each.transpose(1, 2) for each in operands)
    masked = F.scaled_dot_product_attention(query, key, value, attn_mask=Mask(lengths).materialize()).transpose(1, 2)
    with use("sdpa" if ops is None else "xformers", CPU, ops):
        packed = attention(*operands, runs)
    torch.testing.assert_close(packed, masked, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(packed, operands), gradients(masked, operands), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_fewer_queries_than_keys_on_both_sides():
    query, key, value = made(3, 7, 2, 8)
    with use("xformers", CPU, Ops()):
        found = attention(query[:, 4:], key, value)
    assert found.shape == (3, 3, 2, 8)
    torch.testing.assert_close(found, attention(query, key, value)[:, 4:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fold_sizes", [(5, 4, 4), (4, 4, 4)], ids=str)
def test_the_whole_step_through_xformers(fold_sizes: tuple[int, ...]):
    """The same losses and gradients in float64; uneven folds are one packed pass, equal ones a dense one."""
    config = tiny_config(folds=3)
    student, teachers = tiny_networks(config)
    batch, drop_path_scale = made_batch(1, 2, fold_sizes), drop_path_scale_of(config, 2)
    ops = Ops()

    def run() -> tuple[Tensor | None, ...]:
        student.zero_grad()
        losses = student_loss(student, batch, drop_path_scale, compute_targets(teachers, batch, config), config)
        losses.total.backward()
        return (*losses, *(parameter.grad for parameter in student.parameters() if parameter.grad is not None))

    expected = run()
    with use("xformers", CPU, ops):
        found = run()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    masks = [mask.lengths for mask in ops.masks if mask is not None]
    # two teachers of two blocks
    assert masks == ([] if fold_sizes == (4, 4, 4) else [[6, 6, 5, 5, 5, 5]] * 4)
    assert len(ops.masks) == 4 + config.network.depth + config.network.decoder_depth


def test_a_mask_is_made_once():
    ops, operands = Ops(), made(1, 9, 2, 8)
    with use("xformers", CPU, ops):
        for _ in range(3):
            attention(*operands, ((1, 5), (1, 4)))
    assert len({id(mask) for mask in ops.masks}) == 1


def test_the_switch_is_put_back():
    with pytest.raises(ZeroDivisionError), use("xformers", CPU, Ops()):
        _ = 1 / (switch._xformers is None)
    assert switch._xformers is None
    for setting in ("auto", "sdpa"):
        with use(setting, torch.device("cuda")):
            assert switch._xformers is None


def test_xformers_where_there_is_none_gets_a_sentence(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="GPUs alone"), use("xformers", CPU):
        pass
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(UserError, match=r"pip install 'fastpmae\[xformers\]'"), use("xformers", torch.device("cuda")):
        pass
    assert switch._xformers is None


def test_a_build_for_another_torch_gets_a_sentence(monkeypatch: pytest.MonkeyPatch):
    """Such a wheel can be imported and has no operator, as on the CPU."""

    def none(*arguments: Any, **others: Any) -> Tensor:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")

    ops = SimpleNamespace(memory_efficient_attention=none)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **others: None)
    with pytest.raises(UserError, match="does not fit torch"), use("xformers", torch.device("cuda")):
        pass


def test_the_stand_ins_mask_is_xformers_own():
    """Where the package is installed; its operators want a GPU, its masks do not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bias = pytest.importorskip("xformers.ops.fmha.attn_bias", exc_type=ImportError)
        ours = Mask.from_seqlens([3, 2, 2], device=CPU)
        theirs = bias.BlockDiagonalMask.from_seqlens([3, 2, 2], device=CPU)
    assert torch.equal(ours.materialize(), theirs.materialize((1, 7, 7))[0].double())
