"""The cases of the step's benchmarks: their figures, and that nothing of a GPU's case lies on the CPU."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import step_cases
from benchmarks.step_cases import Ours, Plain, apart, made_batch, make_case, matrix_rate, model_flops, take_steps
from fastpmae import Config
from fastpmae.model import build
from fastpmae.plan.shape_tensor import leaves
from fastpmae_loaders.errors import UserError
from tests.tiny import tiny_config

FIGURES = {"step_ms", "images_per_second", "peak_gib", "warm_up_s", "host_ms"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(preset: str, model: str, batch_size: int, **others: Any) -> Config:
        return tiny_config(preset, batch_size=batch_size, **others)

    monkeypatch.setattr(step_cases, "settings", settings)


@pytest.mark.parametrize("name", ["dual", "plain-dual", "sdae", "plain-sdae", "mae", "single-step"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_figures_of_a_case(name: str, precision: Any):
    case = make_case(name, "tiny", 2, precision=precision)
    batches = [case.given(made_batch(case.config, 2, seed)) for seed in range(2)]
    before = case.losses(batches[0])
    found = take_steps(case, batches, steps=3, warm=2).figures(2)
    assert set(found) == FIGURES
    assert found["images_per_second"] == pytest.approx(2 / (found["step_ms"] / 1e3))
    assert found["host_ms"] == found["step_ms"]
    assert found["peak_gib"] == 0
    assert case.steps == 5
    after = case.losses(batches[0])
    assert after != before
    # the losses themselves are taken without stochastic depth, and change nothing
    assert case.losses(batches[0]) == after
    case.close()


def test_settings_of_the_trainer_reach_the_case():
    case = make_case("dual", "tiny", 2, chunk=7, depth=1, match_scope="fold", drop_path=0.0)
    assert (case.config.efficiency.prototypes_chunk, case.config.network.depth) == (7, 1)
    assert (case.config.loss.match_scope, case.config.network.drop_path) == ("fold", 0.0)
    with pytest.raises(UserError, match="--attention xformers"):
        make_case("dual", "tiny", 2, attention="xformers")


def test_what_the_last_step_made_is_kept():
    case = make_case("dual", "tiny", 2)
    assert isinstance(case, Ours)
    assert case.targets is case.out is None
    case.step(made_batch(case.config, 2))
    assert case.targets is not None
    assert case.targets.patch_labels is not None
    assert case.out is not None
    assert case.out.match is not None
    assert case.out.match.shape == (2, 12)


def test_a_pass_that_computes_something_else_is_noticed():
    case = make_case("sdae", "tiny", 2)
    assert isinstance(case, Ours)
    batch = made_batch(case.config, 2)
    assert case.checked_step(batch) == 0
    right = case.student_loss
    case.student_loss = lambda *given: right(*given)._replace(reconstruction=torch.full((), 2.0))
    assert case.checked_step(batch) > 0.5


@pytest.mark.parametrize(
    ("found", "truth", "expected"),
    [([1.0, 2.2], [1.0, 2.0], 0.1), ([0.0], [0.0], 0.0), ([1e-5], [0.0], 0.01)],
)
def test_how_far_numbers_are_apart(found: list[float], truth: list[float], expected: float):
    assert apart(found, truth) == pytest.approx(expected)


@pytest.mark.slow
def test_flops_of_the_model_are_the_method_s_own():
    """Neither recomputation nor chunks nor 8 bits add to them."""
    plain = tiny_config("paper")
    assert model_flops(
        plain.using(prototypes_chunk=3, activation_checkpointing=1, teacher_precision="fp8")
    ) == model_flops(plain)
    assert model_flops(tiny_config("sdae")) < model_flops(plain)


def test_the_rate_of_a_product_is_that_of_the_machine():
    assert 1e7 < matrix_rate("cpu", size=64, repeats=3) < 1e14


class Clock:
    """A GPU whose work takes no time of the host's: each step is 20 ms of its own clock."""

    def __init__(self) -> None:
        self.now, self.peak, self.resets, self.waits = 0.0, 0, 0, 0

    def reset(self) -> None:
        self.resets, self.peak = self.resets + 1, 0

    def wait(self) -> None:
        self.waits += 1

    def event(self, enable_timing: bool) -> Any:
        clock = self

        class Event:
            at = 0.0

            def record(self) -> None:
                self.at = clock.now

            def elapsed_time(self, other: Any) -> float:
                return other.at - self.at

        assert enable_timing
        return Event()


@pytest.mark.parametrize("replays", [False, True])
def test_a_gpu_s_own_clock_and_memory_are_asked(replays: bool, monkeypatch: pytest.MonkeyPatch):
    clock = Clock()

    class Case:
        device = torch.device("cuda", 0)

        def __init__(self) -> None:
            self.replays, self.seen = replays, []

        def step(self, batch: Any, mark: Any = None) -> None:
            self.seen.append(batch)
            clock.now += 20.0
            # what is compiled or recorded takes memory once
            clock.peak = max(clock.peak, 2**30 if len(self.seen) > 1 else 2**31)

    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(torch.cuda, "synchronize", clock.wait)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", clock.reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: clock.peak)
    case: Any = Case()
    timing = step_cases.take_steps(case, ["a", "b"], steps=5, warm=3)
    assert timing.seconds == pytest.approx([0.02] * 5)
    assert case.seen == list("abaababaaba")
    # a CUDA graph's memory is there before, and is not asked for again
    assert (timing.peak, clock.resets) == ((2**31, 1) if replays else (2**30, 2))
    assert len(timing.host) == 3
    assert max(timing.host) < 0.02
    # before and after the warm-up, after the timed steps, and after each that the host is timed for
    assert clock.waits == 6


class Mixed(TorchDispatchMode):
    """Notes what computes with tensors of both devices: numbers apart, and copies from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in leaves((args, kwargs or {}, result)) if isinstance(each, Tensor) and each.ndim]
        if len({each.device.type for each in tensors}) > 1 and func._opname not in ("_to_copy", "copy_"):
            self.found.append(func._opname)
        return result


def move(module: nn.Module, device: torch.device) -> nn.Module:
    """`Module.to`, which would swap tensors that fakes refer to."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.detach().to(device), parameter.requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(device))
    return module


@contextlib.contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch, trained: list[nn.Module]) -> Iterator[None]:
    """Tensors may say that they are on a GPU, and hold nothing; what only its driver could do is answered."""

    def backward(loss: Tensor) -> None:
        # autograd's engine would ask the GPU for its streams
        for parameter in (parameter for network in trained for parameter in network.parameters()):
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    real = torch.autocast.__init__

    def autocast(*given: Any, **named: Any) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch.cuda, "is_available", lambda: True)
            patched.setattr(torch.cuda, "is_bf16_supported", lambda *device: True)
            real(*given, **named)

    monkeypatch.setattr(torch.autocast, "__init__", autocast)
    monkeypatch.setattr(FakeTensor, "tolist", lambda rates: [0.25] * len(rates))
    monkeypatch.setattr(Tensor, "backward", backward)
    # of streams and pinned memory there is a test of its own
    monkeypatch.setattr(step_cases.Transfer, "carry", lambda transfer, tensor: tensor.to(transfer.device))
    monkeypatch.setattr(nn.Module, "to", move)
    monkeypatch.setattr(build, "initialise", lambda network, generator: None)
    with FakeTensorMode(allow_non_fake_inputs=True), Mixed() as mixed:
        yield
    assert mixed.found == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["dual", "plain-dual", "sdae", "plain-sdae", "mae", "single-epoch"])
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_case_of_a_gpu_is_there_whole(name: str, precision: Any, monkeypatch: pytest.MonkeyPatch):
    trained: list[nn.Module] = []
    with fake_gpu(monkeypatch, trained):
        case = make_case(name, "tiny", 2, device="cuda", precision=precision)
        student = case.student if isinstance(case, Ours) else case.method.student
        teachers = case.teachers.modules() if isinstance(case, Ours) else case.method.teachers
        trained.append(student)
        batch: Any = case.given(made_batch(case.config, 2))
        with monkeypatch.context() as patched:
            if isinstance(case, Plain):  # it reads whether its loss is finite
                patched.setattr(torch, "isfinite", lambda loss: loss.device.type == "cuda")
            case.step(batch)
        optimizer = case.optimizer if isinstance(case, Ours) else case.method.optimizer
        assert all(group["fused"] for group in optimizer.param_groups)
        kept = [tensor for state in optimizer.state.values() for tensor in state.values()]
        assert kept
        for network in (student, *teachers.values()):
            kept += [*network.parameters(), *network.buffers()]
        kept += leaves(list(vars(batch).values()) if isinstance(case, Ours) else list(batch))
        if isinstance(case, Ours):
            kept += leaves([case.targets, case.out])
        assert {each.device.type for each in kept if isinstance(each, Tensor)} == {"cuda"}
        if isinstance(case, Plain):
            with torch.no_grad(), case.autocast:
                losses = case.learn(batch, case.teach(batch))
            assert {loss.device.type for loss in losses} == {"cuda"}
