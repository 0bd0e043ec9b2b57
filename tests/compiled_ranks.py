"""Compiled steps on each of several ranks, against the same steps as they are: started by torchrun, prints one JSON."""

import contextlib
import json
import sys
from typing import Any

import torch
from torch._dynamo.utils import counters

from fastpmae import Config
from fastpmae.distributed.data_parallel import no_sync
from fastpmae.distributed.ranks import Ranks, join_ranks
from fastpmae.pretraining.compile import compile_step
from fastpmae.pretraining.optimizer import make_optimizer, update
from fastpmae.pretraining.parallel import wrap_parallel
from fastpmae.pretraining.step import assign_pseudo_labels, student_loss, teacher_forward
from tests.tiny import drop_path_scale_of, made_batch, tiny_config, tiny_networks

CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "parts": {"accumulate": 2},
    "shard": {"shard": True, "depth": 2, "decoder_depth": 2, "precision": "bf16"},
}
# A graph keeps weights for its backward pass that are gone meanwhile: aot_eager keeps them as inductor does.
BACKENDS = {"whole": "eager", "parts": "eager", "shard": "aot_eager"}


def trained(config: Config, ranks: Ranks, backend: str) -> list[float]:
    """Losses of three steps as the loop takes them; from the second step on nothing may be compiled."""
    student, teachers = tiny_networks(config, 3)
    for network in (student, *teachers.modules().values()):
        network.float()
    parts, shard = config.optimizer.accumulate, config.efficiency.shard
    parallel = wrap_parallel(student, teachers, ranks, shard=shard, accumulate=parts)
    optimizer = make_optimizer(student, config)
    networks = student, *teachers.modules().values()
    compiled_teacher, compiled_student = compile_step(teacher_forward, student_loss, config, ranks, networks, backend)
    low = config.efficiency.precision == "bf16"
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=low, cache_enabled=not shard)
    totals = []
    for step in range(3):
        for part in range(parts):
            batch, drop_path_scale = (
                made_batch(100 * ranks.rank + 10 * step + part, 3),
                drop_path_scale_of(config, 3, step).float(),
            )
            with contextlib.nullcontext() if part == parts - 1 else no_sync(parallel):
                with autocast:
                    targets = assign_pseudo_labels([compiled_teacher(teachers, batch, config)], config, ranks.group)[0]
                    losses = compiled_student(parallel, batch, drop_path_scale, targets, config)
                (losses.total / parts).backward()
            totals.append(losses.total.item())
        update(optimizer, losses.total.detach(), 1e-3 * step, 0.0, ranks)
        teachers.update_ema(student, "step", step)
        torch._dynamo.config.error_on_recompile = True
    return totals


def main() -> None:
    said = {}
    with join_ranks("cpu") as ranks:
        for case, settings in CASES.items():
            settings = {"depth": 1, "activation_checkpointing": 1, **settings}
            config = tiny_config(**settings)
            torch._dynamo.reset()
            torch._dynamo.config.error_on_recompile = False
            counters.clear()
            found = trained(config.using(compile="on"), ranks, BACKENDS[case])
            graphs = counters["stats"]["unique_graphs"]
            expected = trained(config.using(compile="off"), ranks, "")
            said[case] = {"found": found, "expected": expected, "graphs": graphs}
        if ranks.is_main:
            json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
