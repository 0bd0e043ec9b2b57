"""The networks of a run: the student and its teachers, with the weights that it starts from, on its device."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastpmae.config import Config
from fastpmae.distributed.dtensor import to_full
from fastpmae.model.build import make_student
from fastpmae.model.fp8 import use_fp8
from fastpmae.model.teachers import Teachers, make_teachers
from fastpmae.model.vit import Student
from fastpmae.run.init_weights import start_encoder
from fastpmae.run.stored_run import brought_here


def make_networks(
    config: Config, total_steps: int, device: torch.device, init: Path | str | Mapping[str, Tensor] | None
) -> tuple[Student, Teachers]:
    """Student and teachers on the device, all weights from the run's seed, so that every rank starts alike.

    All are made on the CPU and moved when they are ready: its generator draws for no other device, and a seed's weights
    are the same everywhere.

    Args:
        total_steps: of the whole run, which the momentum schedules stretch over.
        init: weights that the encoder starts from instead: where they lie, on this machine or at an address, or what
            `encoder_of` gives.
    """
    generator = torch.Generator().manual_seed(config.run.seed)
    student = make_student(config, generator)
    if isinstance(init, Mapping):
        student.encoder.load_state_dict(init)
    elif init is not None:
        with brought_here(init, config.data.cached) as weights:
            start_encoder(student.encoder, weights)
    teachers = make_teachers(student, config.teacher, total_steps, config.optimizer.epochs, generator)
    for network in (student, *teachers.modules().values()):
        network.to(device)
    if config.efficiency.teacher_precision == "fp8":
        for teacher in teachers.modules().values():
            use_fp8(teacher.encoder)
    return student, teachers


def encoder_of(student: Student) -> dict[str, Tensor]:
    """The weights of a student's encoder, whole and on the CPU. Of one in shards all ranks ask for them."""
    return {name: to_full(tensor).cpu() for name, tensor in student.encoder.state_dict().items()}
