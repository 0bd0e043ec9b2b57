"""Pretraining, from a .beton file to checkpoints: the whole loop on one page."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpmae.config import Config
from fastpmae.distributed.ranks import choose_device, join_ranks
from fastpmae.model.attention import use as use_attention
from fastpmae.model.build import check
from fastpmae.model.fp8 import check_fp8_device
from fastpmae.model.phases import Phase, describe_phase, phase_after, phases_of, resolutions_in
from fastpmae.model.resolutions import Resolution, at_size, describe_resolution
from fastpmae.plan.utilization import images_at_peak
from fastpmae.pretraining.cli import read_command
from fastpmae.pretraining.collapse import FlatLabels, collapse_figures
from fastpmae.pretraining.compile import compile_anew, compile_step
from fastpmae.pretraining.data import Prefetcher, make_loader, shared_out, steps_in_epoch
from fastpmae.pretraining.match_geometry import geometry_figures
from fastpmae.pretraining.networks import encoder_of, make_networks
from fastpmae.pretraining.online_evaluation import OnlineEvaluation
from fastpmae.pretraining.optimizer import learning_rate, make_optimizer
from fastpmae.pretraining.parallel import wrap_parallel
from fastpmae.pretraining.step import student_loss, teacher_forward
from fastpmae.pretraining.train_step import Done, Training, train_step
from fastpmae.run.checkpoint import collect_state, read_checkpoint, read_progress, restore_state, settings_before
from fastpmae.run.device_metrics import to_host
from fastpmae.run.folder import DECODER, OpenRun, describe_run, lock_run, open_run, recorded, resolve, write_machine
from fastpmae.run.images import fingerprint, open_images
from fastpmae.run.log import Log, Meter, about_run
from fastpmae.run.malloc import tune_allocator
from fastpmae.run.session import Session, open_session, stop_if_bad
from fastpmae.run.stored_run import resumed_from
from fastpmae.run.telemetry import peak_memory
from fastpmae.run.uploads import Uploads, check_shared, on_every_machine, open_uploads
from fastpmae_loaders import PairedViews, Samples
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.stores.address import parse_address


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
        run, before = open_pretraining(config, session), []
        for phase in run.phases_left():
            with contextlib.ExitStack() as stack:
                for stage in stages_of(run, phase, session, stack, before):
                    train(run, stage, session)
                before = [stage]
                del stage
        session.wait()
        session.log.say(f"done: {session.step} of {run.total_steps} steps, in {session.folder}")
        session.finish()
    return session.folder


def train(run: "Pretraining", stage: "Stage", session: Session) -> None:
    """The loop: from where the run stands to the last step of a stage, or of this start."""
    training, meter, steps_per_epoch = stage.training, stage.meter, run.steps_per_epoch
    if run.online_evaluation.is_owed(session.step, steps_per_epoch, session.folder):
        make_up_for_evaluation(run, stage, session)
    with contextlib.closing(stage.prefetcher.batches(session.step, steps_per_epoch)) as batches:
        while session.step < stage.last_step:
            epoch = session.step // steps_per_epoch
            # schedules count from the phase's start
            step, phase_epoch = session.step - stage.first_step, epoch - stage.phase.first_epoch
            lr = learning_rate(stage.phase.config, step, steps_per_epoch)
            done = train_step(training, batches, step, phase_epoch, lr, session.saver.before_update)
            meter.add(session.step, done.losses, done.grad_norm, done.skipped, done.index)
            ends_epoch = (step + 1) % steps_per_epoch == 0
            if ends_epoch:
                training.teachers.update_ema(training.student, "epoch", phase_epoch)

            session.advance(epoch, stage.prefetcher.take_failed())
            # a row of its own for the last steps of a size of views, which is never mixed with another
            on_grid = session.step % run.config.run.log_every == 0 or session.step == stage.change_step
            if on_grid or session.ends:
                write_row(stage, session, done, lr, partial=not on_grid)
            del done  # its logits would stay beside those of the next step
            # After a step that was not finite nothing is saved: the last good checkpoint stays the newest.
            if (session.is_due or session.step == stage.end_step) and not meter.is_bad():
                session.save(stage.state)
            if ends_epoch and run.online_evaluation.is_due(epoch + 1) and not session.signal:
                # A signal ends it soon; the resumed run makes up for it.
                evaluate(run, stage, session, epoch + 1)
                if session.poll():
                    stop_if_bad(meter, session)
            session.stop_if_signalled(stage.state)


@dataclass(frozen=True)
class Pretraining:
    """A run whose images and folder are open.

    Attributes:
        config: the settings with everything decided that was left to us.
        fingerprint: of the images.
        total_steps: of the whole run.
        opened: its folder, and the checkpoint that this start goes on from.
        step: that the checkpoint stands after.
        last_step: where this start ends.
        uploads: what takes it to a store, on the main rank.
    """

    config: Config
    images: Samples
    fingerprint: str
    online_evaluation: OnlineEvaluation
    steps_per_epoch: int
    total_steps: int
    opened: OpenRun
    step: int
    last_step: int
    uploads: Uploads | None

    def phases_left(self) -> list[Phase]:
        """The phases of this start: the one whose networks its checkpoint holds, even where it ends there, and on."""
        current = phase_after(self.config, self.step, self.steps_per_epoch)
        return [
            phase
            for phase in phases_of(self.config)
            if phase == current or current.first_epoch < phase.first_epoch < self.last_step / self.steps_per_epoch
        ]

    def resolutions_left(self, phase: Phase) -> list[Resolution]:
        """The sizes of a phase's views in this start, from that of its next step on; of one that is done the last."""
        steps = self.steps_per_epoch
        step = max(self.step, phase.first_epoch * steps)
        *others, last = resolutions_in(phase, self.config)
        left = [each for each in others if step < each.last_epoch * steps] + [last]
        return left[:1] + [each for each in left[1:] if each.first_epoch * steps < self.last_step]


@dataclass(frozen=True)
class Stage:
    """A phase of a run that is set up, over the epochs in which its views have one size.

    Attributes:
        first_step: of the run, at which the phase begins.
        end_step: before which it ends.
        change_step: before which the stage ends: another size follows, or the phase ends too.
        last_step: where this start leaves it.
    """

    run: Pretraining
    phase: Phase
    resolution: Resolution
    training: Training
    loader: PairedViews
    prefetcher: Prefetcher
    meter: Meter
    flat_labels: FlatLabels

    @property
    def first_step(self) -> int:
        return self.phase.first_epoch * self.run.steps_per_epoch

    @property
    def end_step(self) -> int:
        return self.phase.last_epoch * self.run.steps_per_epoch

    @property
    def change_step(self) -> int:
        return self.resolution.last_epoch * self.run.steps_per_epoch

    @property
    def last_step(self) -> int:
        return min(self.change_step, self.run.last_step)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint of the run holds (see `Session.save`)."""
        training = self.training
        tensors = collect_state(training.student, training.teachers, training.optimizer)
        return tensors | self.meter.state(training.ranks.group), {
            "steps_per_epoch": self.run.steps_per_epoch,
            "bad_images": training.ranks.sum_over_ranks(self.prefetcher.bad_images),
            "loader": self.loader.state_dict(),
            "decoder": DECODER,
            "fingerprint": self.run.fingerprint,
            "config": recorded(self.run.config).groups(),
        }


def open_pretraining(config: Config, session: Session) -> Pretraining:
    """Images and folder of a run; nothing is written yet."""
    ranks = session.ranks
    if config.efficiency.teacher_precision == "fp8":
        check_fp8_device(ranks.device)
    uploads = open_uploads(config, ranks)
    path = resumed_from(config)  # what lies in a store comes to every machine
    before = ranks.broadcast_from_main(lambda: settings_before(path))
    images = open_images(config)
    config, remarks = shared_out(resolve(config, ranks.device, images, before), ranks.size)
    steps_per_epoch = steps_in_epoch(images, config, ranks)
    online_evaluation = OnlineEvaluation(config, ranks)
    identity = fingerprint(images)
    opened = ranks.broadcast_from_main(lambda: open_run(config, identity, steps_per_epoch, remarks))
    if config.efficiency.sharded_checkpoints:
        check_shared(opened.folder, ranks)
    address = None if config.run.upload is None else parse_address(config.run.upload)
    on_every_machine(opened.checkpoint, address, opened.folder, uploads, ranks)
    step = 0 if opened.checkpoint is None else read_progress(opened.checkpoint)["step"]
    total_steps = steps_per_epoch * config.optimizer.epochs
    last_step = total_steps if config.run.steps is None else min(total_steps, config.run.steps)
    return Pretraining(
        config, images, identity, online_evaluation, steps_per_epoch, total_steps, opened, step, last_step, uploads
    )


def stages_of(
    run: Pretraining, phase: Phase, session: Session, stack: contextlib.ExitStack, before: list[Stage]
) -> Iterator[Stage]:
    """What is left of a phase, each stage when the one before is done.

    Args:
        stack: what is to be left at the phase's end.
        before: the last stage of the phase before, in this start, where there is one. It is taken from the list, so
            that its networks and moments go before others are made.
    """
    stage = set_up(run, phase, session, stack, before)
    begin(run, stage, session)
    yield stage
    for resolution in run.resolutions_left(phase)[1:]:
        stage = change_size(stage, resolution, session, stack)
        yield stage


def set_up(run: Pretraining, phase: Phase, session: Session, stack: contextlib.ExitStack, before: list[Stage]) -> Stage:
    """Loader and networks of a phase: from the run's checkpoint where it is of this phase, else from their start, or
    around the encoder of the phase before."""
    config, ranks, resolution = phase.config, session.ranks, run.resolutions_left(phase)[0]
    first_step, end_step = (run.steps_per_epoch * epoch for epoch in (phase.first_epoch, phase.last_epoch))
    resumed, init, bad_images = run.opened.checkpoint, config.run.init, 0
    if before:
        session.wait()  # until the checkpoint that the phase before has ended with is written
        # Its encoder by way of memory: other machines may not see the file, which the main rank alone has written.
        last = before.pop()
        resumed, init, bad_images = None, encoder_of(last.training.student), last.prefetcher.bad_images
        del last
        compile_anew(config, ranks)
    elif resumed is not None:
        bad_images = read_progress(resumed)["bad_images"] if ranks.is_main else 0  # the ranks' are added up
    loader = stack.enter_context(make_loader(run.images, at_size(config, resolution), ranks))
    torch.manual_seed(config.run.seed)
    shard = config.efficiency.shard and ranks.group is not None
    # What is cut in shards is never whole on a GPU.
    device = torch.device("cpu") if shard else ranks.device
    student, teachers = make_networks(config, end_step - first_step, device, None if resumed else init)
    parallel = wrap_parallel(student, teachers, ranks, shard=shard, accumulate=config.optimizer.accumulate)
    optimizer = make_optimizer(student, config)
    labels = config.teacher.teachers in ("dual", "single")
    meter = Meter(ranks.device, loader.batch_size * config.optimizer.accumulate, labels=labels)
    prefetcher = Prefetcher(loader, config, ranks.device, bad_images)
    if resumed is not None:
        checkpoint = read_checkpoint(resumed, ranks.rank, ranks.size)
        restore_state(checkpoint, student, teachers, optimizer)
        meter.load(checkpoint.part("log"))

    stack.enter_context(use_attention(config.efficiency.attention, ranks.device))
    passes = compile_step(teacher_forward, student_loss, config, ranks, (student, *teachers.modules().values()))
    # Autocast would keep the 16-bit copies of weights that are whole for a moment only.
    low = config.efficiency.precision == "bf16"
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=low, cache_enabled=not shard)
    training = Training(config, ranks, student, teachers, parallel, optimizer, *passes, autocast)
    late = (first_step + end_step) // 2 if config.loss.lambda_c > 0 else end_step + 1
    flat_labels = FlatLabels(late, lambda words: session.log.say(words))
    return Stage(run, phase, resolution, training, loader, prefetcher, meter, flat_labels)


def change_size(stage: Stage, resolution: Resolution, session: Session, stack: contextlib.ExitStack) -> Stage:
    """The stage after another: views of another size for the same networks, and schedules that go on."""
    run, ranks = stage.run, session.ranks
    stage.loader.close()
    config = at_size(stage.phase.config, resolution)
    loader = stack.enter_context(make_loader(run.images, config, ranks))
    prefetcher = Prefetcher(loader, stage.phase.config, ranks.device, stage.prefetcher.bad_images)
    words = describe_resolution(resolution)
    session.log.settle()  # what the row that is owed reads may lie in a CUDA graph's memory
    if compile_anew(config, ranks):
        words += ", for which the step is compiled anew"
    session.log.say(words)
    session.log.start_clock(session.step, images_at_peak(config, ranks))
    return replace(stage, resolution=resolution, loader=loader, prefetcher=prefetcher)


def begin(run: Pretraining, stage: Stage, session: Session) -> None:
    """Before the first step of a start the folder becomes this process's own and the log begins; before a later phase
    the log is told of it."""
    config, ranks, phase = run.config, session.ranks, stage.phase
    at_peak = images_at_peak(at_size(phase.config, stage.resolution), ranks)
    about = [describe_phase(phase)] if phase.name is not None else []
    if config.views.progressive_resolution:
        about.append(describe_resolution(stage.resolution))
    if phase != run.phases_left()[0]:
        session.log.start_clock(session.step, at_peak)
        for sentence in about:
            session.log.say(sentence)
        return
    remarks = run.opened.remarks + session.lock(lock_run(run.opened, config))
    session.begin(
        run.opened.folder,
        Log(run.opened.folder, about_run(config, at_peak), run.step, run.last_step, is_main=ranks.is_main),
        step=run.step,
        last_step=run.last_step,
        keep=config.run.keep,
        save_every=config.run.save_every,
        save_steps=config.run.save_steps,
        traced=config.run.profile,
        sharded=config.efficiency.sharded_checkpoints,
        sentences=remarks
        + describe_run(config, run.images, ranks, stage.training.student, run.steps_per_epoch, run.opened.folder)
        + about,
        uploads=run.uploads,
    )
    if ranks.is_main:
        write_machine(run.opened.folder)


def evaluate(run: Pretraining, stage: Stage, session: Session, epochs: int) -> None:
    """The figures of --eval-every after so many epochs."""
    training = stage.training
    run.online_evaluation.report(session.log, session.step, epochs, training.student, training.teachers, session.stop)


def make_up_for_evaluation(run: Pretraining, stage: Stage, session: Session) -> None:
    """The evaluation that a signal has kept the run from before it was resumed. Raises Interrupted after another."""
    epoch = session.step // run.steps_per_epoch
    evaluate(run, stage, session, epoch)
    if session.poll():
        # Not one step more: the next start would no longer know that it owes one.
        done = {"epoch": epoch - 1, "batch": run.steps_per_epoch * run.config.optimizer.accumulate}
        stage.loader.load_state_dict(stage.loader.state_dict() | done)
    session.stop_if_signalled(stage.state)


def write_row(stage: Stage, session: Session, done: Done, lr: float, *, partial: bool) -> None:
    """The row of the last step. Raises RunError where a step since the start was not finite."""
    config, ranks, teachers = stage.phase.config, session.ranks, stage.training.teachers
    step = session.step - 1 - stage.first_step
    figures = {
        "step": session.step,
        "epoch": session.step / stage.run.steps_per_epoch,
        "lr": lr,
        "bad_images": ranks.sum_over_ranks(stage.prefetcher.bad_images),
        "peak_memory_gib": round(peak_memory(ranks.device), 3),
    } | teachers.momenta(step, step // stage.run.steps_per_epoch)
    if stage.phase.number is not None:
        figures["phase"] = stage.phase.number
    if stage.run.config.views.progressive_resolution:
        figures["image_size"] = stage.resolution.size
    on_device = [stage.meter.means(ranks.group, anew=not partial)]
    if ranks.is_main:
        on_device.append(collapse_figures(done.targets, done.label_losses, done.match))
        if done.match is not None:
            on_device.append(geometry_figures(done.batch, done.match, config))
    rest = to_host(*on_device)
    stop_if_bad(stage.meter, session)

    def on_host() -> dict[str, float]:
        found = rest()
        stage.flat_labels.look(figures | found)
        return found

    session.log.row(figures, on_host, stage.prefetcher.take_wait(), partial=partial)


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
