"""The loop that trains a segmenter or a detector: steps, rows, tests, checkpoints, signals, several ranks.

The folder holds `checkpoints/`, `metrics.jsonl` (a row every --log-every steps), `train.log`, and at the end the
network.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastpmae.distributed.data_parallel import average_gradients, no_sync
from fastpmae.distributed.ranks import Ranks, mean_over_ranks
from fastpmae.evaluate.augment import DropPath
from fastpmae.evaluate.datasets import half
from fastpmae.evaluate.dense.order import Place, fetched, places_of, set_dropped
from fastpmae.evaluate.dense.recipe import DenseConfig
from fastpmae.evaluate.dense.state import take_up_dense
from fastpmae.evaluate.dense.upernet import ChannelDropout
from fastpmae.evaluate.finetune_state import begin, collect_state
from fastpmae.run.folder import lock_folder
from fastpmae.run.log import About
from fastpmae.run.session import Session, open_session
from fastpmae.run.signals import Stop
from fastpmae.run.uploads import take_up_at
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import Interrupted, RunError, UserError
from fastpmae_loaders.machine import loader_threads
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.values import Typed


@dataclass(frozen=True)
class Setting(Typed):
    """Where a training runs, and what it writes."""

    folder: Path
    device: torch.device
    workers: int = 0
    """Threads that prepare images; 0 takes all cores."""
    deterministic: bool = False
    """On a GPU compute the same bits each time."""
    tensorboard: bool = False
    """Write TensorBoard events."""
    wandb: bool = False
    """Log to Weights & Biases too."""
    upload: Address | None = None
    """Where checkpoints, the log and the result are taken to."""


@dataclass(frozen=True)
class Task:
    """What segmentation and detection do not share.

    Attributes:
        kind: "segment" or "detect".
        record: what decides the numbers, as a checkpoint keeps it: the settings under `kind`, "backbone", "train" and
            "set" (what the classes are called, and whether there are outlines).
        images: of the training set.
        iterations: optimizer steps.
        rate: the learning rate's share of its peak at a step.
        groups: parameters with `lr_scale`.
        draw: makes a training example; called by several threads.
        loss: of a micro-batch, by the network as it is called.
        evaluate: a test on the validation set, which the ranks share; None where a signal came before its end.
        words: the figures of a test as a sentence tells them.
        write: leave the network in the folder.
    """

    kind: str
    config: DenseConfig
    record: dict[str, Any]
    images: int
    iterations: int
    rate: Callable[[int], float]
    model: nn.Module
    groups: list[dict[str, Any]]
    draw: Callable[[Place], Any]
    loss: Callable[[nn.Module, list[Place], list[Any]], Float[Tensor, ""]]
    evaluate: Callable[[Progress, Stop], Any]
    words: Callable[[dict[str, float]], str]
    write: Callable[[], None]


@dataclass(frozen=True)
class DenseTraining:
    """What a step works on.

    Attributes:
        parallel: the model as it is called, over all ranks.
        dropped: its stochastic depth and dropout.
        sums: of the losses since the last row, and how many they are.
    """

    task: Task
    setting: Setting
    ranks: Ranks
    workers: int
    parallel: nn.Module
    dropped: list[DropPath | ChannelDropout]
    optimizer: torch.optim.Optimizer
    sums: Float[Tensor, " 2"]

    def is_tested(self, step: int) -> bool:
        """Whether a test follows a step."""
        every = self.task.config.eval_every
        return step == self.task.iterations or (every > 0 and step % every == 0)

    def lacks_row(self, step: int) -> bool:
        """Whether a row is due after a step and not written."""
        due = step % self.task.config.log_every == 0 or self.is_tested(step)
        return due and bool(self.sums[1] > 0)

    def mean_loss(self) -> float:
        """Since the last row, over all ranks. Raises RunError, on all of them, where it is not finite."""
        total, count = mean_over_ranks(self.sums, self.ranks.group).tolist()
        if not math.isfinite(total / count):
            raise RunError("the loss is not finite; a lower --lr or a --clip-grad usually helps")
        return total / count

    def state(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint holds (see `Session.save`). Raises RunError as `mean_loss`: the one before stays."""
        if self.sums[1] > 0:
            self.mean_loss()
        return collect_state(self.task.model, self.optimizer), {
            "steps_per_epoch": max(1, self.task.images // self.task.config.batch_size),
            "bad_images": 0,
            "fingerprint": str(self.task.record["train"]["fingerprint"]),
            "config": self.task.record,
            "loss": mean_over_ranks(self.sums, self.ranks.group).tolist(),
        }


def train_dense(
    task: Task,
    setting: Setting,
    *,
    resume: bool = False,
    steps: int | None = None,
    progress: Progress | None = None,
    ranks: Ranks,
) -> Any:
    """Train, test, and leave the network in the folder; returns the last test's scores.

    Several ranks share every batch and every test, and the first of them writes: the numbers are those of one rank, up
    to the order of sums.

    Args:
        resume: go on with the folder's newest sound checkpoint, where there is one, to the same numbers.
        steps: stop after so many steps in all, with a checkpoint; changes no schedule.

    Raises:
        UserError: for negative `steps`, a batch that the ranks cannot share, a folder that holds a training, or a
            resume with other settings.
        RunError: when the loss is no longer finite, or a checkpoint cannot be written.
        Interrupted: after SIGTERM, SIGINT, SIGUSR1 or SIGHUP, once the checkpoint is written.
    """
    if steps is not None and steps < 0:
        raise UserError(f"--steps {steps}: 0 or more")
    check_shares(task.config, ranks)
    progress = progress if progress is not None and ranks.is_main else Progress()
    with open_session(contextlib.nullcontext(ranks), setting.deterministic) as session:
        training = set_up(task, setting, session, progress, resume=resume, steps=steps)
        batch_size, per_epoch = task.config.batch_size, task.images / task.config.batch_size
        scores = None
        session.poll()
        if training.lacks_row(session.step) and not session.signal:
            scores = write_row(training, session, progress)
        session.stop_if_signalled(lambda: training.state(session.step))
        batches = batches_from(training, session.step, session.last_step)
        images = (session.last_step - session.step) * batch_size
        with contextlib.closing(batches), progress.count(images, "images"):
            while session.step < session.last_step:
                scores = None  # of an earlier step
                train_step(training, batches, session.step, session.saver.before_update)
                progress.advance(batch_size)
                session.advance(int(session.step / per_epoch))
                if training.lacks_row(session.step) and not session.signal:
                    scores = write_row(training, session, progress)
                    session.poll()
                if session.is_due or session.signal:
                    session.save(lambda: training.state(session.step))
                session.stop_if_signalled(lambda: training.state(session.step))
        session.wait()
        ranks.broadcast_from_main(task.write)
        scores = scores or task.evaluate(progress, session.stop)
        if scores is None:
            raise Interrupted(session.stop.signal, session.step, session.last_step, session.place)
        session.finish()
        return scores


def check_shares(config: DenseConfig, ranks: Ranks) -> None:
    """Raise UserError where a batch does not share out over ranks and micro-batches."""
    unit = config.accumulate * ranks.size
    if config.batch_size % unit:
        raise UserError(
            f"--batch-size {config.batch_size} does not share out evenly over {ranks.size} ranks x --accumulate "
            f"{config.accumulate}: choose a multiple of {unit}"
        )


def set_up(
    task: Task, setting: Setting, session: Session, progress: Progress, *, resume: bool, steps: int | None
) -> DenseTraining:
    """Network, optimizer and folder of a training, from the start or from where its checkpoint stands."""
    ranks, config, model = session.ranks, task.config, task.model
    uploads = take_up_at(setting.upload, setting.folder, ranks, resume=resume)
    for remark in session.lock(lock_folder(setting.folder)):
        progress.tell(remark)
    optimizer = torch.optim.AdamW(task.groups, lr=config.lr, betas=config.betas)
    step, sums, complaints = take_up_dense(
        setting.folder, task.kind, config, resume, task.record, task.iterations, model, optimizer, ranks
    )
    parallel = model
    if ranks.group is not None:
        parallel = average_gradients(model, static_graph=config.accumulate == 1)
    dropped = [module for module in model.modules() if isinstance(module, DropPath | ChannelDropout)]
    workers = loader_threads(setting.workers, ranks.local_size)
    training = DenseTraining(task, setting, ranks, workers, parallel, dropped, optimizer, sums.to(setting.device))
    last = task.iterations if steps is None else min(task.iterations, steps)
    epochs = math.ceil(task.iterations * config.batch_size / task.images)
    about = About(
        str(task.record["train"]["path"]), config.batch_size, epochs, task.record, setting.tensorboard, setting.wandb,
        progress.tell,
    )  # fmt: skip
    begin(
        session, setting.folder, about, step=step, last_step=last, lacks_row=training.lacks_row(step),
        save_every=config.save_every, complaints=complaints, uploads=uploads,
    )  # fmt: skip
    return training


def batches_from(
    training: DenseTraining, step: int, last_step: int
) -> Generator[tuple[list[Place], list[Any]], None, None]:
    """This rank's micro-batches from a step on."""
    task, config, ranks = training.task, training.task.config, training.ranks
    wanted = (
        places_of(
            number, part, images=task.images, batch_size=config.batch_size, accumulate=config.accumulate,
            seed=config.seed, rank=ranks.rank, ranks=ranks.size,
        )
        for number in range(step, last_step)
        for part in range(config.accumulate)
    )  # fmt: skip
    return fetched(task.draw, wanted, training.workers)


def train_step(
    training: DenseTraining,
    batches: Iterator[tuple[list[Place], list[Any]]],
    step: int,
    before_update: Callable[[], None],
) -> None:
    """Train on the next micro-batches, `accumulate` of them; `before_update` comes before any change in place."""
    task, config, device = training.task, training.task.config, training.setting.device
    rate = config.lr * task.rate(step)
    for group in training.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    task.model.train()
    before_update()  # a BatchNorm moves its means in the forward pass
    for part in range(config.accumulate):
        places, examples = next(batches)
        # Gradients travel between the ranks with the last part alone.
        with contextlib.nullcontext() if part == config.accumulate - 1 else no_sync(training.parallel):
            set_dropped(training.dropped, config.seed, places, device)
            with half(device):
                loss = task.loss(training.parallel, places, examples)
            (loss / config.accumulate).backward()
        training.sums.add_(torch.stack([loss.detach().double(), torch.ones_like(loss, dtype=torch.float64)]))
    if config.clip_grad:
        nn.utils.clip_grad_norm_(task.model.parameters(), config.clip_grad)
    training.optimizer.step()
    training.optimizer.zero_grad()


def write_row(training: DenseTraining, session: Session, progress: Progress) -> Any:
    """Write the row of a step, with a test where one is due, and return its scores; nothing when a signal ends it."""
    task, step = training.task, session.step
    loss = training.mean_loss()
    epoch = step * task.config.batch_size / task.images
    row = {"epoch": round(epoch, 4), "step": step, "lr": task.config.lr * task.rate(step - 1), "loss": loss}
    scores, tested = None, ""
    if training.is_tested(step):
        scores = task.evaluate(progress, session.stop)
        if scores is None:
            return None
        figures = scores.figures()
        row |= figures
        tested = f", {task.words(figures)}"
    session.log.row_of_epoch(row, f"step {step}/{task.iterations}: loss {loss:.4f}{tested}")
    training.sums.zero_()
    return scores
