"""Compiled steps on each of several ranks, against the same steps as they are: started by torchrun, prints one JSON."""

import contextlib
import json
import sys

import torch
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from fastpmae import Config
from fastpmae.optimiser import make_optimiser, update
from fastpmae.passes import make_passes
from fastpmae.step import balance, learn, see
from fastpmae.world import World, join_world
from tests.tiny import keep_of, made_batch, tiny_config, tiny_networks

PARTS = 2


def trained(config: Config, world: World) -> list[float]:
    """Losses of three steps of two parts; from the second step on nothing may be compiled."""
    student, teachers = tiny_networks(config, 3)
    for network in (student, *teachers.modules().values()):
        network.float()
    optimiser = make_optimiser(student, config)
    parallel = DistributedDataParallel(student, gradient_as_bucket_view=True)
    seen, learnt = make_passes(see, learn, config, world, backend="eager")
    totals = []
    for step in range(3):
        for part in range(PARTS):
            batch, keep = made_batch(100 * world.rank + 10 * step + part, 3), keep_of(config, 3, step).float()
            with contextlib.nullcontext() if part == PARTS - 1 else parallel.no_sync():
                targets = balance([seen(teachers, batch, config)], config, world.group)[0]
                losses = learnt(parallel, batch, keep, targets, config)
                (losses.total / PARTS).backward()
            totals.append(losses.total.item())
        update(optimiser, losses.total.detach(), 1e-3 * step, 0.0, world)
        teachers.follow(student, "step", step)
        torch._dynamo.config.error_on_recompile = True
    return totals


def main() -> None:
    with join_world("cpu") as world:
        config = tiny_config(depth=1, checkpoint_blocks=1)
        found = trained(config.using(compile="on"), world)
        graphs = counters["stats"]["unique_graphs"]
        expected = trained(config.using(compile="off"), world)
        if world.first:
            json.dump({"found": found, "expected": expected, "graphs": graphs}, sys.stdout)


if __name__ == "__main__":
    main()
