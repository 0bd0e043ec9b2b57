"""How the teachers follow the student, held to loops in float64 and to a closed form."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpmae import PRESETS
from fastpmae.model.teachers import Schedule, Teachers, make_teachers
from fastpmae.model.vit import Student
from fastpmae.pretraining.networks import make_networks
from tests import reference
from tests.devices import Draws
from tests.tiny import disturb, made_batch, tiny_config, tiny_networks

State = dict[str, Tensor]


def parameters_of(module: torch.nn.Module) -> State:
    return {name: parameter.detach().double().clone() for name, parameter in module.named_parameters()}


def followed(teacher: State, student: State, momentum: float) -> State:
    return {name: momentum * teacher[name] + (1 - momentum) * student[name] for name in teacher}


def assert_same(module: torch.nn.Module, truth: State, tolerance: float) -> None:
    found = parameters_of(module)
    assert found.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(
            found[name], truth[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def fresh(
    steps: int, dtype: torch.dtype = torch.float64, preset: str = "paper", **settings: Any
) -> tuple[Student, Teachers]:
    student, teachers = tiny_networks(tiny_config(preset, **settings), steps)
    for network in (student, *teachers.modules().values()):
        network.to(dtype)
    return student, teachers


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-7)])
def test_one_step(dtype: torch.dtype, tolerance: float) -> None:
    student, teachers = fresh(100, dtype)
    assert teachers.labelling is not None
    assert teachers.reconstruction is not None
    before, idle = parameters_of(teachers.labelling), parameters_of(teachers.reconstruction)
    teachers.update_ema(student, "step", 0)
    assert_same(teachers.labelling, followed(before, parameters_of(student), 0.996), tolerance)
    assert_same(teachers.reconstruction, idle, 0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_many_steps_and_epochs(dtype: torch.dtype, tolerance: float) -> None:
    """A student that moves at every step; 6 epochs of 10 steps."""
    epochs, per_epoch = 6, 10
    total = epochs * per_epoch
    student, teachers = fresh(total, dtype, epochs=epochs)
    assert teachers.labelling is not None
    assert teachers.reconstruction is not None
    labelling, reconstruction = parameters_of(teachers.labelling), parameters_of(teachers.reconstruction)
    for step in range(total):
        disturb(student, 100 + step, 0.05)
        now = parameters_of(student)
        teachers.update_ema(student, "step", step)
        labelling = followed(labelling, now, 1 - 0.004 * (1 + math.cos(math.pi * step / total)) / 2)
        if (step + 1) % per_epoch == 0:
            epoch = step // per_epoch
            teachers.update_ema(student, "epoch", epoch)
            reconstruction = followed(reconstruction, now, 0.99 - 0.03 * (1 + math.cos(math.pi * epoch / epochs)) / 2)
    assert_same(teachers.labelling, labelling, tolerance)
    assert_same(teachers.reconstruction, reconstruction, tolerance)


def test_a_student_at_rest_is_approached_by_powers() -> None:
    """With one momentum m throughout: student + m^n (start - student)."""
    student, teachers = fresh(1000, labelling_momentum=(0.9, 0.9))
    assert teachers.labelling is not None
    start, rest = parameters_of(teachers.labelling), parameters_of(student)
    for step in range(40):
        teachers.update_ema(student, "step", step)
    truth = {name: rest[name] + 0.9**40 * (start[name] - rest[name]) for name in start}
    assert_same(teachers.labelling, truth, 1e-12)


def test_parts_that_follow() -> None:
    """The labelling teacher has encoder and head, the reconstruction teacher the encoder alone."""
    student, teachers = fresh(10)
    assert teachers.labelling is not None
    assert teachers.reconstruction is not None
    own = parameters_of(student)
    assert set(parameters_of(teachers.labelling)) == {n for n in own if n.startswith(("encoder.", "head."))}
    assert set(parameters_of(teachers.reconstruction)) == {n for n in own if n.startswith("encoder.")}


@pytest.mark.parametrize(("start", "end", "total"), [(0.996, 1.0, 1000), (0.96, 0.99, 300), (0.96, 0.99, 1)])
def test_momentum(start: float, end: float, total: int) -> None:
    schedule = Schedule("step", start, end, total)
    values = [schedule.momentum(t) for t in range(total)]
    assert values[0] == pytest.approx(start, abs=1e-15)
    assert values == pytest.approx([reference.momentum(start, end, t, total) for t in range(total)], abs=1e-15)
    assert values == sorted(values)
    assert all(value < end for value in values)
    if total > 1:
        assert schedule.momentum(total // 2) == pytest.approx((start + end) / 2, abs=1e-15)
        assert end - values[-1] < (end - start) * 1e-4


def test_momenta_stretch_over_the_whole_run() -> None:
    _, teachers = fresh(500, epochs=50)
    for step, epoch in ((0, 0), (123, 12), (499, 49)):
        momenta = sorted(teachers.momenta(step, epoch).values())
        truth = [reference.momentum(0.96, 0.99, epoch, 50), reference.momentum(0.996, 1.0, step, 500)]
        assert momenta == pytest.approx(truth, abs=1e-15)


@pytest.mark.parametrize(("given", "epochs"), [(0, 25), (25, 25), (100, 25), (300, 300), (0, 1)])
def test_momenta_that_know_the_length_leave_as_much_of_the_start(given: int, epochs: int) -> None:
    """As much after a share of the run's updates as the paper's momentum after the same share of its own."""
    steps = 40 * epochs
    _, teachers = fresh(steps, epochs=epochs, momentum_for=given)
    length = given or epochs
    for schedule, count, updates, (start, end) in (
        (teachers.reconstruction_schedule, epochs, 300, (0.96, 0.99)),
        (teachers.labelling_schedule, steps, 500_000, (0.996, 1.0)),
    ):
        mine = count * length / epochs
        assert schedule.start**mine == pytest.approx(start**updates, rel=1e-9)
        assert schedule.end == (1.0 if end == 1 else pytest.approx(end ** (updates / mine), rel=1e-12))
        assert schedule.total == count


def test_momenta_are_taken_as_they_are_by_default() -> None:
    _, teachers = fresh(500, epochs=50)
    assert (teachers.labelling_schedule.start, teachers.reconstruction_schedule.start) == (0.996, 0.96)


@pytest.mark.parametrize(
    ("preset", "cadence", "momentum"), [("single-step", "step", (0.996, 1.0)), ("single-epoch", "epoch", (0.96, 0.99))]
)
def test_a_single_teacher(preset: str, cadence: str, momentum: tuple[float, float]) -> None:
    """One module in both roles, followed once at a time and at its own cadence alone."""
    student, teachers = fresh(7, preset=preset, epochs=7)
    assert teachers.labelling is not None
    assert teachers.labelling is teachers.reconstruction
    assert len(teachers.modules()) == 1
    truth = parameters_of(teachers.labelling)
    for t in range(7):
        disturb(student, 50 + t, 0.05)
        for kind in ("step", "epoch"):
            teachers.update_ema(student, kind, t)
        truth = followed(truth, parameters_of(student), reference.momentum(*momentum, t, 7))
    assert_same(teachers.labelling, truth, 1e-13)
    other = "epoch" if cadence == "step" else "step"
    teachers.update_ema(student, other, 0)
    assert_same(teachers.labelling, truth, 1e-13)


@pytest.mark.parametrize("labelling", ["step", "epoch"])
@pytest.mark.parametrize("reconstruction", ["step", "epoch"])
def test_cadences(labelling: str, reconstruction: str) -> None:
    student, teachers = fresh(10, labelling_cadence=labelling, reconstruction_cadence=reconstruction)
    assert teachers.labelling is not None
    assert teachers.reconstruction is not None
    for kind in ("step", "epoch"):
        before = parameters_of(teachers.labelling), parameters_of(teachers.reconstruction)
        teachers.update_ema(student, kind, 0)
        after = parameters_of(teachers.labelling), parameters_of(teachers.reconstruction)
        moved = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in zip(before, after, strict=True)]
        assert moved == [labelling == kind, reconstruction == kind]


def test_roles_without_a_teacher() -> None:
    _, alone = fresh(10, preset="sdae")
    assert alone.labelling is None
    assert alone.reconstruction is not None
    student, none = fresh(10, preset="mae")
    assert none.labelling is None
    assert none.reconstruction is None
    none.update_ema(student, "step", 0)
    none.update_ema(student, "epoch", 0)


def made(**settings: Any) -> tuple[Student, Teachers]:
    config = tiny_config(**settings)
    return make_networks(config, 10, torch.device("cpu"), None)


def test_teachers_start_as_copies() -> None:
    student, teachers = made()
    own = parameters_of(student)
    for teacher in teachers.modules().values():
        assert_same(teacher, {name: own[name] for name in parameters_of(teacher)}, 0)
        assert all(not parameter.requires_grad for parameter in teacher.parameters())
        ours = {parameter.data_ptr() for parameter in student.parameters()}
        assert not ours & {parameter.data_ptr() for parameter in teacher.parameters()}
    assert teachers.labelling is not teachers.reconstruction


def test_teachers_start_at_random() -> None:
    """Weights of their own, drawn like the student's from the run's seed, each teacher's different."""
    student, teachers = made(teacher_init="random")
    own = parameters_of(student)
    states = [parameters_of(teacher) for teacher in teachers.modules().values()]
    name = "encoder.blocks.0.attn.qkv.weight"
    assert not any(torch.allclose(state[name], own[name]) for state in states)
    assert not torch.allclose(states[0][name], states[1][name])
    student_again, teachers_again = made(teacher_init="random")
    assert_same(student_again, own, 0)
    for teacher, state in zip(teachers_again.modules().values(), states, strict=True):
        assert_same(teacher, state, 0)
    # the student is the one that copying teachers would have had
    assert_same(made()[0], own, 0)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("start", ["copy", "random"])
def test_all_networks_are_drawn_on_the_host_whatever_they_compute_on(preset: str, start: str) -> None:
    """A generator of the host's draws for no other device, and a GPU's own would give a seed other weights."""
    config = tiny_config(preset, teacher_init=start)
    with Draws() as draws:
        student, teachers = make_networks(config, 10, torch.device("meta"), None)
    assert draws.devices == {"cpu"}
    for network in (student, *teachers.modules().values()):
        tensors = [*network.parameters(), *network.buffers()]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
    with Draws() as draws:
        torch.nn.init.normal_(student.encoder.cls_token)
    assert draws.devices == {"meta"}  # it would have been seen


def test_random_teachers_start_as_timm_starts_a_vit() -> None:
    """By the spreads of the many numbers there are of each kind, as in SdAE's models_teacher.py with timm 0.3.2."""
    config = tiny_config(teacher_init="random", image_size=64, width=64, depth=4)
    student, teachers = make_networks(config, 10, torch.device("cpu"), None)
    reach = (3 * 4 * 4) ** -0.5
    for teacher in teachers.modules().values():
        encoder = teacher.encoder
        products = [module for module in encoder.modules() if isinstance(module, torch.nn.Linear)]
        assert len(products) == 4 * 4
        for product in products:
            assert float(product.weight.std()) == pytest.approx(0.02, rel=0.05)
            assert not product.bias.any()
        assert float(encoder.pos_embed.std()) == pytest.approx(0.02, rel=0.05)
        assert 0.01 < float(encoder.cls_token.std()) < 0.04
        for parameter in encoder.patch_embed.proj.parameters():
            assert float(parameter.std()) == pytest.approx(reach / 3**0.5, rel=0.3)
            assert 0.9 * reach < float(parameter.abs().max()) <= reach
        assert not torch.equal(encoder.pos_embed, student.encoder.pos_embed)


def test_random_positions_come_to_the_students_own() -> None:
    """SdAE's teacher has its positions among its parameters, and all of those follow."""
    student, teachers = made(teacher_init="random", reconstruction_momentum=(0.9, 0.9))
    assert teachers.reconstruction is not None
    start, rest = (network.encoder.pos_embed.double() for network in (teachers.reconstruction, student))
    for epoch in range(5):
        teachers.update_ema(student, "epoch", epoch)
    truth = rest + 0.9**5 * (start - rest)
    torch.testing.assert_close(teachers.reconstruction.encoder.pos_embed.double(), truth, rtol=0, atol=1e-6)


def test_a_copys_positions_stay_to_the_bit() -> None:
    student, teachers = made()
    for t in range(9):
        teachers.update_ema(student, "step", t)
        teachers.update_ema(student, "epoch", t)
    for teacher in teachers.modules().values():
        assert torch.equal(teacher.encoder.pos_embed, student.encoder.pos_embed)


def test_random_teachers_keep_nothing_of_a_student_with_weights() -> None:
    """A student that starts from a checkpoint has norms of its own; a random teacher's are 1 and 0."""
    student, _ = made()
    disturb(student, 7, 0.5)
    config = tiny_config(teacher_init="random")
    teachers = make_teachers(student, config.teacher, 10, 10, torch.Generator().manual_seed(0))
    for teacher in teachers.modules().values():
        for name, parameter in teacher.named_parameters():
            if "norm" in name:
                assert (parameter == float(name.endswith("weight"))).all(), name


def test_teachers_do_not_change_while_they_teach() -> None:
    from fastpmae.pretraining.step import compute_targets, student_loss

    config = tiny_config()
    student, teachers = tiny_networks(config)
    before = [parameters_of(teacher) for teacher in teachers.modules().values()]
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    batch = made_batch()
    student_loss(student, batch, None, compute_targets(teachers, batch, config), config).total.backward()
    optimizer.step()
    for teacher, state in zip(teachers.modules().values(), before, strict=True):
        assert_same(teacher, state, 0)
