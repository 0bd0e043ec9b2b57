"""What is certified is what the trainer launches: its step on tensors that say they are on a GPU, kernel by kernel."""

import itertools
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="this torch comes without Triton, so there are no GPU kernels to build")

from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from fastpmae import PRESETS, Config
from fastpmae.config import Efficiency, Loss
from fastpmae.model.build import build_student
from fastpmae.model.teachers import make_teachers
from fastpmae.plan.costs import _batch
from fastpmae.pretraining.step import compute_targets, student_loss
from fastpmae_kernels import photometric
from fastpmae_kernels.builds import Build, builds
from fastpmae_kernels.long_rows import LONGEST_ROW

GPU = torch.device("cuda", 0)
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel, Triton's notation of each argument, the constants, and which arguments 16 divides."""

    kernel: str
    types: tuple[tuple[str, str], ...]
    tile: tuple[tuple[str, Any], ...]
    aligned: frozenset[str]

    def is_of(self, build: Build) -> bool:
        """Whether the build's code is, or may be, what this launch gets."""
        named = {name: kind for name, kind in build.types.items() if kind != "constexpr"}
        tile = {"num_warps": 4} | build.tile
        assumed = {name for name, kind in named.items() if kind.startswith("*")} | (set(build.aligned) & named.keys())
        return (self.kernel, dict(self.types), dict(self.tile)) == (
            build.kernel.fn.__name__, named, tile,
        ) and assumed <= self.aligned  # fmt: skip


class Launching(TorchDispatchMode):
    """Within it each operation of ours calls what launches its kernels on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastpmae":
            OPDEFS[f"fastpmae::{func._opname}"]._backend_fns["cuda"](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> set[Launch]:
    """What is launched from here on; no kernel runs, and autocast believes that there is a GPU."""
    found: set[Launch] = set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **tile: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False))
        types = {
            name: TYPES[value.dtype] if isinstance(value, Tensor) else "fp32" if isinstance(value, float) else "i32"
            for name, value in given.items()
        }
        aligned = frozenset(name for name, value in given.items() if _is_aligned(value))
        constants = {"num_warps": 4} | tile
        found.add(Launch(self.fn.__name__, tuple(types.items()), tuple(sorted(constants.items())), aligned))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    # autograd asks for the GPU itself, which is not there
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, inputs: [torch.empty_like(each) for each in inputs])
    return found


def _is_aligned(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(value.storage_offset() * value.itemsize % 16 == 0)
    return isinstance(value, int) and value % 16 == 0


def take_step(config: Config, images: int) -> None:
    """Both teachers' passes, the student's and its losses, and of the way back what is ours."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        with GPU:
            student = build_student(config)
            teachers = make_teachers(student, config.teacher, 10, 10, torch.Generator())
            batch, drop_path_scale = _batch(config, images)
        low = config.efficiency.precision == "bf16"
        with Launching(), torch.autocast("cuda", torch.bfloat16, enabled=low):
            total = student_loss(
                student, batch, drop_path_scale, compute_targets(teachers, batch, config), config
            ).total
            for node in nodes_of(total):
                if node.name() == "_CrossEntropyBackward":
                    (gradient,) = node.saved_tensors
                    node.apply(gradient.new_empty(len(gradient), dtype=torch.float32))
            photometric(batch.simple, batch.factors[:, 0].double(), batch.choices[:, 0].byte())


def nodes_of(total: Tensor) -> Iterator[Any]:
    """The functions that autograd would call, each once."""
    due, seen = [total.grad_fn], set()
    while due:
        node = due.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        due += [before for before, _ in node.next_functions]


def settings_of_a_gpu() -> list[dict[str, Any]]:
    """Every setting that decides which kernel is launched, at each of its values."""
    loss, efficiency = typing.get_type_hints(Loss), typing.get_type_hints(Efficiency)
    precisions = [each for each in typing.get_args(efficiency["precision"]) if each != "auto"]
    matches = itertools.product(typing.get_args(loss["match_metric"]), typing.get_args(loss["match_scope"]))
    ways: list[dict[str, Any]] = [{"match_metric": metric, "match_scope": scope} for metric, scope in matches]
    ways += [{"preset": "mae"}, {"prototypes_chunk": 4096}, {"prototypes": 4 * LONGEST_ROW}]
    return [{"precision": precision} | way for precision in precisions for way in ways]


@pytest.mark.slow
@pytest.mark.parametrize("settings", settings_of_a_gpu(), ids=str)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_what_the_trainer_launches_is_certified(settings: dict[str, Any], launches: set[Launch]):
    settings = dict(settings)
    config = PRESETS[settings.pop("preset", "paper")].using(depth=1, decoder_depth=1, **settings)
    take_step(config, 256)
    assert any(launch.kernel == "tokens_kernel" for launch in launches)
    known = builds()
    missing = [launch for launch in launches if not any(launch.is_of(build) for build in known)]
    assert missing == []
    if config.teacher.teachers in ("dual", "single"):
        names = {launch.kernel for launch in launches}
        assert {"column_kernel", "nearest_kernel"} < names
        assert "scale_kernel" in names or config.efficiency.prototypes_chunk > 0


def test_a_variant_that_is_not_certified_would_have_been_noticed(launches: set[Launch]):
    """What the test above relies on."""
    with FakeTensorMode(), Launching():
        student, teacher = torch.empty(2, 147, 768, device=GPU), torch.empty(2, 148, 768, device=GPU)[:, 1:]
        torch.ops.fastpmae.nearest_patch(student.half(), teacher, False, [49, 49, 49])
    (launch,) = launches
    assert not any(launch.is_of(build) for build in builds())
