"""The teachers: copies of the student's encoder (and head) that follow it by exponential moving average."""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastpmae.config import TeacherSettings
from fastpmae.distributed.dtensor import to_local
from fastpmae.model.head import Head
from fastpmae.model.initialization import initialise, initialise_as_timm
from fastpmae.model.vit import Encoder, Student

Cadence = Literal["step", "epoch"]
PAPER_LENGTH: dict[Cadence, int] = {"step": 500_000, "epoch": 300}
"""Updates of a teacher in the paper's run on ImageNet-1k (1.28 million images in batches of 768)."""


class Teacher(nn.Module):
    """An encoder, with a head where it labels; never trained, only averaged."""

    def __init__(self, encoder: Encoder, head: Head | None):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.requires_grad_(False)

    @classmethod
    def of(cls, student: Student, *, labels: bool) -> "Teacher":
        """A copy of the student as it is now; `labels` says whether the head comes along."""
        return cls(copy.deepcopy(student.encoder), copy.deepcopy(student.head) if labels else None)


@dataclass(frozen=True)
class Schedule:
    """When a teacher follows, and with which momentum: m1 - (m1 - m0) (1 + cos(pi t / T)) / 2 for t = 0 ... T-1."""

    cadence: Cadence
    start: float
    end: float
    total: int
    """T: the run's steps for cadence "step", its epochs for "epoch"."""

    def momentum(self, t: int) -> float:
        """The weight that the teacher's own parameters keep at its t-th update, counted from 0."""
        return self.end - (self.end - self.start) * (1 + math.cos(math.pi * t / self.total)) / 2


@dataclass
class Teachers:
    """The two roles of section 3.2. One module may fill both (Table 6's single teacher), and either may be empty.

    `reconstruction` gives target tokens, `labelling` pseudo labels; each has its own schedule, and a module that
    fills both roles follows the labelling one.
    """

    reconstruction: Teacher | None
    labelling: Teacher | None
    reconstruction_schedule: Schedule
    labelling_schedule: Schedule

    @torch.no_grad()
    def update_ema(self, student: Student, cadence: Cadence, t: int) -> None:
        """Update every teacher of this cadence from the student, after the optimizer's t-th step (or epoch)."""
        for teacher, schedule in self.scheduled():
            if schedule.cadence == cadence:
                mine, theirs = _pairs(teacher, student)
                torch._foreach_lerp_(mine, theirs, 1 - schedule.momentum(t))

    def momenta(self, step: int, epoch: int) -> dict[str, float]:
        """The momentum of each role at this step and epoch, for the log."""
        now = {"step": step, "epoch": epoch}
        figures: dict[str, float] = {}
        for teacher, schedule in self.scheduled():
            momentum = schedule.momentum(now[schedule.cadence])
            if teacher is self.reconstruction:
                figures["reconstruction_momentum"] = momentum
            if teacher is self.labelling:
                figures["labelling_momentum"] = momentum
        return figures

    def scheduled(self) -> list[tuple[Teacher, Schedule]]:
        """Each distinct teacher with the schedule that it follows."""
        pairs = []
        if self.labelling is not None:
            pairs.append((self.labelling, self.labelling_schedule))
        if self.reconstruction is not None and self.reconstruction is not self.labelling:
            pairs.append((self.reconstruction, self.reconstruction_schedule))
        return pairs

    def modules(self) -> dict[str, Teacher]:
        """The distinct teachers by the names they have in a checkpoint."""
        named = {"labelling_teacher": self.labelling, "reconstruction_teacher": self.reconstruction}
        if self.reconstruction is self.labelling:
            named.pop("reconstruction_teacher")
        return {name: teacher for name, teacher in named.items() if teacher is not None}


def make_teachers(
    student: Student, settings: TeacherSettings, steps: int, epochs: int, generator: torch.Generator
) -> Teachers:
    """The teachers of a method, as copies of the student or with random weights of their own.

    Random ones start as SdAE's code has its teacher: an encoder as timm makes it, whose positions are random too and
    come to the student's fixed ones as the weights come to its weights; a head as the student's.

    Args:
        student: on the generator's device, which is the CPU.
        steps, epochs: of the whole run, which the momentum schedules stretch over.
        generator: draws the weights of teachers that start at random.
    """
    which = settings.teachers
    labelling = Teacher.of(student, labels=True) if which in ("dual", "single") else None
    reconstruction = labelling if which == "single" else None
    if which in ("dual", "reconstruction"):
        reconstruction = Teacher.of(student, labels=False)
    schedules = (
        make_schedule(settings.reconstruction_cadence, settings.reconstruction_momentum, settings, steps, epochs),
        make_schedule(settings.labelling_cadence, settings.labelling_momentum, settings, steps, epochs),
    )
    teachers = Teachers(reconstruction, labelling, *schedules)
    if settings.teacher_init == "random":
        for teacher in teachers.modules().values():
            initialise(teacher, generator)
            initialise_as_timm(teacher.encoder, generator)
    return teachers


def make_schedule(
    cadence: Cadence, momentum: tuple[float, float], settings: TeacherSettings, steps: int, epochs: int
) -> Schedule:
    """A teacher's schedule over so many steps and epochs, its momenta fitted to a length where the settings ask for it.

    A teacher that keeps m of itself at each of n updates is left with m^n of its start: m^(N/n) leaves as much after n
    updates as m after the paper's N.
    """
    total = {"step": steps, "epoch": epochs}[cadence]
    power = 1.0
    if settings.momentum_for is not None:
        power = PAPER_LENGTH[cadence] / (total * (settings.momentum_for or epochs) / epochs)
    start, end = momentum
    return Schedule(cadence, start**power, end**power, total)


def _pairs(teacher: Teacher, student: Student) -> tuple[list[Tensor], list[Tensor]]:
    """Weight by weight; of sharded networks this rank's parts, which are cut alike in both."""
    theirs = dict(student.named_parameters())
    named = list(teacher.named_parameters())
    mine = [to_local(weight.detach()) for _, weight in named]
    # A copy's positions are the student's, and stay so.
    return (
        [*mine, teacher.encoder.pos_embed],
        [*(to_local(theirs[name].detach()) for name, _ in named), student.encoder.pos_embed],
    )
