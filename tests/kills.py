"""Runs that are killed and resumed again and again, against a run that nothing stopped: `python -m tests.kills`.

Each run is started, gets a signal after a random time (SIGKILL, SIGTERM or SIGINT), is resumed with another number of
decoding threads, gets another signal, and so on; at last it may end. Weights, teachers, optimizer and log rows have to
be those of the straight run, bit for bit. Processes that burn the machine's cores run beside it, and some of the runs
have only 16 prototypes, where a sum that depends on where its numbers lie in memory would show.

A process is forked from one that has torch, since a start of its own takes seconds in which nothing happens that a
signal could break.
"""

import argparse
import collections
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import fastpmae.pretraining.collapse  # noqa: F401  (imported by a run only when it needs it; here once for all)
from fastpmae import Config
from fastpmae.run.checkpoint import checkpoint_path, read_checkpoint
from fastpmae.train import main as train
from fastpmae_loaders.write.write import write_beton
from tests.made import tiny_settings, write_tree
from tests.test_train import flags_of, rows_of

SIZES = (16, 24, 16, 64, 48)
"""Prototypes of the runs, in turn."""
STEPS = 15
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def started(config: Config) -> int:
    """The process of a run; a forked one, which ends as `fastpmae-train` would."""
    process = os.fork()
    if process:
        return process
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    torch.set_num_threads(1)
    sys.argv = ["fastpmae-train", *flags_of(config), "--resume"]
    status = 1
    try:
        status = train()
    finally:
        os._exit(status)


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def broken_run(config: Config, signals: int, chance: random.Random, longest: float) -> collections.Counter[str]:
    """A run that gets that many signals, each within `longest` seconds of its start, and is then left to its end."""
    seen: collections.Counter[str] = collections.Counter()
    for _ in range(signals):
        process = started(config.using(workers=chance.choice([1, 2, 3])))
        time.sleep(chance.uniform(0, longest))
        number = chance.choice(SIGNALS)
        os.kill(process, number)  # ours until waited for: it cannot be another's
        status = ended(process)
        seen[f"{number.name}: {status}"] += 1
        assert status in (0, -number, 128 + number), f"{number.name} ended a run with status {status}"
    status = ended(started(config.using(workers=chance.choice([1, 2, 3]))))
    assert status == 0, f"a run that was resumed ended with status {status}"
    return seen


def differences(straight: Path, broken: Path) -> list[str]:
    """What of the last checkpoint and of the log differs."""
    one, other = (read_checkpoint(checkpoint_path(folder, STEPS)).tensors for folder in (straight, broken))
    names = [name for name in one.keys() | other.keys() if not same(one.get(name), other.get(name))]
    return sorted(names) + ["metrics.jsonl"] * (rows_of(straight) != rows_of(broken))


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def burn() -> None:
    while True:
        sum(range(100_000))


def storm(
    folder: Path, runs: int, signals: int, seed: int = 0, busy: int = 2, quiet: bool = True
) -> tuple[collections.Counter[str], list[str]]:
    """What the signals did, and which runs differ in what.

    Args:
        folder: where images and runs lie; a run that equals the straight one is removed.
        signals: of all runs together.
        busy: processes that burn a core each beside the runs.
    """
    chance = random.Random(seed)
    write_beton(write_tree(folder / "tree", 44), folder / "small.beton")
    settings = tiny_settings(folder / "small.beton").using(steps=STEPS, save_steps=1, save_every=0.0, keep=2)
    crowd = [multiprocessing.get_context("fork").Process(target=burn, daemon=True) for _ in range(busy)]
    for one in crowd:
        one.start()
    try:
        straight, took = {}, 0.0
        for size in sorted(set(SIZES[:runs])):
            began = time.monotonic()
            straight[size] = settings.using(prototypes=size, out=folder / f"straight-{size}")
            assert ended(started(straight[size])) == 0
            took = time.monotonic() - began
        seen, different = collections.Counter(), []
        for number in tqdm(range(runs), desc="runs", unit="run", disable=quiet):
            size, out = SIZES[number % len(SIZES)], folder / f"run-{number}"
            share = signals // runs + (number < signals % runs)
            seen += broken_run(straight[size].using(out=out), share, chance, 0.7 * took)
            if found := differences(straight[size].run.out, out):
                different.append(f"run {number} ({size} prototypes): {', '.join(found[:5])} and {len(found[5:])} more")
            else:
                shutil.rmtree(out)
    finally:
        for one in crowd:
            one.terminate()
            one.join()
    return seen, different


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--runs", type=int, default=40, help="runs that are broken off and resumed (40)")
    parser.add_argument("--signals", type=int, default=200, help="signals for all of them together (200)")
    parser.add_argument("--busy", type=int, default=2, help="processes that burn a core beside them (2)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="fastpmae-kills-"))
    seen, different = storm(folder, options.runs, options.signals, options.seed, options.busy, quiet=False)
    for what, count in sorted(seen.items()):
        print(f"{count:5} x {what}")
    print(*different, sep="\n", end="\n" * bool(different))
    print(
        f"{options.runs} runs, {seen.total()} signals, {time.monotonic() - began:.0f} s: {len(different)} runs differ "
        "from the run that nothing stopped"
    )
    if not different:
        shutil.rmtree(folder)
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
