"""The compiled step: whole graphs, compiled once, and nothing in it that waits for the device."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import RecompileError
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from fastpmae import PRESETS, Config, pretrain
from fastpmae import train as loop
from fastpmae.config import Config as Settings
from fastpmae.distributed.ranks import Ranks
from fastpmae.model.build import build_student, check
from fastpmae.model.fp8 import use_fp8
from fastpmae.model.teachers import make_teachers
from fastpmae.plan.costs import _batch
from fastpmae.pretraining.compile import compile_anew, compile_step
from fastpmae.pretraining.networks import make_networks
from fastpmae.pretraining.optimizer import make_optimizer, update
from fastpmae.pretraining.step import assign_pseudo_labels, compute_targets, student_loss, teacher_forward
from fastpmae.run.log import Meter
from fastpmae_kernels import backend, prototype_cross_entropy
from fastpmae_kernels.backend import written_on
from fastpmae_loaders import Batch
from fastpmae_loaders.errors import UserError
from tests.devices import Waits
from tests.made import REPOSITORY
from tests.tiny import drop_path_scale_of, made_batch, tiny_config, tiny_networks

# torch.compile traces the passes whole, with stand-ins for what a GPU has
pytestmark = pytest.mark.untyped
ALONE = Ranks(0, 1, 1, torch.device("cpu"), None)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """dynamo forgets all it knows before and after, and counts anew."""
    torch._dynamo.reset()
    counters.clear()
    try:
        yield
    finally:
        torch._dynamo.config.error_on_recompile = False
        torch._dynamo.reset()


def trained(config: Config, fold_sizes: tuple[int, ...], backend: str) -> tuple[list[float], list[Tensor]]:
    """Losses and last weights of two epochs of two steps, as the loop takes them. From the second step on nothing may
    be compiled."""
    student, teachers = tiny_networks(config, 4)
    for network in (student, *teachers.modules().values()):
        network.float()
    optimizer = make_optimizer(student, config)
    compiled_teacher, compiled_student = compile_step(teacher_forward, student_loss, config, ALONE, backend=backend)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.efficiency.precision == "bf16")
    totals = []
    for step in range(4):
        for part in range(config.optimizer.accumulate):
            batch = made_batch(10 * step + part, 3, fold_sizes)
            drop_path_scale = drop_path_scale_of(config, 3, step).float() if config.network.drop_path else None
            with autocast:
                targets = assign_pseudo_labels([compiled_teacher(teachers, batch, config)], config)[0]
                losses = compiled_student(student, batch, drop_path_scale, targets, config)
            (losses.total / config.optimizer.accumulate).backward()
            totals.append(losses.total.item())
        update(optimizer, losses.total.detach(), 1e-3 * step, 0.0, ALONE)
        teachers.update_ema(student, "step", step)
        if step % 2:
            teachers.update_ema(student, "epoch", step // 2)
        torch._dynamo.config.error_on_recompile = True
    # No loss depends on the keys' bias: its gradient is rounding alone, which AdamW scales up.
    return totals, [
        parameter.detach().view(3, -1)[::2] if name.endswith("qkv.bias") else parameter.detach()
        for name, parameter in student.named_parameters()
    ]


@pytest.mark.parametrize(
    ("preset", "fold_sizes", "settings"),
    [
        pytest.param(
            "paper",
            (5, 4, 4),
            {"prototypes_chunk": 7, "activation_checkpointing": 1, "accumulate": 2, "depth": 1},
            marks=pytest.mark.slow,
        ),
        ("paper", (4, 4, 4), {"depth": 1, "precision": "bf16"}),
        ("paper", (4, 4, 4), {"depth": 1, "precision": "bf16", "teacher_precision": "fp8"}),
        ("single-epoch", (4, 4, 4), {"depth": 1}),
        ("sdae", (4, 4, 4), {}),
        ("mae", (4, 4, 4), {}),
    ],
    ids=["dual in chunks", "dual in bf16", "dual in fp8", "single", "sdae", "mae"],
)
def test_each_pass_is_one_graph_and_is_compiled_once(
    preset: str, fold_sizes: tuple[int, ...], settings: dict[str, Any]
):
    config = tiny_config(preset, folds=len(fold_sizes), **settings)
    with watched():
        found = trained(config.using(compile="on"), fold_sizes, "aot_eager" if "accumulate" in settings else "eager")
        assert counters["graph_break"] == {}
        assert counters["stats"]["unique_graphs"] == 2
    expected = trained(config.using(compile="off"), fold_sizes, "")
    # Gradients differ in their last bits, and after a step of AdamW some weights fall to another of 256 numbers.
    rtol, atol = (2e-3, 1e-3) if "teacher_precision" in settings else (1e-4, 1e-5)
    assert found[0][:2] == pytest.approx(expected[0][:2], rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def made_in(graph: torch.fx.Graph, numbers: int) -> list[str]:
    """What makes a new tensor of at least so many numbers in a graph of aot_autograd's."""
    found = []
    for node in graph.nodes:
        value, schema = node.meta.get("val"), getattr(node.target, "_schema", None)
        view = schema is not None and any(result.alias_info is not None for result in schema.returns)
        if node.op == "call_function" and not view and isinstance(value, Tensor) and value.numel() >= numbers:
            found.append(str(node.target))
    return found


def graphs_of(function: Any, *arguments: Any) -> tuple[torch.fx.Graph, torch.fx.Graph]:
    """The graphs of a function's forward and backward pass, as a compiler is given them."""
    graphs: list[torch.fx.Graph] = []

    def compiler(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    with watched():
        backend = aot_autograd(
            fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition
        )
        torch.compile(function, backend=backend, fullgraph=True)(*arguments).backward()
    forward, backward = graphs
    return forward, backward


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own, which it hides
def test_a_temperature_that_warms_up_compiles_nothing_anew():
    """Twelve epochs of a step, each with a temperature of its own: torch compiles a function eight times at most."""
    config = tiny_config("paper", warmup_epsilon=0.02, warmup_epsilon_epochs=12, depth=1)

    def totals(passes: tuple[Callable[..., Any], Callable[..., Any]]) -> list[float]:
        student, teachers = tiny_networks(config, 4)
        for network in (student, *teachers.modules().values()):
            network.float()
        optimizer, found = make_optimizer(student, config), []
        for epoch in range(12):
            torch._dynamo.config.error_on_recompile = epoch > 0
            batch = made_batch(epoch, 3, (4, 4, 4))
            targets = assign_pseudo_labels([passes[0](teachers, batch, config)], config, epoch=epoch)[0]
            losses = passes[1](student, batch, drop_path_scale_of(config, 3, epoch).float(), targets, config)
            losses.total.backward()
            update(optimizer, losses.total.detach(), 1e-3, 0.0, ALONE)
            found.append(losses.total.item())
        return found

    plain = totals((teacher_forward, student_loss))
    with watched():
        compiled = config.using(compile="on")
        assert totals(compile_step(teacher_forward, student_loss, compiled, ALONE, backend="aot_eager")) == (
            pytest.approx(plain, rel=1e-5)
        )


@pytest.mark.slow
def test_the_compiled_step_copies_no_gradient_of_logits():
    """Of the student's patch logits one matrix is made, and none in the backward pass."""
    config = tiny_config(prototypes=1000, depth=1, drop_path=0.0)
    student, teachers = tiny_networks(config)
    for network in (student, *teachers.modules().values()):
        network.float()
    batch = made_batch()
    targets = compute_targets(teachers, batch, config)
    logits = batch.folds.numel() * 1000
    forward, backward = graphs_of(lambda: student_loss(student, batch, None, targets, config).total)
    assert [name for name in made_in(forward, logits) if "getitem" not in name] == ["aten.mm.default"]
    assert made_in(backward, logits) == []


def test_a_copy_of_logits_would_have_been_noticed():
    """What the test above relies on: where the gradient is scaled in place, the backward pass makes another."""
    leaf, labels = torch.rand(8, 40, requires_grad=True), torch.rand(8, 40)

    def loss() -> Tensor:
        rows = torch.arange(8)
        return prototype_cross_entropy(leaf * 1, labels, torch.zeros(40), rows, overwrite=True).mean()

    assert made_in(graphs_of(loss)[1], 8 * 40) != []


@pytest.mark.slow
def test_another_shape_would_have_been_noticed():
    """What the test above relies on."""
    config = tiny_config("mae", compile="on")
    with watched():
        trained(config, (4, 4, 4), "eager")
        torch._dynamo.config.error_on_recompile = True
        with pytest.raises(RecompileError):
            compile_step(teacher_forward, student_loss, config, ALONE, backend="eager")[0](
                None, made_batch(0, 2), config
            )


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "mae"])
def test_another_size_of_views_is_compiled_once_and_for_its_own_shapes(preset: str):
    """After `compile_anew` there is one more graph of each pass, as large as the new shapes and for no others."""
    config = tiny_config(preset, compile="on", drop_path=0.0)
    student, teachers = tiny_networks(config, 4)
    for network in (student, *teachers.modules().values()):
        network.float()
    views = torch.randint(0, 256, (2, 3, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    order = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]])
    small = replace(
        made_batch(), views=tuple(views), visible=order[:, :1], folds=order[:, 1:].contiguous(), fold_sizes=(1, 1, 1)
    )

    def loss(passes: tuple[Callable[..., Any], Callable[..., Any]], batch: Batch) -> float:
        targets = assign_pseudo_labels([passes[0](teachers, batch, config)], config)[0]
        return passes[1](student, batch, None, targets, config).total.item()

    with watched():
        compiled = compile_step(teacher_forward, student_loss, config, ALONE, backend="eager")
        found = []
        for batch in (small, made_batch()):
            found.append(loss(compiled, batch))
            torch._dynamo.config.error_on_recompile = True
            loss(compiled, batch)
            torch._dynamo.config.error_on_recompile = False
            assert compile_anew(config, ALONE)
        assert counters["stats"]["unique_graphs"] == 4
        assert counters["graph_break"] == {}
    plain = teacher_forward, student_loss
    assert found == pytest.approx([loss(plain, small), loss(plain, made_batch())], rel=1e-5)
    assert not compile_anew(config.using(compile="off"), ALONE)


@pytest.fixture(scope="module")
def of_ranks() -> dict[str, Any]:
    """What `tests.compiled_ranks` says of each of its cases."""
    paths = os.pathsep.join(str(REPOSITORY / part) for part in (".", "kernels", "loaders"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
         "tests.compiled_ranks"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "graphs"), [("whole", 3), ("parts", 3), ("shard", 4)])
def test_across_ranks_all_is_compiled_in_the_first_step(case: str, graphs: int, of_ranks: dict[str, Any]):
    """The teachers, the student and the losses: broken nowhere else than around torch's own module, compiled once.

    In shards: a block of the teachers, of the student's encoder, of the decoder, and the decoder's last.
    """
    said = of_ranks[case]
    assert said["found"] == pytest.approx(said["expected"], rel=1e-5)
    assert said["graphs"] == graphs


@pytest.mark.parametrize(
    ("settings", "device", "expected"),
    [
        ({}, "cpu", None),
        ({}, "cuda", {"mode": None, "fullgraph": True}),
        ({"compile": "off"}, "cuda", None),
        ({"compile": "on", "compile_mode": "max-autotune"}, "cpu", {"mode": "max-autotune", "fullgraph": True}),
        ({"compile_mode": "reduce-overhead"}, "cuda", {"mode": "reduce-overhead", "fullgraph": True}),
        ({"attention": "xformers"}, "cuda", {"mode": None, "fullgraph": False}),
    ],
    ids=str,
)
def test_what_torch_is_asked_to_compile(
    settings: dict[str, Any], device: str, expected: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
):
    asked, begun = [], []

    def compile(function: Any, **how: Any) -> Any:
        asked.append(how)
        return lambda *arguments: (function.__name__, arguments)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    passes = compile_step(
        teacher_forward, student_loss, tiny_config(**settings), Ranks(0, 1, 1, torch.device(device), None)
    )
    if expected is None:
        assert asked == []
        assert passes == (teacher_forward, student_loss)
        return
    assert asked == [{"backend": "inductor", **expected}] * 2
    assert [one("a", 2) for one in passes] == [("teacher_forward", ("a", 2)), ("student_loss", ("a", 2))]
    # each step of a CUDA graph begins once, with the teachers
    assert len(begun) == (settings.get("compile_mode") == "reduce-overhead")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"compile": "off", "compile_mode": "max-autotune"}, "--compile off"),
        ({"accumulate": 2, "compile_mode": "reduce-overhead"}, "--accumulate"),
        ({"shard": True, "compile_mode": "max-autotune"}, "--shard"),
        ({"activation_checkpointing": -1}, "--activation-checkpointing -1"),
    ],
)
def test_modes_that_make_no_sense_get_a_sentence(settings: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        check(Settings().using(**settings))
    check(Settings().using(accumulate=2, shard=True, compile_mode="max-autotune-no-cudagraphs"))


PLACES = {preset: {"preset": preset} for preset in PRESETS} | {
    "dual, uneven folds": {"folds": 5},
    "dual, match within uneven folds": {"match_scope": "fold", "folds": 5},
    "dual, L2 match": {"match_metric": "l2"},
    "dual in chunks": {"prototypes_chunk": 7},
    "dual, blocks anew": {"activation_checkpointing": 1},
    "dual in fp8": {"teacher_precision": "fp8"},
    "SdAE, cosine over tokens, uneven folds": {"preset": "sdae-code", "folds": 5},
    "MAE, uneven folds": {"preset": "mae", "folds": 5},
}
"""Settings that change which operations a step has."""


@pytest.mark.slow
def test_no_step_between_two_rows_waits(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    """The loop itself, on the CPU: from the start of a step to its last figure."""
    waits = Waits(anywhere=True)
    waits.inside = False
    looked: list[str] = []
    real_rate, real_step = loop.learning_rate, loop.Log.step

    def starts(*arguments: Any) -> float:
        waits.inside = True
        return real_rate(*arguments)

    def ends(*arguments: Any) -> None:
        waits.inside = False
        real_step(*arguments)

    def looks(name: str) -> Callable[..., Any]:
        real = getattr(loop, name)
        return lambda *arguments: looked.append(name) or real(*arguments)

    for name in ("collapse_figures", "geometry_figures"):
        monkeypatch.setattr(loop, name, looks(name))
    monkeypatch.setattr(loop, "learning_rate", starts)
    monkeypatch.setattr(loop.Log, "step", ends)
    with waits:
        pretrain(tiny.using(log_every=4, steps=8, accumulate=2, clip_grad=1.0))
    assert [name for name, inside in waits.found if inside] == []
    # what a row looks at costs time: there are two rows
    assert looked == ["collapse_figures", "geometry_figures"] * 2
    # rows and checkpoints do wait, so the test would have seen it
    assert {name for name, _ in waits.found} >= {"_local_scalar_dense"}


@pytest.fixture
def meta_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The meta device in a GPU's place: the kernels' operators run there, and autocast, which it has not, is off."""
    monkeypatch.setattr(backend, "runs_plain", lambda *tensors: any(each.dtype == torch.float64 for each in tensors))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float32)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    return torch.device("meta")


@pytest.mark.slow
@pytest.mark.parametrize("case", PLACES)
def test_forward_and_backward_neither_wait_nor_carry_anything(case: str, meta_as_a_gpu: torch.device):
    """Tensors without memory, on a device that is not the host: what needs a number of one, or brings one, is seen."""
    settings = dict(PLACES[case])
    config = tiny_config(settings.pop("preset", "paper"), **settings)
    student, teachers = make_networks(config, 10, meta_as_a_gpu, None)
    with meta_as_a_gpu:
        batch, drop_path_scale = _batch(config, 3)
    with Waits() as waits:
        student_loss(student, batch, drop_path_scale, compute_targets(teachers, batch, config), config).total.backward()
        assert waits.found == []
        assert {parameter.grad.device.type for parameter in student.parameters() if parameter.grad is not None} == {
            "meta"
        }


@pytest.mark.slow
@pytest.mark.parametrize("case", PLACES)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_nothing_is_carried_between_a_gpu_and_the_host(case: str, monkeypatch: pytest.MonkeyPatch):
    """The whole step but its backward pass, on tensors that say they are on a GPU and cannot be read."""
    # autograd asks for the GPU itself, which is not there; the test above holds its operations
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, inputs: [torch.empty_like(each) for each in inputs])
    settings = dict(PLACES[case])
    config = tiny_config(settings.pop("preset", "paper"), **settings)
    device = torch.device("cuda", 0)
    ranks = Ranks(0, 1, 1, device, None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with device:
            student = build_student(config)
            # what is drawn cannot be read here
            teachers = make_teachers(student, config.using(teacher_init="copy").teacher, 10, 10, torch.Generator())
            if config.efficiency.teacher_precision == "fp8":
                for teacher in teachers.modules().values():
                    use_fp8(teacher.encoder)
            optimizer = make_optimizer(student, config)
            batch, drop_path_scale = _batch(config, 3)
            meter = Meter(device, 3)
            gradients = [torch.empty_like(parameter) for parameter in student.parameters()]
        with Waits() as waits:
            losses = student_loss(student, batch, drop_path_scale, compute_targets(teachers, batch, config), config)
            for parameter, gradient in zip(student.parameters(), gradients, strict=True):
                parameter.grad = gradient
            norm, skipped = update(optimizer, losses.total.detach(), 1e-3, 1.0, ranks)
            teachers.update_ema(student, "step", 0)
            teachers.update_ema(student, "epoch", 0)
            meter.add(0, losses.stack().detach(), norm, skipped, batch.index)
            assert losses.total.device == device
            assert waits.found == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("case", ["dual", "dual, uneven folds", "dual in chunks", "dual in fp8", "mae"])
def test_a_gpu_s_passes_are_whole_graphs_under_its_own_autocast(case: str, monkeypatch: pytest.MonkeyPatch):
    """Its autocast keeps other operations in fp32 than the CPU's, so types meet there that do not meet here."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    settings = dict(PLACES[case])
    config, graphs = tiny_config(settings.pop("preset", "paper"), **settings), []

    def noted(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append({str(node.target) for node in module.graph.nodes})
        return module.forward

    with watched(), FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda", 0):
            student = build_student(config)
            teachers = make_teachers(student, config.using(teacher_init="copy").teacher, 10, 10, torch.Generator())
            if config.efficiency.teacher_precision == "fp8":
                for teacher in teachers.modules().values():
                    use_fp8(teacher.encoder)
            batch, drop_path_scale = _batch(config, 3)
        compiled_teacher = torch.compile(teacher_forward, backend=noted, fullgraph=True)
        compiled_student = torch.compile(student_loss, backend=noted, fullgraph=True)
        with torch.autocast("cuda", torch.bfloat16):
            (targets,) = assign_pseudo_labels([compiled_teacher(teachers, batch, config)], config)
            losses = compiled_student(student, batch, drop_path_scale, targets, config)
    assert losses.total.dtype == torch.float32
    assert len(graphs) == 2
    assert any("_scaled_mm" in name for name in graphs[0]) == ("fp8" in case)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_waits_and_copies_would_have_been_noticed():
    """What the tests above rely on, in both directions."""
    device = torch.device("cuda", 0)

    def seen(work: Callable[[Tensor], Any]) -> list[str]:
        with Waits() as waits, contextlib.suppress(DataDependentOutputException, DynamicOutputShapeException):
            work(there)
        return [name for name, _ in waits.found]

    with FakeTensorMode(allow_non_fake_inputs=True):
        there, here = torch.empty(4, 3, device=device), torch.empty(4, 3)
        assert seen(lambda x: x.cpu()) == ["_to_copy to the host"]
        assert seen(lambda x: here.copy_(x)) == ["copy_ to the host"]
        assert seen(lambda x: here.to(x.device, non_blocking=True)) == ["_to_copy to the device"]
        assert seen(lambda x: torch.tensor(0.5).to(x.device)) == ["_to_copy to the device"]
        assert "tensor from Python's numbers" in seen(lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=device))
        assert "index to the device" in seen(lambda x: x[torch.arange(2)])
        for waiting in (
            lambda x: x.sum().item(),
            lambda x: bool(x.isfinite().all()),
            lambda x: x.tolist(),
            lambda x: x.nonzero(),
            lambda x: x[x > 0],
            lambda x: x.unique(),
            lambda x: x.masked_select(x > 0),
            lambda x: torch.equal(x, x),
            lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device=device), 0),
        ):
            assert seen(waiting) != []
        for free in (
            lambda x: x + torch.arange(3, device=device),
            lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device=device), 0, output_size=4),
            lambda x: x[torch.arange(2, device=device)],
            lambda x: x * torch.tensor(0.5),
            lambda x: torch.where(x > 0, 0.5, x),
            lambda x: x.repeat_interleave(2, dim=0),
            lambda x: written_on(x.device, (0.1, 0.2, 0.3)) * x,
        ):
            assert seen(free) == []
