"""Measures what a real training step on the CPU holds, in a process of its own: `python -m tests.measured_step JSON`.

Two ways, neither of which knows of the plan: torch's profiler counts what its allocator gave and took, and the
system the pages in use. Beneath MALLOC_MMAP_THRESHOLD_ memory that is given back leaves the process at once.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastpmae import PRESETS, Config
from fastpmae.distributed.ranks import Ranks
from fastpmae.model.build import shape_of, view_settings, views_needed
from fastpmae.pretraining.networks import make_networks
from fastpmae.pretraining.optimizer import make_optimizer, update
from fastpmae.pretraining.step import compute_targets, student_loss
from fastpmae_loaders import Batch

WORLD = Ranks(0, 1, 1, torch.device("cpu"), None)


def real_batch(config: Config, count: int) -> Batch:
    settings = view_settings(config)
    order = torch.rand(count, settings.patches).argsort(dim=1)
    nothing = torch.zeros(count, 2, dtype=torch.int64)
    views = [torch.randint(256, (count, 3, view.size, view.size), dtype=torch.uint8) for view in views_needed(config)]
    return Batch(
        tuple(views), order[:, : settings.visible].contiguous(), order[:, settings.visible :].contiguous(),
        settings.fold_sizes, nothing[:, 0], nothing[:, 0], nothing, nothing, nothing, nothing, nothing, np.arange(0),
        [],
    )  # fmt: skip


class Trainer:
    """Networks, optimizer and a batch; `step` is the trainer's."""

    def __init__(self, config: Config):
        self.config = config
        self.student, self.teachers = make_networks(config, 1, torch.device("cpu"), None)
        self.optimizer = make_optimizer(self.student, config)
        self.batch = real_batch(config, config.optimizer.batch_size)
        self.drop_path_scale = None
        if config.network.drop_path:
            self.drop_path_scale = torch.ones(config.optimizer.batch_size, shape_of(config.network).depth, 2)

    def step(self) -> None:
        targets = compute_targets(self.teachers, self.batch, self.config)
        losses = student_loss(self.student, self.batch, self.drop_path_scale, targets, self.config)
        losses.total.backward()
        update(self.optimizer, losses.total.detach(), 1e-4, 0.0, WORLD)
        self.teachers.update_ema(self.student, "step", 0)


def resident(line: str = "VmRSS") -> int:
    """Bytes of this process in memory, now or at most ("VmHWM")."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(row for row in status if row.startswith(line)).split()[1])


def allocated_peak(trainer: Trainer) -> int:
    """Bytes that torch's allocator held at most during a step, beyond what was held before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.step()
    held = peak = 0
    profiler: Any = profile.profiler
    for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main() -> None:
    name, settings = json.loads(sys.argv[1])
    # code is compiled and libraries are loaded by a run that is small and of the same kind
    small = Trainer(PRESETS[name].using(**settings | {"batch_size": 2, "depth": 1, "decoder_depth": 1}))
    small.step()
    del small
    gc.collect()
    before = resident()
    trainer = Trainer(PRESETS[name].using(**settings))
    trainer.step()
    Path("/proc/self/clear_refs").write_text("5")
    trainer.step()
    found = {"resident": resident("VmHWM") - before}
    lasting = [*trainer.student.parameters(), *trainer.batch.views]
    lasting += [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    lasting += [tensor for teacher in trainer.teachers.modules().values() for tensor in teacher.parameters()]
    found["allocated"] = allocated_peak(trainer) + sum(tensor.nbytes for tensor in lasting)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
