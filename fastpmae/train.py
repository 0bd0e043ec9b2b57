"""Pretraining, from a .beton file to checkpoints: the whole loop on one page."""

import contextlib
import sys
import time
from pathlib import Path

import torch

from fastpmae.config import Config
from fastpmae.distributed.ranks import Ranks, join_ranks
from fastpmae.model.attention import use as use_attention
from fastpmae.model.build import check
from fastpmae.model.fp8 import check_fp8_device
from fastpmae.pretraining.cli import read_command
from fastpmae.pretraining.collapse import collapse_figures
from fastpmae.pretraining.compile import compile_step
from fastpmae.pretraining.data import Prefetcher, make_loader
from fastpmae.pretraining.match_geometry import geometry_figures
from fastpmae.pretraining.networks import make_networks
from fastpmae.pretraining.online_knn import OnlineKNN
from fastpmae.pretraining.optimizer import learning_rate, make_optimizer, update
from fastpmae.pretraining.parallel import no_sync, wrap_parallel
from fastpmae.pretraining.step import assign_pseudo_labels, student_loss, teacher_forward
from fastpmae.run.checkpoint import checkpoint_path, checkpoints_in, collect_state, read_checkpoint, restore_state
from fastpmae.run.checkpoint_writer import Saver
from fastpmae.run.deterministic import deterministic
from fastpmae.run.device_metrics import to_host
from fastpmae.run.folder import DECODER, describe_run, lock_run, open_run, recorded, resolve, write_machine
from fastpmae.run.images import fingerprint, open_images
from fastpmae.run.log import Log, Meter
from fastpmae.run.malloc import tune_allocator
from fastpmae.run.signals import Stop
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.errors import Interrupted, RunError, UserError


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
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop())
        ranks = stack.enter_context(join_ranks(config.efficiency.device, config.efficiency.rank_timeout))
        stack.enter_context(deterministic(config.efficiency.deterministic, ranks.device))
        if ranks.device.type == "cpu":
            tune_allocator()
        if config.efficiency.teacher_precision == "fp8":
            check_fp8_device(ranks.device)
        images = open_images(config)
        config = resolve(config, ranks.device, images)
        loader = stack.enter_context(make_loader(images, config, ranks))
        online_knn = OnlineKNN(config, ranks)
        identity = fingerprint(images)
        accumulate = config.optimizer.accumulate
        balanced_parts = accumulate if config.optimizer.sinkhorn_over == "step" else 1
        steps_per_epoch = len(loader) // accumulate
        run = ranks.broadcast_from_main(lambda: open_run(config, identity, steps_per_epoch))

        total_steps = steps_per_epoch * config.optimizer.epochs
        last_step = total_steps if config.run.steps is None else min(total_steps, config.run.steps)

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

        stack.enter_context(use_attention(config.efficiency.attention, ranks.device))
        seen, learnt = compile_step(
            teacher_forward, student_loss, config, ranks, (student, *teachers.modules().values())
        )
        # Autocast would keep the 16-bit copies of weights that are whole for a moment only.
        low = config.efficiency.precision == "bf16"
        autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=low, cache_enabled=not shard)

        remarks = run.remarks + ranks.broadcast_from_main(lambda: stack.enter_context(lock_run(run, config)))
        log = stack.enter_context(Log(run.folder, config, step, last_step, is_main=ranks.is_main))
        saver = stack.enter_context(Saver(ranks.device, config.run.keep, is_main=ranks.is_main))
        for sentence in remarks + describe_run(config, images, ranks, student, steps_per_epoch, run.folder):
            log.say(sentence)
        if ranks.is_main:
            write_machine(run.folder)

        def save() -> None:
            # After a step that was not finite nothing is saved: the last good checkpoint stays the newest.
            if not meter.is_bad():
                progress = {
                    "step": step,
                    "steps_per_epoch": steps_per_epoch,
                    "bad_images": prefetcher.bad_images,
                    "loader": loader.state_dict(),
                    "decoder": DECODER,
                    "fingerprint": identity,
                    "config": recorded(config).groups(),
                }
                log.settle()
                ranks.broadcast_from_main(saver.wait)
                tensors = collect_state(student, teachers, optimizer) | meter.state(ranks.group)
                saver.save(checkpoint_path(run.folder, step), tensors, progress)

        saved_at = time.monotonic()
        log.start_clock(step)
        if online_knn.is_owed(step, steps_per_epoch, run.folder):
            online_knn.report(log, step, step // steps_per_epoch, student, teachers, stop)
            (interrupted,) = ranks.max_over_ranks(stop.signal)
            if interrupted:
                # Not one step more: the next start would no longer know that it owes one.
                done = {"epoch": step // steps_per_epoch - 1, "batch": steps_per_epoch * accumulate}
                loader.load_state_dict(loader.state_dict() | done)
                save()
                ranks.broadcast_from_main(saver.wait)
                raise Interrupted(interrupted, step, last_step, run.folder)
        while step < last_step:
            epoch = step // steps_per_epoch
            batches = prefetcher.epoch(epoch, first_batch=step % steps_per_epoch * accumulate)
            while step < min((epoch + 1) * steps_per_epoch, last_step):
                lr = learning_rate(config, step, steps_per_epoch)
                losses, index = [], []
                for part in range(accumulate):
                    if part % balanced_parts == 0:
                        ahead = [next(batches) for _ in range(balanced_parts)]
                        with autocast:
                            targets_ahead = assign_pseudo_labels(
                                [seen(teachers, batch, config) for batch, _ in ahead], config, ranks.group
                            )
                    (batch, drop_path_scale), targets = ahead.pop(0), targets_ahead.pop(0)
                    # Gradients travel between the ranks with the last part alone.
                    with contextlib.nullcontext() if part == accumulate - 1 else no_sync(parallel):
                        with autocast:
                            of_part = learnt(parallel, batch, drop_path_scale, targets, config)
                        (of_part.total / accumulate).backward()
                    losses.append(torch.stack(of_part[:4]).detach())
                    index.append(batch.index)
                mean_losses = torch.stack(losses).mean(dim=0)
                saver.before_update()
                norm, skipped = update(optimizer, mean_losses[0], lr, config.optimizer.clip_grad, ranks)
                teachers.update_ema(student, "step", step)
                meter.add(step, mean_losses, norm, skipped, torch.cat(index))
                step += 1
                ends_epoch = step % steps_per_epoch == 0
                if ends_epoch:
                    teachers.update_ema(student, "epoch", epoch)

                log.step(step, epoch, prefetcher.take_failed())
                on_time = time.monotonic() - saved_at >= 60 * config.run.save_every
                interrupted, on_time, failed = ranks.max_over_ranks(stop.signal, on_time, saver.failed)
                if failed:
                    ranks.broadcast_from_main(saver.wait)
                ends = step == last_step or interrupted
                on_grid = step % config.run.log_every == 0 or step == total_steps
                if on_grid or ends:
                    figures = {
                        "step": step,
                        "epoch": step / steps_per_epoch,
                        "lr": lr,
                        "bad_images": prefetcher.bad_images,
                    } | teachers.momenta(step - 1, epoch)
                    on_device = [meter.means(ranks.group, anew=on_grid)]
                    if ranks.is_main:
                        on_device.append(collapse_figures(targets))
                        if of_part.match is not None:
                            on_device.append(geometry_figures(batch, of_part.match, config))
                    rest = to_host(*on_device)
                    stop_if_bad(meter, saver, ranks, run.folder)
                    log.row(figures, rest, prefetcher.take_wait(), partial=not on_grid)
                on_steps = config.run.save_steps > 0 and step % config.run.save_steps == 0
                due = ends or on_steps or on_time
                if due:
                    save()
                    saved_at = time.monotonic()
                if ends_epoch and online_knn.is_due(epoch + 1) and not interrupted:
                    # A signal ends it soon; the resumed run makes up for it.
                    online_knn.report(log, step, epoch + 1, student, teachers, stop)
                    (interrupted,) = ranks.max_over_ranks(stop.signal)
                    if interrupted and not due:
                        stop_if_bad(meter, saver, ranks, run.folder)
                        save()
                if interrupted:
                    ranks.broadcast_from_main(saver.wait)
                    raise Interrupted(interrupted, step, last_step, run.folder)
            batches.close()
        ranks.broadcast_from_main(saver.wait)
        log.say(f"done: {step} of {total_steps} steps, in {run.folder}")
    return run.folder


def stop_if_bad(meter: Meter, saver: Saver, ranks: Ranks, folder: Path) -> None:
    """Raise RunError, on every rank, when a step since the start was not finite."""
    if meter.is_bad():
        ranks.broadcast_from_main(saver.wait)
        samples = sorted(set(ranks.all_gather(meter.bad_index).tolist()))
        newest = next(iter(checkpoints_in(folder)), "none yet")
        raise RunError(
            f"the loss or a gradient of step {int(meter.bad_step) + 1} is not finite (its update was skipped). "
            f"Samples of that step: {samples}. Last good checkpoint: {newest}. "
            "A lower --blr, --clip-grad 1 or --precision fp32 usually helps"
        )


def main() -> int:
    """`fastpmae-train`."""

    def run() -> None:
        pretrain(read_command())

    return exit_with_sentence("fastpmae-train", run)


if __name__ == "__main__":
    sys.exit(main())
