"""The trainer's step and loop where they are for: each test runs on a GPU and, for trying, on the CPU."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.step_cases import Ours, apart, made_batch, make_case, matrix_rate, most_apart, release, take_steps
from fastpmae import Config, pretrain

SMALL: dict[str, Any] = {"depth": 1, "decoder_depth": 1, "width": 64, "heads": 2, "image_size": 64, "prototypes": 200}
NAMES = ("dual", "sdae", "mae", "single-epoch")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    yield torch.device(request.param)
    release()


@pytest.fixture
def compiling(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the CPU passes are traced and not built, which would take a compiler of C++ minutes."""
    torch._dynamo.reset()
    if device.type == "cpu":
        real: Callable[..., Any] = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function, **how: real(function, **how | {"backend": "eager"}))
    yield
    torch._dynamo.reset()


def made(name: str, device: torch.device, **how: Any) -> Ours:
    case = make_case(name, "vit_tiny", 4, device=device, **SMALL | how)
    assert isinstance(case, Ours)
    return case


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dual", "sdae"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_usual_code_has_the_same_losses(device: torch.device, name: str, precision: Any):
    found = []
    for one in (name, f"plain-{name}"):
        case = make_case(one, "vit_tiny", 4, device=device, precision=precision, **SMALL)
        found.append(case.losses(case.given(made_batch(case.config, 4))))
        case.close()
    assert apart(*found) <= most_apart(device, precision)


# torch's compiler warns of much that is not ours: TF32 that is off, what it does not fuse
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(
    "how",
    [
        *({"name": name} for name in NAMES),
        {"name": "dual", "precision": "fp32"},
        {"name": "dual", "chunk": 50},
        {"name": "dual", "match_scope": "fold", "folds": 5},
        pytest.param({"name": "dual", "compile_mode": "reduce-overhead"}, marks=pytest.mark.gpu),
        pytest.param({"name": "mae", "compile_mode": "reduce-overhead"}, marks=pytest.mark.gpu),
    ],
    ids=str,
)
@pytest.mark.untyped
def test_a_compiled_step_computes_what_an_eager_one_does(device: torch.device, how: dict[str, Any]):
    if "compile_mode" in how and device.type == "cpu":
        pytest.skip("CUDA graphs are of a GPU")
    how = {"precision": "bf16"} | how
    case = made(device=device, compiled=True, **how)
    limit = most_apart(device, how["precision"])
    for seed in range(4):
        assert case.checked_step(case.given(made_batch(case.config, 4, seed))) <= limit
    case.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_the_cpu(device: torch.device, name: str):
    """In fp32: the losses of four steps, each with the weights that the steps before have left."""
    here, there = made(name, torch.device("cpu")), made(name, device)
    for seed in range(4):
        losses = []
        for case in (here, there):
            case.step(case.given(made_batch(case.config, 4, seed)))
            assert case.out is not None
            losses.append([float(loss.detach()) for loss in case.out[:4]])
        # a patch that is nearly as near to another takes that one's label
        assert apart(losses[1], losses[0]) <= (1e-3 if device.type == "cuda" else 0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("how", [*({"name": name} for name in NAMES), {"name": "dual", "match_scope": "fold"}], ids=str)
def test_the_host_waits_nowhere_in_a_step(how: dict[str, Any]):
    case = made(device=torch.device("cuda"), precision="bf16", **how)
    batch = case.given(made_batch(case.config, 4))
    for _ in range(2):
        case.step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    case.close()


@pytest.mark.slow
def test_time_and_memory_are_the_device_s(device: torch.device):
    few, more = (
        take_steps(case, [case.given(made_batch(case.config, size))], 3, 2)
        for size in (4, 32)
        for case in [made("sdae", device)]
    )
    assert len(few.seconds) == 3
    assert min(few.seconds + more.seconds + few.host) > 0
    if device.type == "cuda":
        assert 0 < few.peak < more.peak
    assert matrix_rate(device, 256, 3) > 1e8


def losses(config: Config) -> list[dict[str, float]]:
    keys = "loss", "loss_m", "loss_c", "loss_p", "grad_norm"
    rows = [json.loads(line) for line in (pretrain(config) / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in keys} for row in rows]


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_been_stopped(device: torch.device, tiny: Config, tmp_path: Path):
    # the engine that is everywhere: machines with a GPU may lack FFCV
    config = tiny.using(device=device.type, precision="fp32", compile="off", steps=12, loader="torch")
    straight = losses(config.using(out=tmp_path / "straight"))
    losses(config.using(out=tmp_path / "stopped", steps=6))
    stopped = losses(config.using(out=tmp_path / "stopped", resume="auto"))
    assert len(stopped) == len(straight) == 12
    # a GPU's sums come in another order each time
    tolerance = 1e-2 if device.type == "cuda" else 0.0
    for one, other in zip(stopped, straight, strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=0)
