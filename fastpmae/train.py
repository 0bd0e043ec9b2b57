"""Pretraining, from a .beton file to checkpoints: the whole loop on one page."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpmae.config import Config
from fastpmae.distributed.ranks import choose_device, join_ranks
from fastpmae.model.attention import use as use_attention
from fastpmae.model.build import check
from fastpmae.model.fp8 import check_fp8_device
from fastpmae.plan.utilization import images_at_peak
from fastpmae.pretraining.cli import read_command
from fastpmae.pretraining.collapse import collapse_figures
from fastpmae.pretraining.compile import compile_step
from fastpmae.pretraining.data import Prefetcher, make_loader
from fastpmae.pretraining.match_geometry import geometry_figures
from fastpmae.pretraining.networks import make_networks
from fastpmae.pretraining.online_knn import OnlineKNN
from fastpmae.pretraining.optimizer import learning_rate, make_optimizer
from fastpmae.pretraining.parallel import wrap_parallel
from fastpmae.pretraining.step import student_loss, teacher_forward
from fastpmae.pretraining.train_step import Done, Training, train_step
from fastpmae.run.checkpoint import checkpoints_in, collect_state, read_checkpoint, restore_state
from fastpmae.run.device_metrics import to_host
from fastpmae.run.folder import DECODER, describe_run, lock_run, open_run, recorded, resolve, write_machine
from fastpmae.run.images import fingerprint, open_images
from fastpmae.run.log import Log, Meter, about_run
from fastpmae.run.malloc import tune_allocator
from fastpmae.run.session import Session, open_session
from fastpmae.run.telemetry import peak_memory
from fastpmae_loaders import PairedViews
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.errors import RunError, UserError


def pretrain(config: Config) -> Path:
    """Pretrain as `config` says and return the run's folder.

    Raises:
        UserError: for settings, images or a run folder that do not fit.
        RunError: when a loss or a gradient is no longer finite, or a checkpoint cannot be written.
        Interrupted: after SIGTERM, SIGINT, SIGUSR1 or SIGHUP, once the checkpoint is written.
    """
    if not isinstance(config, Config):
        raise UserError(f"pretrain takes a Config, such as PRESETS['demo'].using(...), and no {type(config).__name__}")
    check(config)
    ranks = join_ranks(config.efficiency.device, config.efficiency.rank_timeout)
    with open_session(ranks, config.efficiency.deterministic) as session:
        run = set_up(config, session)
        training, meter, steps_per_epoch = run.training, run.meter, run.steps_per_epoch
        if run.online_knn.is_owed(session.step, steps_per_epoch, session.folder):
            make_up_for_evaluation(run, session)
        batches = session.enter(contextlib.closing(run.prefetcher.batches(session.step, steps_per_epoch)))
        while session.step < session.last_step:
            step, epoch = session.step, session.step // steps_per_epoch
            lr = learning_rate(run.config, step, steps_per_epoch)
            done = train_step(training, batches, step, lr, session.saver.before_update)
            meter.add(step, done.losses, done.grad_norm, done.skipped, done.index)
            ends_epoch = (step + 1) % steps_per_epoch == 0
            if ends_epoch:
                training.teachers.update_ema(training.student, "epoch", epoch)

            session.advance(epoch, run.prefetcher.take_failed())
            on_grid = session.step % config.run.log_every == 0 or session.step == run.total_steps
            if on_grid or session.ends:
                write_row(run, session, done, lr, partial=not on_grid)
            del done  # its logits would stay beside those of the next step
            # After a step that was not finite nothing is saved: the last good checkpoint stays the newest.
            if session.is_due and not meter.is_bad():
                session.save(run.state)
            if ends_epoch and run.online_knn.is_due(epoch + 1) and not session.signal:
                # A signal ends it soon; the resumed run makes up for it.
                run.online_knn.report(
                    session.log, session.step, epoch + 1, training.student, training.teachers, session.stop
                )
                if session.poll():
                    stop_if_bad(meter, session)
            session.stop_if_signalled(run.state)
        session.wait()
        session.log.say(f"done: {session.step} of {run.total_steps} steps, in {session.folder}")
    return session.folder


@dataclass(frozen=True)
class Pretraining:
    """A run that is set up.

    Attributes:
        config: the settings with everything decided that was left to us.
        fingerprint: of the images.
        total_steps: of the whole run, whose schedules stretch over them.
    """

    config: Config
    training: Training
    loader: PairedViews
    prefetcher: Prefetcher
    meter: Meter
    online_knn: OnlineKNN
    fingerprint: str
    steps_per_epoch: int
    total_steps: int

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint of the run holds (see `Session.save`)."""
        training = self.training
        tensors = collect_state(training.student, training.teachers, training.optimizer)
        return tensors | self.meter.state(training.ranks.group), {
            "steps_per_epoch": self.steps_per_epoch,
            "bad_images": self.prefetcher.bad_images,
            "loader": self.loader.state_dict(),
            "decoder": DECODER,
            "fingerprint": self.fingerprint,
            "config": recorded(self.config).groups(),
        }


def set_up(config: Config, session: Session) -> Pretraining:
    """Images, networks and folder of a run, from the start or from where its checkpoint stands."""
    ranks = session.ranks
    if config.efficiency.teacher_precision == "fp8":
        check_fp8_device(ranks.device)
    images = open_images(config)
    config = resolve(config, ranks.device, images)
    loader = session.enter(make_loader(images, config, ranks))
    online_knn = OnlineKNN(config, ranks)
    identity = fingerprint(images)
    accumulate = config.optimizer.accumulate
    steps_per_epoch = len(loader) // accumulate
    run = ranks.broadcast_from_main(lambda: open_run(config, identity, steps_per_epoch))
    total_steps = steps_per_epoch * config.optimizer.epochs
    last_step = total_steps if config.run.steps is None else min(total_steps, config.run.steps)

    about = about_run(config, images_at_peak(config, ranks))
    init = config.run.init if run.checkpoint is None else None
    torch.manual_seed(config.run.seed)
    shard = config.efficiency.shard and ranks.group is not None
    # What is cut in shards is never whole on a GPU.
    student, teachers = make_networks(config, total_steps, torch.device("cpu") if shard else ranks.device, init)
    parallel = wrap_parallel(student, teachers, ranks, shard=shard, accumulate=accumulate)
    optimizer = make_optimizer(student, config)
    meter = Meter(ranks.device, loader.batch_size * accumulate)
    prefetcher = Prefetcher(loader, config, ranks.device)
    step = 0
    if run.checkpoint is not None:
        checkpoint = read_checkpoint(run.checkpoint)
        restore_state(checkpoint, student, teachers, optimizer)
        meter.load(checkpoint.part("log"))
        step, prefetcher.bad_images = checkpoint.progress["step"], checkpoint.progress["bad_images"]

    session.enter(use_attention(config.efficiency.attention, ranks.device))
    passes = compile_step(teacher_forward, student_loss, config, ranks, (student, *teachers.modules().values()))
    # Autocast would keep the 16-bit copies of weights that are whole for a moment only.
    low = config.efficiency.precision == "bf16"
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=low, cache_enabled=not shard)
    training = Training(config, ranks, student, teachers, parallel, optimizer, *passes, autocast)

    remarks = run.remarks + session.lock(lock_run(run, config))
    session.begin(
        run.folder,
        Log(run.folder, about, step, last_step, is_main=ranks.is_main),
        step=step,
        last_step=last_step,
        keep=config.run.keep,
        save_every=config.run.save_every,
        save_steps=config.run.save_steps,
        traced=config.run.profile,
        sentences=remarks + describe_run(config, images, ranks, student, steps_per_epoch, run.folder),
    )
    if ranks.is_main:
        write_machine(run.folder)
    return Pretraining(config, training, loader, prefetcher, meter, online_knn, identity, steps_per_epoch, total_steps)


def make_up_for_evaluation(run: Pretraining, session: Session) -> None:
    """The evaluation that a signal has kept the run from before it was resumed. Raises Interrupted after another."""
    training, step, steps_per_epoch = run.training, session.step, run.steps_per_epoch
    epoch = step // steps_per_epoch
    run.online_knn.report(session.log, step, epoch, training.student, training.teachers, session.stop)
    if session.poll():
        # Not one step more: the next start would no longer know that it owes one.
        done = {"epoch": epoch - 1, "batch": steps_per_epoch * run.config.optimizer.accumulate}
        run.loader.load_state_dict(run.loader.state_dict() | done)
    session.stop_if_signalled(run.state)


def write_row(run: Pretraining, session: Session, done: Done, lr: float, *, partial: bool) -> None:
    """The row of the last step. Raises RunError where a step since the start was not finite."""
    config, ranks, teachers = run.config, session.ranks, run.training.teachers
    figures = {
        "step": session.step,
        "epoch": session.step / run.steps_per_epoch,
        "lr": lr,
        "bad_images": run.prefetcher.bad_images,
        "peak_memory_gib": round(peak_memory(ranks.device), 3),
    } | teachers.momenta(session.step - 1, (session.step - 1) // run.steps_per_epoch)
    on_device = [run.meter.means(ranks.group, anew=not partial)]
    if ranks.is_main:
        on_device.append(collapse_figures(done.targets))
        if done.match is not None:
            on_device.append(geometry_figures(done.batch, done.match, config))
    rest = to_host(*on_device)
    stop_if_bad(run.meter, session)
    session.log.row(figures, rest, run.prefetcher.take_wait(), partial=partial)


def stop_if_bad(meter: Meter, session: Session) -> None:
    """Raise RunError, on every rank, when a step since the start was not finite."""
    if meter.is_bad():
        session.wait()
        samples = sorted(set(session.ranks.all_gather(meter.bad_index).tolist()))
        newest = next(iter(checkpoints_in(session.folder)), "none yet")
        raise RunError(
            f"the loss or a gradient of step {int(meter.bad_step) + 1} is not finite (its update was skipped). "
            f"Samples of that step: {samples}. Last good checkpoint: {newest}. "
            "A lower --blr (or --lr), --clip-grad 1 or --precision fp32 usually helps"
        )


def main() -> int:
    """`fastpmae-train`."""

    def run() -> None:
        config = read_command()
        # a --device that is not there is refused in `pretrain`, once for all ranks
        tune_allocator(choose_device("cpu" if config.efficiency.device == "cpu" else "auto"))
        pretrain(config)

    return exit_with_sentence("fastpmae-train", run)


if __name__ == "__main__":
    sys.exit(main())
