"""Teachers that multiply in 8 bits, against a quantisation in float64 that does not know of torch's 8-bit type."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion

from fastpmae import Config
from fastpmae.model.build import check
from fastpmae.model.fp8 import Fp8Linear, check_fp8_device, multiply_on_gpu, multiply_plainly, to_fp8, use_fp8
from fastpmae.plan.costs import step_costs
from fastpmae.pretraining.networks import make_networks
from fastpmae.pretraining.step import Targets, compute_targets, student_loss
from fastpmae_loaders.errors import UserError
from tests.tiny import disturb, made_batch, tiny_config

CPU = torch.device("cpu")


def e4m3(numbers: Tensor) -> Tensor:
    """The nearest numbers with 4 bits of exponent and 3 of mantissa, ties to even; at most 448, steps of 2^-9 at 0."""
    numbers = numbers.double()
    exponent = torch.floor(torch.log2(numbers.abs().clamp(min=2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return (numbers / step).round() * step


def quantised(rows: Tensor) -> Tensor:
    """Rows as they are once each has been scaled to 448 and back."""
    scale = rows.float().abs().amax(1, keepdim=True) / 448
    return e4m3(rows.float() / scale) * scale.double()


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (16, 160)])
def test_a_layer_is_the_product_of_quantised_rows(inputs: int, outputs: int, bf16: bool):
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(inputs, outputs)
    nn.init.zeros_(plain.weight)
    disturb(plain, 1, 0.5)
    # rows of very different size, which one scale for all would flatten
    rows = torch.randn(3, 7, inputs, generator=generator) * 10.0 ** torch.arange(-3, 4).view(7, 1)
    layer = Fp8Linear.of(plain)
    assert layer.weight is plain.weight
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found, unquantised = layer(rows), plain(rows)
    assert found.dtype == (torch.bfloat16 if bf16 else torch.float32)
    bias = plain.bias.detach().double()
    truth = (quantised(rows.flatten(0, 1)) @ quantised(plain.weight.detach()).T + bias).view(3, 7, outputs)
    off = (found.double() - truth).norm(dim=-1) / truth.norm(dim=-1)
    assert float(off.max()) < (8e-3 if bf16 else 1e-6)
    products = (found.double() - bias, unquantised.double() - bias)
    errors = (products[0] - products[1]).norm(dim=-1) / products[1].norm(dim=-1)
    # 3 bits of mantissa: 2^-4 / sqrt(3) at most on each side; every row as good as another that bf16 does not round off
    assert 1e-3 < float(errors[:, 3 if bf16 else 0 :].mean()) < 0.05


def test_rows_keep_their_largest_entries_and_nothing_overflows():
    rows = torch.tensor([[1e30, -3e38, 1.0], [0.0, 0.0, 0.0], [1e-20, -1e-30, 2e-20], [0.3, -0.7, 0.1]])
    low, scale = to_fp8(rows)
    back = low.float() * scale
    assert torch.isfinite(back).all()
    torch.testing.assert_close(back[[0, 3]].amin(1), rows[[0, 3]].amin(1), rtol=1e-6, atol=0)
    assert not back[1].any()
    assert torch.isnan((to_fp8(torch.tensor([[float("nan"), 1.0]]))[0]).float()).any()


def networks(**settings: Any) -> tuple[Config, Any, Any]:
    config = tiny_config(width=64, decoder_width=16, **settings)
    student, teachers = make_networks(config, 10, CPU, None)
    disturb(student, 1)
    for number, teacher in enumerate(teachers.modules().values()):
        disturb(teacher, 2 + number)
    return config, student, teachers


@pytest.mark.parametrize("preset", ["paper", "sdae", "single-step"])
def test_the_teachers_alone_multiply_in_8_bits(preset: str):
    """Targets near to those in fp32, and nothing that autograd would keep; the student as it was."""
    plain, student, teachers = networks(preset=preset)
    config, low_student, low_teachers = networks(preset=preset, teacher_precision="fp8")
    batch = made_batch(1, 3, (5, 4, 4))
    assert not any(isinstance(module, Fp8Linear) for module in low_student.modules())
    for teacher, low in zip(teachers.modules().values(), low_teachers.modules().values(), strict=True):
        layers = sum(isinstance(module, Fp8Linear) for module in low.modules())
        assert layers == 4 * config.network.depth
        assert list(low.state_dict()) == list(teacher.state_dict())
        assert [name for name, _ in low.named_parameters()] == [name for name, _ in teacher.named_parameters()]
    targets, low_targets = compute_targets(teachers, batch, plain), compute_targets(low_teachers, batch, config)
    assert not any(tensor.requires_grad for tensor in tensors_of(low_targets))
    error = (targets.reconstruction - low_targets.reconstruction).norm() / targets.reconstruction.norm()
    assert 1e-4 < float(error) < 0.1
    losses = student_loss(low_student, batch, None, low_targets, config)
    losses.total.backward()
    assert all(
        parameter.grad is None for teacher in low_teachers.modules().values() for parameter in teacher.parameters()
    )
    expected = student_loss(student, batch, None, targets, plain)
    assert losses.total.item() == pytest.approx(expected.total.item(), rel=0.05)
    low_teachers.update_ema(low_student, "step", 0)
    teachers.update_ema(student, "step", 0)
    for teacher, low in zip(teachers.modules().values(), low_teachers.modules().values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), low.parameters(), strict=True))


def tensors_of(targets: Targets) -> list[Tensor]:
    return [
        tensor
        for part in targets
        for tensor in (part if isinstance(part, tuple) else [part])
        if isinstance(tensor, Tensor)
    ]


@pytest.mark.slow
def test_the_plan_counts_8_bit_products():
    plain, low = (step_costs(tiny_config(width=64, teacher_precision=kind), 4) for kind in ("auto", "fp8"))
    assert plain.forward == low.forward


@pytest.mark.untyped
def test_on_a_gpu_the_product_is_torchs_own_in_one_graph():
    """Tensors that say they are on a GPU: torch's rules for its 8-bit product look at sizes, strides and dtypes."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        layer, rows = Fp8Linear.of(nn.Linear(64, 48, device="cuda")), torch.empty(3, 7, 64, device="cuda")
        for run in (layer, torch.compile(layer, backend=backend, fullgraph=True)):
            found = run(rows)
            assert (found.shape, found.dtype, found.device.type) == ((3, 7, 48), torch.float32, "cuda")
    (graph,) = graphs
    (product,) = (node for node in graph.graph.nodes if node.target is torch._scaled_mm)
    left, right, left_scale, right_scale = (argument.meta["example_value"] for argument in product.args)
    assert left.dtype == right.dtype == torch.float8_e4m3fn
    assert (left.shape, left.stride(), right.shape, right.stride()) == ((21, 64), (64, 1), (64, 48), (1, 64))
    assert left_scale.dtype == right_scale.dtype == torch.float32
    assert (left_scale.shape, right_scale.shape) == ((21, 1), (1, 48))
    assert product.kwargs["out_dtype"] == product.kwargs["bias"].meta["example_value"].dtype == torch.bfloat16


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.14",
    reason=f"torch {torch.__version__} may not scale 8-bit products by rows on the CPU; 2.14 does",
)
def test_what_a_gpu_is_asked_for_is_the_plain_product():
    generator = torch.Generator().manual_seed(3)
    left, right = (to_fp8(torch.randn(count, 64, generator=generator)) for count in (21, 48))
    bias = torch.randn(48, generator=generator)
    found = multiply_on_gpu(*left, *right, bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), multiply_plainly(*left, *right, bias), rtol=2**-7, atol=2**-7)


def test_what_cannot_multiply_in_8_bits_gets_a_sentence(monkeypatch: pytest.MonkeyPatch):
    check(tiny_config(width=48, teacher_precision="fp8"))
    check(tiny_config(width=24))
    with pytest.raises(UserError, match="layers of 24 x 72 are no multiples of 16"):
        check(tiny_config(width=24, teacher_precision="fp8"))
    check_fp8_device(CPU)
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"NVIDIA A100 does not multiply .* 8.9"):
        check_fp8_device(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with FakeTensorMode():
        check_fp8_device(cuda)

        def refuses(*_given: Any, **_named: Any) -> Tensor:
            raise RuntimeError("Rowwise scaling is not currently supported\nC++ CapturedTraceback: ...")

        monkeypatch.setattr(torch, "_scaled_mm", refuses)
        with pytest.raises(UserError, match=r"no product .* \(Rowwise scaling is not currently supported\); leave"):
            check_fp8_device(cuda)
        monkeypatch.delattr(torch, "_scaled_mm")
        with pytest.raises(UserError, match=r"no product .* A100 \(.*_scaled_mm.*\); leave it out"):
            check_fp8_device(cuda)


def test_only_blocks_are_changed():
    encoder = networks()[1].encoder
    use_fp8(encoder)
    assert type(encoder.patch_embed.proj) is nn.Conv2d
    assert all(type(layer) is Fp8Linear for layer in encoder.blocks.modules() if isinstance(layer, nn.Linear))
