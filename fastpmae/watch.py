"""Evaluation during training: k-NN on labelled images, by the student and every teacher as they are."""

import torch
from jaxtyping import Float
from torch import Tensor

from fastpmae.config import Config
from fastpmae.embed import features
from fastpmae.errors import UserError
from fastpmae.knn import knn_ranked
from fastpmae.labelled import Labelled, engine_for, open_labelled
from fastpmae.model import Encoder, Student
from fastpmae.scores import Scores
from fastpmae.teachers import Teachers
from fastpmae.world import World
from fastpmae_loaders import PlainViews

NEIGHBOURS = 20
BATCH = 64


class Watch:
    """What `--eval-every` asks for. Nothing of the run itself changes by it: no random number is drawn.

    Every rank computes all of it, as fast as one would, so that none has to wait for another.

    Raises:
        UserError: for images that cannot be opened, have no labels, or are fewer than the neighbours.
    """

    def __init__(self, config: Config, world: World):
        run = config.run
        self.config, self.world, self.every = config, world, run.eval_every
        self.train: Labelled | None = None
        if self.every == 0:
            return
        train = run.eval_train or config.data.beton
        assert train is not None
        self.train, self.val = open_labelled(train, run.eval_val)
        if len(self.train.labels) <= NEIGHBOURS:
            raise UserError(
                f"--eval-every asks {NEIGHBOURS} neighbours, and {train} holds {len(self.train.labels)} images"
            )

    def is_due(self, epochs_done: int) -> bool:
        """Whether it is time after so many epochs; also after the last one."""
        return self.every > 0 and (epochs_done % self.every == 0 or epochs_done == self.config.optimiser.epochs)

    def figures(self, student: Student, teachers: Teachers) -> dict[str, float]:
        """Top-1 of each network's class token by 20-NN (cosine, temperature 0.07), in percent.

        On `--eval-val`, or, without it, on the training images, each left out once.
        """
        assert self.train is not None
        networks: dict[str, Encoder] = {"student": student.encoder}
        networks |= {name: teacher.encoder for name, teacher in teachers.modules().items()}
        labels = self.train.labels.to(self.world.device)
        learnt = self._features(networks, self.train)
        tested = learnt if self.val is None else self._features(networks, self.val)
        found = {}
        for name in networks:
            ranked = knn_ranked(
                learnt[name], labels, tested[name], [NEIGHBOURS], best=1, leave_one_out=self.val is None
            )  # fmt: skip
            truth = (self.val or self.train).labels
            found[f"knn_{name}"] = round(Scores(truth, ranked[NEIGHBOURS].cpu()).top1, 4)
        return found

    @torch.no_grad()
    def _features(self, networks: dict[str, Encoder], images: Labelled) -> dict[str, Float[Tensor, "images dim"]]:
        device = self.world.device
        rows: dict[str, list[Tensor]] = {name: [] for name in networks}
        views = PlainViews(
            images.samples,
            BATCH,
            image_size=self.config.views.image_size,
            engine=engine_for(images.samples, "auto"),
            workers=self.config.efficiency.workers or 2,
        )
        low = torch.autocast(device.type, torch.bfloat16, enabled=self.config.efficiency.precision == "bf16")
        with views, low:
            for pictures, _, _ in views:
                pictures = pictures.to(device)
                for name, encoder in networks.items():
                    rows[name].append(features(encoder, pictures).float())
        return {name: torch.cat(parts) for name, parts in rows.items()}
