"""Layers that compute their input anew have the same results and gradients as torch's, and keep less."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastpmae.model import cpu
from fastpmae.model.recompute import add_mlp, attend, gelu_linear, norm_linear
from fastpmae.model.vit import Block

FORMS: dict[str, Callable[[Tensor, nn.LayerNorm, nn.Linear], tuple[Tensor, Tensor]]] = {
    "norm": lambda tokens, norm, linear: (norm_linear(tokens, norm, linear), linear(norm(tokens))),
    "gelu": lambda tokens, norm, linear: (
        gelu_linear(tokens, linear) + 0 * norm(tokens).sum(),
        linear(nn.functional.gelu(tokens)) + 0 * norm(tokens).sum(),
    ),
}


def layers(dtype: torch.dtype) -> tuple[Tensor, nn.LayerNorm, nn.Linear]:
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(12, eps=1e-6).to(dtype), nn.Linear(12, 7).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return torch.randn(3, 5, 12, dtype=dtype).requires_grad_(), norm, linear


def check(ours: Tensor, plain: Tensor, leaves: list[Tensor], tolerance: float) -> None:
    """Results and gradients agree, in value and in type."""
    assert ours.dtype == plain.dtype
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
    towards = torch.randn(ours.shape, dtype=ours.dtype)
    expected = torch.autograd.grad(plain, leaves, towards)
    for gradient, truth in zip(torch.autograd.grad(ours, leaves, towards), expected, strict=True):
        assert gradient.dtype == truth.dtype
        torch.testing.assert_close(gradient, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-12), (True, 2e-2)])
def test_results_and_gradients_are_torchs(form: str, autocast: bool, tolerance: float):
    tokens, norm, linear = layers(torch.float32 if autocast else torch.float64)
    leaves = [tokens, *norm.parameters(), *linear.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, plain = FORMS[form](tokens, norm, linear)
    assert torch.equal(ours, plain)
    check(ours, plain, leaves, tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_finite_differences(form: str):
    tokens, norm, linear = layers(torch.float64)
    assert torch.autograd.gradcheck(lambda t, *_: FORMS[form](t, norm, linear)[0], (tokens, *linear.parameters()))


def mlp_layers(dtype: torch.dtype) -> tuple[Tensor, nn.LayerNorm, nn.Linear, nn.Linear]:
    tokens, norm, first = layers(dtype)
    return tokens, norm, first, nn.Linear(7, 12).to(dtype)


@pytest.mark.parametrize("rows", [1, 4, 15, 1024])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-12), (True, 2e-2)])
def test_an_mlp_some_rows_at_a_time_is_torchs(monkeypatch, rows: int, scaled: bool, autocast: bool, tolerance: float):
    monkeypatch.setattr(cpu, "ROWS", rows)
    tokens, norm, first, second = mlp_layers(torch.float32 if autocast else torch.float64)
    scale = torch.tensor([0, 1.5, 2], dtype=tokens.dtype)[:, None, None] if scaled else None
    leaves = [tokens, *norm.parameters(), *first.parameters(), *second.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = add_mlp(tokens, norm, first, second, scale)
        branch = second(nn.functional.gelu(first(norm(tokens))))
        plain = tokens + (branch if scale is None else scale * branch)
        with torch.no_grad():
            torch.testing.assert_close(
                add_mlp(tokens, norm, first, second, scale), plain, rtol=tolerance, atol=tolerance
            )
    check(ours, plain, leaves, tolerance)


@pytest.mark.parametrize("rows", [1, 15, 2048])
@pytest.mark.parametrize("last", [None, 2])
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-12), (True, 2e-2)])
def test_attention_some_images_at_a_time_is_torchs(
    monkeypatch, rows: int, last: int | None, autocast: bool, tolerance: float
):  # fmt: skip
    monkeypatch.setattr(cpu, "ROWS", rows)
    tokens, norm, _ = layers(torch.float32 if autocast else torch.float64)
    qkv = nn.Linear(12, 36).to(tokens.dtype)
    leaves = [tokens, *norm.parameters(), *qkv.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = attend(tokens, norm, qkv, 3, last)
        query, key, value = (each.transpose(1, 2) for each in qkv(norm(tokens)).view(3, 5, 3, 3, 4).unbind(2))
        weights = (query @ key.mT / 2).softmax(-1)
        plain = (weights.to(value.dtype) @ value).transpose(1, 2).reshape(3, 5, 12)
        plain = plain if last is None else plain[:, 5 - last :]
        with torch.no_grad():
            torch.testing.assert_close(attend(tokens, norm, qkv, 3, last), plain, rtol=tolerance, atol=tolerance)
    check(ours, plain, leaves, tolerance)


def test_attention_s_gradients_are_finite_differences():
    tokens, norm, _ = layers(torch.float64)
    qkv = nn.Linear(12, 36).double()
    assert torch.autograd.gradcheck(lambda t, *_: attend(t, norm, qkv, 3, 2), (tokens, *qkv.parameters()))


def test_an_mlp_s_gradients_are_finite_differences():
    tokens, norm, first, second = mlp_layers(torch.float64)
    assert torch.autograd.gradcheck(lambda t, *_: add_mlp(t, norm, first, second), (tokens, *first.parameters()))


def test_an_mlp_of_no_tokens():
    _, norm, first, second = mlp_layers(torch.float32)
    tokens = torch.empty(0, 5, 12, requires_grad=True)
    add_mlp(tokens, norm, first, second).sum().backward()
    assert tokens.grad is not None
    assert first.weight.grad is not None
    assert first.weight.grad.abs().sum() == 0


def test_a_block_keeps_ten_widths_a_token():
    """The two inputs, query, key, value and what attention gives, and the MLP's four; sixteen with torch's layers."""
    block, tokens = Block(64, 1, 4.0), torch.randn(2, 50, 64, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(tokens)
    widths = sum(size for place, size in kept.items() if place not in parameters) / tokens.nbytes
    assert 10 <= widths < 10.5


def test_the_last_tokens_of_a_block_are_those_of_all():
    block, tokens = Block(16, 2, 4.0).double(), torch.randn(3, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(block(tokens, last=4), block(tokens)[:, 5:], rtol=1e-12, atol=1e-12)


@pytest.mark.untyped
def test_compiled_it_is_one_graph():
    block, tokens = Block(16, 2, 4.0), torch.randn(3, 9, 16, requires_grad=True)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, last=4), block(tokens, last=4))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("last", [None, 4])
def test_one_switch_turns_off_what_only_a_cpu_runs(monkeypatch, scaled: bool, last: int | None):
    """A block has the same results and gradients in either form, and without the CPU's own none of it is reached."""
    block, tokens = Block(16, 2, 4.0).double(), torch.randn(3, 9, 16, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([[0, 1.5], [2, 0], [1, 1]], dtype=torch.float64) if scaled else None
    leaves, ours = [tokens, *block.parameters()], block(tokens, scale, last)

    def refuse(*_: object) -> None:
        raise AssertionError("a form of the CPU's own")

    monkeypatch.setattr(cpu, "attend", refuse)
    monkeypatch.setattr(cpu, "add_mlp", refuse)
    with cpu.use(False):
        with cpu.use(True), pytest.raises(AssertionError, match="of the CPU's own"):
            block(tokens, scale, last)
        check(ours, block(tokens, scale, last), leaves, 1e-12)
    with pytest.raises(AssertionError, match="of the CPU's own"):
        block(tokens, scale, last)
