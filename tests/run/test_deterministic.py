"""--deterministic: what is switched on a GPU is switched back, and no step needs what torch then refuses."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpmae import Config, UserError, pretrain
from fastpmae.distributed.ranks import Ranks
from fastpmae.model.build import check
from fastpmae.pretraining.networks import make_networks
from fastpmae.pretraining.optimizer import make_optimizer, update
from fastpmae.pretraining.step import compute_targets, student_loss
from fastpmae.run import deterministic as module
from fastpmae.run.deterministic import WORKSPACE, deterministic
from tests.test_train import assert_same_run
from tests.tiny import drop_path_scale_of, made_batch, tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def switches() -> tuple[Any, ...]:
    memory: Any = torch.utils.deterministic
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        memory.fill_uninitialized_memory,
        os.environ.get(WORKSPACE),
    )


@pytest.fixture
def no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)


@pytest.mark.usefixtures("no_workspace")
def test_switches_are_put_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_check_products", lambda device: None)
    before = switches()

    def fails() -> None:
        with deterministic(True, CUDA):
            # not to warn only: then attention's gradient would add up in any order
            assert switches() == (True, False, True, False, False, ":4096:8")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert switches() == before
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic(True, CUDA):
            assert switches()[:2] == (True, False)
        assert switches()[:2] == (True, True)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic(True, CUDA):
        assert switches()[-1] == ":16:8"
    assert os.environ[WORKSPACE] == ":16:8"


@pytest.mark.usefixtures("no_workspace")
def test_nothing_is_switched_without_it_or_on_the_cpu():
    before = switches()
    for wanted, device in ((False, CUDA), (True, CPU)):
        with deterministic(wanted, device):
            assert switches() == before


@pytest.mark.usefixtures("no_workspace")
def test_cublas_that_has_started_otherwise_gets_a_sentence(monkeypatch: pytest.MonkeyPatch):
    said = f"this operation is not deterministic because it uses CuBLAS ... {WORKSPACE}=:4096:8"

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError(said)

    before = switches()
    monkeypatch.setattr(torch, "ones", fails)
    with (
        pytest.raises(UserError, match=f"--deterministic: cuBLAS has started .* {WORKSPACE}"),
        deterministic(True, CUDA),
    ):
        pass
    said = "CUDA out of memory"
    with pytest.raises(RuntimeError, match="out of memory"), deterministic(True, CUDA):
        pass
    assert switches() == before


@pytest.mark.slow
def test_on_the_cpu_it_is_the_same_run(tiny: Config, tmp_path: Path):
    plain = pretrain(tiny.using(steps=3))
    assert_same_run(plain, pretrain(tiny.using(steps=3, out=tmp_path / "flag", deterministic=True)), 3)


@pytest.mark.slow
def test_a_resumed_run_keeps_what_decides_its_last_bit(tiny: Config):
    pretrain(tiny.using(steps=1, deterministic=True))
    resumed = tiny.using(steps=2, resume="auto", deterministic=True)
    with pytest.raises(UserError, match="--prototypes-chunk was 0 and is now 7"):
        pretrain(resumed.using(prototypes_chunk=7))
    with pytest.raises(UserError, match="--deterministic was True and is now False"):
        pretrain(resumed.using(deterministic=False))
    pretrain(resumed.using(workers=2))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"compile_mode": "max-autotune"}, "--compile-mode max-autotune tries kernels out"),
        ({"compile_mode": "max-autotune-no-cudagraphs"}, "--compile-mode max-autotune-no-cudagraphs tries"),
        ({"attention": "xformers"}, "--attention xformers promises no order"),
    ],
)
def test_what_it_excludes(settings: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        check(tiny_config(deterministic=True, **settings))
    check(tiny_config(**settings))


REFUSED = (
    "avg_pool3d", "adaptive_avg_pool", "adaptive_max_pool", "fractional_max_pool", "max_unpool", "upsample",
    "reflection_pad", "nll_loss", "ctc_loss", "embedding_bag", "put", "histc", "bincount", "median", "grid_sampler",
    "scatter_reduce", "resize_", "kthvalue", "cumsum",
)  # fmt: skip
"""Operations that torch refuses on a GPU under the switch, or did in one of the versions that we take."""


@pytest.mark.parametrize(
    "settings",
    [{}, {"folds": 5}, {"prototypes_chunk": 7}, {"match_scope": "fold"}, {"match_metric": "l2"}, {"preset": "mae"},
     {"preset": "sdae-code"}, {"activation_checkpointing": 1}],
    ids=str,
)  # fmt: skip
def test_a_step_needs_nothing_that_torch_refuses(settings: dict[str, Any]):
    used: set[str] = set()

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            used.add(func._opname)
            return func(*args, **(kwargs or {}))

    settings = dict(settings)
    config = tiny_config(settings.pop("preset", "paper"), **settings)
    student, teachers = make_networks(config, 10, CPU, None)
    optimizer = make_optimizer(student, config)
    batch = made_batch(fold_sizes=(3, 3, 2, 2, 2) if config.views.folds == 5 else (4, 4, 4))
    # bf16, as a GPU has it: in one precision the CPU goes ways of its own
    with Noted(), torch.autocast("cpu", torch.bfloat16):
        losses = student_loss(
            student, batch, drop_path_scale_of(config).float(), compute_targets(teachers, batch, config), config
        )
        losses.total.backward()
        update(optimizer, losses.total.detach(), 1e-3, 1.0, Ranks(0, 1, 1, CPU, None))
        teachers.update_ema(student, "step", 0)
        teachers.update_ema(student, "epoch", 0)
    assert {"native_layer_norm_backward", "addmm", "_fused_adamw_"} <= used
    assert [name for name in sorted(used) if any(name.strip("_").startswith(word) for word in REFUSED)] == []


def test_no_kernel_of_ours_adds_up_in_the_order_of_arrival():
    """Each program writes its own part of a sum, and the parts are added up in the order of the rows."""
    folder = Path(__file__).parents[2] / "kernels" / "fastpmae_kernels"
    texts = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert sum("@triton.jit" in text for text in texts.values()) >= 5
    # nor in parts whose number or size somebody measures, or reads off the GPU
    for word in ("tl.atomic", "autotune", "multi_processor_count", "num_sms"):
        assert [name for name, text in texts.items() if word in text] == []
