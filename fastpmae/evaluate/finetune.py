"""Training a classifier on augmented images: fine-tuning a whole ViT, or MAE's linear probe on a frozen one.

The folder holds `checkpoints/`, `metrics.jsonl` (a row each epoch), `train.log`, and at the end
`classifier.safetensors`.
"""

import contextlib
import dataclasses

import numpy as np
import torch
from jaxtyping import Int
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor

from fastpmae.distributed.data_parallel import average_gradients
from fastpmae.distributed.ranks import Ranks, to_device
from fastpmae.evaluate.augment import Mixing, RandAugment, take_over_drop_path
from fastpmae.evaluate.classifier import Probe, make_classifier, make_optimizer, make_schedule, write_classifier
from fastpmae.evaluate.datasets import check_readable, engine_for, half
from fastpmae.evaluate.finetune_state import Setting, begin, recorded_setting, take_up
from fastpmae.evaluate.finetune_step import ClassifierTraining, batches_of_epoch, make_loader, train_step
from fastpmae.evaluate.metrics import Scores, rank
from fastpmae.evaluate.recipe import FinetuneConfig
from fastpmae.run.folder import lock_folder
from fastpmae.run.log import About
from fastpmae.run.session import Session, open_session
from fastpmae.run.signals import Stop
from fastpmae.run.uploads import take_up_at
from fastpmae_loaders import PlainViews
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import Interrupted, UserError
from fastpmae_loaders.machine import loader_threads
from fastpmae_loaders.values import checked


@checked
def train_classifier(
    setting: Setting,
    config: FinetuneConfig,
    *,
    resume: bool = False,
    steps: int | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> Scores:
    """Train, test, and leave the classifier in the folder; returns the last test's scores.

    Several ranks share every batch and every test, and the first of them writes: the numbers are those of one rank, up
    to the order of sums.

    Args:
        resume: go on with the folder's newest sound checkpoint, where there is one, to the same numbers.
        steps: stop after so many steps in all, with a checkpoint; changes no schedule.
        ranks: that train together (see `join_ranks`); without them this process alone.

    Raises:
        UserError: for negative `steps`, images that make no batch, a folder that holds a training, or a resume with
            other settings.
        RunError: when the loss is no longer finite, or a checkpoint cannot be written.
        Interrupted: after SIGTERM, SIGINT, SIGUSR1 or SIGHUP, once the checkpoint is written.
    """
    if steps is not None and steps < 0:
        raise UserError(f"--steps {steps}: 0 or more")
    ranks = ranks or Ranks(0, 1, 1, setting.device, None)
    progress = progress if progress is not None and ranks.is_main else Progress()
    config = fitted(setting, config, ranks, progress)
    with open_session(contextlib.nullcontext(ranks), setting.deterministic) as session:
        training = set_up(setting, config, session, progress, resume=resume, steps=steps)
        scores = None
        # A signal leaves the row of an epoch that is not tested yet to the resumed training: a test may take longer
        # than whoever sends the signal waits.
        if training.lacks_row(session.step):
            scores = end_epoch(training, session, progress)
        session.poll()
        session.stop_if_signalled(lambda: training.state(session.step))
        while session.step < session.last_step:
            train_epoch(training, session, progress)
            scores = None
            if training.lacks_row(session.step) and not session.signal:
                scores = end_epoch(training, session, progress)
                session.poll()
            session.stop_if_signalled(lambda: training.state(session.step))
        session.wait()
        ranks.broadcast_from_main(lambda: write_classifier(setting, training.tested, config))
        scores = scores or evaluate_classifier(training, progress, session.stop)
        if scores is None:
            raise Interrupted(session.stop.signal, session.step, session.last_step, session.place)
        session.finish()
        return scores


def fitted(setting: Setting, config: FinetuneConfig, ranks: Ranks, progress: Progress) -> FinetuneConfig:
    """The settings with a batch that the images fill; says so where a probe's is made smaller. Raises UserError."""
    images = len(setting.train.labels)
    if setting.frozen and (smaller := config.fitted(images, ranks.size)) != config:
        # MAE's batch for its probe is larger than many a set of images.
        rates = f", and the peak learning rate is {smaller.peak_lr:.3g} instead of {config.peak_lr:.3g}"
        progress.tell(
            f"--batch-size {config.batch_size} is more than there are images: a step takes {smaller.batch_size}"
            + (rates if config.lr is None else "")
        )
        config = smaller
    if images < config.batch_size:
        raise UserError(
            f"{setting.train.samples.path} holds {images} images, less than one batch of "
            f"{config.batch_size}: choose a smaller --batch-size"
        )
    unit = config.accumulate * ranks.size * (2 if config.mixes else 1)
    if config.batch_size % unit:
        pairs = ", in pairs that mixup and cutmix mix" if config.mixes else ""
        raise UserError(
            f"--batch-size {config.batch_size} does not share out evenly over {ranks.size} ranks x --accumulate "
            f"{config.accumulate}{pairs}: choose a multiple of {unit}"
        )
    return config


def set_up(
    setting: Setting, config: FinetuneConfig, session: Session, progress: Progress, *, resume: bool, steps: int | None
) -> ClassifierTraining:
    """Networks, images and folder of a training, from the start or from where its checkpoint stands."""
    ranks = session.ranks
    setting = dataclasses.replace(setting, workers=loader_threads(setting.workers, ranks.local_size))
    uploads = take_up_at(setting.upload, setting.folder, ranks, resume=resume)
    for remark in session.lock(lock_folder(setting.folder)):
        progress.tell(remark)
    loader = session.enter(make_loader(setting, config, ranks))
    # the first test comes after an epoch
    check_readable(
        setting.val, setting.engine, image_size=setting.backbone.image_size, batch_size=setting.feature_batch,
        crop_ratio=setting.crop_ratio,
    )  # fmt: skip
    # a process more than there are images would have nothing to do
    workers = min(setting.workers, loader.batch_size)
    backbone = setting.backbone
    augment = session.enter(RandAugment(config.aa, backbone.image_size, backbone.mean, config.seed, workers))
    steps_per_epoch = len(loader) // config.accumulate
    model, encode = make_classifier(setting, config)
    drop_path = take_over_drop_path(model)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, steps_per_epoch)
    # Without its warm-up an average with DeiT's 0.99996 is nine tenths the start, after 2,000 steps.
    decay = config.model_ema_decay
    ema = ModelEmaV3(model, decay, use_warmup=True, warmup_power=0.75) if decay else None
    mixing = Mixing(config, len(setting.train.names), setting.device)
    record = recorded_setting(setting, config)
    step, sums, complaints = take_up(setting, config, resume, record, steps_per_epoch, model, optimizer, ema, ranks)
    parallel = model
    if ranks.group is not None:
        parallel = average_gradients(model, static_graph=config.accumulate == 1)
        if isinstance(model, Probe):
            model.group = ranks.group
    training = ClassifierTraining(
        setting, config, ranks, loader, augment, model, parallel, drop_path, encode, optimizer, schedule, ema, mixing,
        sums.to(setting.device), record,
    )  # fmt: skip
    last = config.epochs * steps_per_epoch
    last = last if steps is None else min(last, steps)
    about = About(
        str(setting.train.samples.path), config.batch_size, config.epochs, record, setting.tensorboard, setting.wandb,
        progress.tell,
    )  # fmt: skip
    begin(
        session, setting.folder, about, step=step, last_step=last, lacks_row=training.lacks_row(step),
        save_every=config.save_every, complaints=complaints, uploads=uploads,
    )  # fmt: skip
    return training


def train_epoch(training: ClassifierTraining, session: Session, progress: Progress) -> None:
    """Train to the end of the epoch, or of this start of the training, or until a signal."""
    config, epoch = training.config, session.step // training.steps_per_epoch
    ends = min((epoch + 1) * training.steps_per_epoch, session.last_step)
    batches = batches_of_epoch(training, session.step)
    with progress.count((ends - session.step) * config.batch_size, "images"), contextlib.closing(batches):
        while session.step < ends and not session.signal:
            train_step(training, batches, session.step, session.saver.before_update)
            progress.advance(config.batch_size)
            session.advance(epoch)
            if session.is_due:
                session.save(lambda: training.state(session.step))


def end_epoch(training: ClassifierTraining, session: Session, progress: Progress) -> Scores | None:
    """Write the epoch's row, with a test where one is due; nothing when a signal ends the test."""
    config, step = training.config, session.step
    loss = training.mean_loss(step)
    epoch = step // training.steps_per_epoch
    training.schedule.step_update(step - 1)  # a training that is resumed here has set no rate yet
    rates = [group["lr"] for group in training.optimizer.param_groups]
    row = {"epoch": epoch, "step": step, "lr": max(rates), "loss": loss}
    scores = None
    if epoch % config.eval_every == 0 or epoch == config.epochs:
        scores = evaluate_classifier(training, progress, session.stop)
        if scores is None:
            return None
        row |= scores.figures()
    session.log.row_of_epoch(row, _sentence(row, config.epochs))
    training.sums.zero_()
    return scores


@torch.inference_mode()
def evaluate_classifier(training: ClassifierTraining, progress: Progress, stop: Stop) -> Scores | None:
    """The scores on the validation set, which the ranks share; None where a signal came before the end."""
    setting, ranks, model = training.setting, training.ranks, training.tested
    model.eval()
    count = len(setting.val.labels)
    first, end = _shares(count, ranks)[ranks.rank : ranks.rank + 2]
    ranked, stopped = [torch.empty(0, min(5, len(setting.train.names)), dtype=torch.int64)], False
    views = PlainViews(
        setting.val.samples,
        setting.feature_batch,
        image_size=setting.backbone.image_size,
        crop_ratio=setting.crop_ratio,
        engine=engine_for(setting.val.samples, setting.engine),
        workers=setting.workers,
        pin_memory=setting.device.type == "cuda",
        indices=np.arange(first, end),
    )
    with views, progress.count(end - first, "test images"), half(setting.device):
        for images, _, _ in views:
            stopped = bool(stop.signal)
            if stopped:
                break
            given = training.encode(setting.backbone.normalised(to_device(images, setting.device)))
            ranked.append(rank(model(given).float()))
            progress.advance(len(images))
    if ranks.max_over_ranks(stopped)[0]:
        return None
    return Scores(setting.val.labels, _joined(torch.cat(ranked), ranks, count))


def _shares(count: int, ranks: Ranks) -> list[int]:
    """Where each rank's share of `count` images begins, and where the last one ends."""
    return [count * rank // ranks.size for rank in range(ranks.size + 1)]


def _joined(mine: Int[Tensor, "share best"], ranks: Ranks, count: int) -> Int[Tensor, "images best"]:
    """The ranks' shares of `count` rows, one after the other."""
    if ranks.group is None:
        return mine
    most = -(-count // ranks.size)
    padded = torch.cat([mine, mine.new_zeros(most - len(mine), mine.shape[1])])
    parts = ranks.all_gather(padded).split(most)
    ends = _shares(count, ranks)
    return torch.cat([part[: end - first] for part, first, end in zip(parts, ends[:-1], ends[1:], strict=True)])


def _sentence(row: dict[str, float], epochs: int) -> str:
    tested = f", top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %" if "top1" in row else ""
    return f"epoch {row['epoch']:.0f}/{epochs}: loss {row['loss']:.4f}{tested}"
