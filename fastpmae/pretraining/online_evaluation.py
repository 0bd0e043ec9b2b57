"""Evaluation during training: k-NN and a linear probe on labelled images, of the student and every teacher."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fastpmae.config import Config
from fastpmae.distributed.ranks import Ranks
from fastpmae.evaluate.datasets import Labelled, open_labelled, over_images
from fastpmae.evaluate.features import features
from fastpmae.evaluate.knn import knn_ranked
from fastpmae.evaluate.least_squares import least_squares_predict
from fastpmae.evaluate.metrics import Scores
from fastpmae.model.teachers import Teachers
from fastpmae.model.vit import Encoder, Student
from fastpmae.run.log import Log, read_rows
from fastpmae.run.signals import Stop
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.machine import loader_threads

NEIGHBOURS = 20
BATCH = 64


class _Stopped(Exception):
    """An evaluation that a signal ended."""


class _Within(Progress):
    """Counts in the bar that the run shows already: a terminal has room for one. A signal ends what is counted."""

    def __init__(self, show: Callable[[str], None], stop: Stop):
        super().__init__()
        self.show, self.stop = show, stop

    def advance(self, count: int = 1) -> None:
        super().advance(count)
        self.show(f"evaluation: {self.so_far()}")
        if self.stop.signal:
            raise _Stopped


class OnlineEvaluation:
    """What `--eval-every` asks for. Nothing of the run itself changes by it: no random number is drawn.

    Every rank computes all of it, so that none waits long for another and the ranks need not agree on anything. Those
    that share a machine's cores take longer over it than one alone would.

    Raises:
        UserError: for images that cannot be opened, have no labels, or are fewer than the neighbours.
    """

    def __init__(self, config: Config, ranks: Ranks):
        run = config.run
        self.config, self.ranks, self.every = config, ranks, run.eval_every
        self.train: Labelled | None = None
        if self.every == 0:
            return
        train = run.eval_train or config.data.beton
        assert train is not None
        self.train, self.val = open_labelled(train, run.eval_val, config.data.cached)
        if len(self.train.labels) <= NEIGHBOURS:
            raise UserError(
                f"--eval-every asks {NEIGHBOURS} neighbours, and {train} holds {len(self.train.labels)} images"
            )

    def is_due(self, epochs_done: int) -> bool:
        """Whether it is time after so many epochs; also after the last one."""
        return self.every > 0 and (epochs_done % self.every == 0 or epochs_done == self.config.optimizer.epochs)

    def is_owed(self, step: int, steps_per_epoch: int, folder: Path) -> bool:
        """Whether a resumed run starts where an evaluation was due that a signal has kept from being written."""
        epochs, rest = divmod(step, steps_per_epoch)
        if rest or not epochs or not self.is_due(epochs):
            return False
        return self.ranks.broadcast_from_main(
            lambda: not any(row["step"] == step and "knn_student" in row for row in read_rows(folder / "metrics.jsonl"))
        )

    def report(self, log: Log, step: int, epoch: int, student: Student, teachers: Teachers, stop: Stop) -> None:
        """Write the figures as a row of the run's; after a signal none, and soon."""
        progress = _Within(lambda words: log.bar.update(note=words), stop)
        with contextlib.suppress(_Stopped):
            log.evaluation(step, epoch, lambda: self.figures(student, teachers, progress))

    def figures(self, student: Student, teachers: Teachers, progress: Progress | None = None) -> dict[str, float]:
        """Top-1 of each network's class token in percent: `knn_NETWORK` and `linear_NETWORK`.

        By 20-NN (cosine, temperature 0.07), and by a linear classifier in closed form (see `least_squares_predict`). On
        `--eval-val`, or, without it, on the training images, each left out once.
        """
        assert self.train is not None
        progress = progress or Progress()
        networks: dict[str, Encoder] = {"student": student.encoder}
        networks |= {name: teacher.encoder for name, teacher in teachers.modules().items()}
        labels, classes = self.train.labels.to(self.ranks.device), len(self.train.names)
        truth = (self.val or self.train).labels
        train_features = self._features(networks, self.train, progress)
        val_features = None if self.val is None else self._features(networks, self.val, progress)
        knn, linear = {}, {}
        for name, rows in train_features.items():
            others = None if val_features is None else val_features[name]
            ranked = knn_ranked(
                rows,
                labels,
                rows if others is None else others,
                [NEIGHBOURS],
                best=1,
                leave_one_out=others is None,
                progress=progress,
            )
            knn[f"knn_{name}"] = _top1(truth, ranked[NEIGHBOURS])
            found = least_squares_predict(rows, labels, classes, others, progress=progress)
            linear[f"linear_{name}"] = _top1(truth, found[:, None])
        return knn | linear

    def _features(
        self, networks: dict[str, Encoder], images: Labelled, progress: Progress
    ) -> dict[str, Float[Tensor, "images dim"]]:
        efficiency = self.config.efficiency
        low = torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=efficiency.precision == "bf16")

        def embed(pictures: UInt8[Tensor, "batch 3 side side"]) -> list[Float[Tensor, "batch dim"]]:
            with low:
                return [features(encoder, pictures) for encoder in networks.values()]

        rows = over_images(
            embed,
            images,
            image_size=self.config.views.image_size,
            device=self.ranks.device,
            batch_size=BATCH,
            workers=loader_threads(efficiency.workers, self.ranks.local_size),
            progress=progress,
        )
        return {name: part.to(self.ranks.device) for name, part in zip(networks, rows, strict=True)}


def _top1(truth: Int[Tensor, " images"], ranked: Int[Tensor, "images best"]) -> float:
    return round(Scores(truth, ranked.cpu()).top1, 4)
