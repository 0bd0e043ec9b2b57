"""`fastpmae-eval patches`: what frozen features of patches know of a scene, beside what can be known without them."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastpmae.distributed.ranks import Ranks
from fastpmae.evaluate.backbone import find_backbone
from fastpmae.evaluate.datasets import needed
from fastpmae.evaluate.dense.arguments import Patches
from fastpmae.evaluate.dense.context import Grid, Memory, chosen_patches, classes_at_mask_size, patch_labels
from fastpmae.evaluate.dense.labelled import Masked, Segmentation
from fastpmae.evaluate.dense.mask_pictures import Overlay, best_median_worst, write_overlays
from fastpmae.evaluate.dense.overlap import MaskScores, confusion_of, write_mask_scores
from fastpmae.evaluate.dense.patch_features import Kept, PatchNetwork, patch_network, scaled
from fastpmae.evaluate.dense.patch_linear import LinearSettings, train_patch_linear
from fastpmae.evaluate.dense.sets import open_segmentation
from fastpmae.evaluate.dense.yardsticks import PositionPrior, colour_features
from fastpmae.evaluate.result_files import ResultFolder, free_files, named_folder, place_of, stem_of
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.cli.terminal import tell
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable

Predict = Callable[[Masked, int], Int[Tensor, "height width"]]
"""The classes of an image's pixels; it is told the image's place in the validation set too."""
COLOUR_TEMPERATURE = 0.1
"""Of features that are each divided by their spread."""


@dataclass(frozen=True)
class Probing:
    """What every row of the table needs."""

    command: Patches
    train: Segmentation
    val: Segmentation
    device: torch.device
    progress: Progress

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.train.names)

    def scores(self, words: str, predict: Predict) -> MaskScores:
        """Predictions for every validation image against the truth."""
        confusion = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        by_image = []
        self.progress.phase(words)
        with self.progress.count(len(self.val), "images"):
            for place, entry in enumerate(self.val.entries):
                _, mask = entry.read()
                one = confusion_of(torch.from_numpy(mask), predict(entry, place).cpu(), self.classes)
                by_image.append(MaskScores(one, 1).iou.nanmean().item())
                confusion += one
                self.progress.advance()
        return MaskScores(confusion, len(self.val), torch.tensor(by_image, dtype=torch.float64))


def run_patches(command: Patches, ranks: Ranks) -> None:
    """`fastpmae-eval patches`.

    Raises:
        UserError: for what does not fit.
    """
    began, common = time.monotonic(), command.common
    _check(command)
    progress = Progress(live=ranks.is_main)
    train, val = open_segmentation(common.train, common.val, common.classes, command.ignore, common.workers)
    val = needed(val, train)
    for note in dict.fromkeys((*train.notes, *val.notes)):
        progress.tell(note)
    backbone = find_backbone(common.weights, common.network, heads=common.heads)
    named = named_folder(common.out)
    results = ResultFolder(named or place_of(common.weights), named=named is not None)
    folder = results.path
    probing = Probing(command, train, val, ranks.device, progress)
    network = patch_network(backbone, ranks.device)
    table: list[dict[str, object]] = []
    tell(f"{'features':<34} {'k-NN in context':>15}   {'linear':>6}   mIoU in percent")

    def row(name: str, knn: MaskScores, linear: MaskScores | None = None) -> None:
        figures = {"features": name, "knn": knn.figures(), "linear": None if linear is None else linear.figures()}
        table.append(figures)
        tell(f"{name:<34} {knn.figures()['miou']:>15.2f}   {linear.figures()['miou']:>6.2f}" if linear else
             f"{name:<34} {knn.figures()['miou']:>15.2f}")  # fmt: skip

    knn, linear, predict = probe(probing, network, "")
    row(backbone.network or "the weights", knn, linear)
    if command.yardsticks:
        row("random weights", *probe(probing, network.restarted(command.seed), "random weights: ")[:2])
        for name, scores in without_network(probing, network):
            row(name, scores)
    record = {
        "evaluation": "patches",
        "weights": common.weights,
        "source": backbone.source,
        "network": backbone.network,
        "train": train.describe(),
        "val": val.describe(),
        "settings": {name: value for name, value in asdict(command).items() if name != "common"},
        "patch": network.patch,
        "table": table,
        "shown": {"features": table[0]["features"], "probe": "knn", "k": command.k},
        "seconds": round(time.monotonic() - began, 1),
    }
    files = free_files(folder, stem_of("patches", backbone.network), record)
    write_mask_scores(files, knn, train.names, record, partial(draw_overlays, probing, knn, predict))
    results.publish()
    tell(
        f"wrote {results.called(files.figures)}, and beside it the classes (.csv), the confusion matrix and some "
        "images (.png)"
    )


def _check(command: Patches) -> None:
    if not 1 <= command.k <= 100_000:
        raise UserError(f"--k {command.k}: name how many neighbours, 1 to 100,000")
    if not command.temperature > 0:
        raise UserError(f"--temperature {command.temperature} must be above 0")
    if command.memory < command.k:
        raise UserError(f"--memory {command.memory} holds fewer patches than --k {command.k}")
    if command.short_side < 0 or not command.keep_gb >= 0:
        raise UserError(f"--short-side {command.short_side} and --keep-gb {command.keep_gb} must not be below 0")
    _linear_settings(command)


def _linear_settings(command: Patches) -> LinearSettings:
    return LinearSettings(command.steps, command.step_images, command.lr, command.weight_decay, command.seed)


def probe(
    probing: Probing, network: PatchNetwork, words: str
) -> tuple[MaskScores, MaskScores | None, Predict]:  # fmt: skip
    """What a network's patches reach by their neighbours and by a linear layer, and the neighbours' predictions."""
    command = probing.command
    room = int(command.keep_gb * 2**30)
    of_train, of_val = (
        Kept(partial(_features, part.entries, network, command.short_side), size)
        for part, size in ((probing.train, room * 3 // 4), (probing.val, room // 4))
    )
    probing.progress.phase(f"{words}features of {printable(str(probing.train.path))}")
    memory = fill_memory(probing, network, lambda place: of_train(place).flatten(0, 1))
    memory = Memory(F.normalize(memory.features, dim=1), memory.labels)

    def predict(entry: Masked, place: int) -> Int[Tensor, "height width"]:
        image, _ = entry.read()
        grid = network.grid(image.shape[0], image.shape[1], command.short_side)
        queries = F.normalize(of_val(place).flatten(0, 1).to(probing.device), dim=1)
        votes = memory.vote(queries, command.k, command.temperature)
        return classes_at_mask_size(votes.view(grid.rows, grid.columns, -1), grid)

    knn = probing.scores(f"{words}nearest neighbours", predict)
    if not command.linear:
        return knn, None, predict
    probing.progress.phase(f"{words}linear layer")

    def labels(place: int) -> tuple[Int[np.ndarray, "height width"], Grid]:
        _, mask = probing.train.entries[place].read()
        return mask, network.grid(mask.shape[0], mask.shape[1], command.short_side)

    layer = train_patch_linear(
        of_train,
        labels,
        len(probing.train),
        probing.classes,
        _linear_settings(command),
        probing.device,
        probing.progress,
    )

    @torch.inference_mode()
    def predict_linear(entry: Masked, place: int) -> Int[Tensor, "height width"]:
        found = of_val(place).to(probing.device)
        image, _ = entry.read()
        grid = network.grid(image.shape[0], image.shape[1], command.short_side)
        return classes_at_mask_size(layer(found.flatten(0, 1)).view(*found.shape[:2], -1), grid)

    return knn, probing.scores(f"{words}linear layer", predict_linear), predict


def _features(
    entries: tuple[Masked, ...], network: PatchNetwork, short_side: int, place: int
) -> Float[Tensor, "rows columns dim"]:
    image, _ = entries[place].read()
    return network.features(image, network.grid(image.shape[0], image.shape[1], short_side)).cpu()


def fill_memory(
    probing: Probing, network: PatchNetwork, features: Callable[[int], Float[Tensor, "patches dim"]]
) -> Memory:
    """The patches of the training images that hold a pixel that counts, up to --memory of them, on the device.

    Raises:
        UserError: where there are none.
    """
    command, entries = probing.command, probing.train.entries
    most = max(1, command.memory // len(entries))
    rows, labels = [], []
    with probing.progress.count(len(entries), "images"):
        for place, entry in enumerate(entries):
            _, mask = entry.read()
            grid = network.grid(mask.shape[0], mask.shape[1], command.short_side)
            found = patch_labels(mask, grid, probing.classes).flatten(0, 1)
            counted = found.sum(dim=1).nonzero().flatten()
            counted = counted[torch.from_numpy(chosen_patches(len(counted), most, command.seed, place))]
            rows.append(features(place)[counted])
            labels.append(found[counted].half())
            probing.progress.advance()
    memory = Memory(torch.cat(rows).to(probing.device), torch.cat(labels).to(probing.device))
    if not len(memory.features):
        raise UserError(f"{printable(str(probing.train.path))}: no pixel of its masks counts")
    return memory


def without_network(probing: Probing, network: PatchNetwork) -> list[tuple[str, MaskScores]]:
    """What can be known without a network, by name; `network` says how images are cut into patches."""
    return [
        ("colour, contrast and place", colour_neighbours(probing, network)),
        ("place alone", place_prior(probing)),
    ]


def colour_neighbours(probing: Probing, network: PatchNetwork) -> MaskScores:
    """The same vote among patches of the same size that are told apart by colour, contrast and place alone."""
    command = probing.command
    probing.progress.phase("colours")

    def features(entry: Masked) -> tuple[Float[Tensor, "patches dim"], Grid]:
        image, _ = entry.read()
        grid = network.grid(image.shape[0], image.shape[1], command.short_side)
        return colour_features(scaled(image, grid), grid).flatten(0, 1), grid

    plain = fill_memory(probing, network, lambda place: features(probing.train.entries[place])[0])
    mean, spread = plain.features.mean(dim=0), plain.features.std(dim=0) + 1e-6
    rows = (plain.features - mean) / spread
    memory = Memory(rows, plain.labels, -rows.square().sum(dim=1) / 2)

    def predict(entry: Masked, place: int) -> Int[Tensor, "height width"]:
        found, grid = features(entry)
        votes = memory.vote((found.to(probing.device) - mean) / spread, command.k, COLOUR_TEMPERATURE)
        return classes_at_mask_size(votes.view(grid.rows, grid.columns, -1), grid)

    return probing.scores("nearest neighbours by colour, contrast and place", predict)


def place_prior(probing: Probing) -> MaskScores:
    """The class that stands most often at each place of the training images."""
    prior = PositionPrior(probing.classes)
    for entry in probing.train.entries:
        prior.add(entry.read()[1])

    def predict(entry: Masked, place: int) -> Int[Tensor, "height width"]:
        _, mask = entry.read()
        return prior.scores(mask.shape[0], mask.shape[1]).argmax(dim=0)

    return probing.scores("how often each class stands where", predict)


def draw_overlays(probing: Probing, scores: MaskScores, predict: Predict, path: Path) -> None:
    """A picture of the best, a median and the worst image, predicted once more."""
    assert scores.by_image is not None
    shown = []
    for word, place in best_median_worst(scores.by_image.numpy()).items():
        entry = probing.val.entries[place]
        image, mask = entry.read()
        predicted = predict(entry, place).cpu().numpy().astype(np.int16)
        title = f"{word}: {scores.by_image[place]:.1f} %, {entry.name.rsplit('/', 1)[-1]}"
        shown.append(Overlay(title, image, predicted, mask))
    title = f"{scores.figures()['miou']:.1f} % mIoU of {scores.images:,} images"
    write_overlays(path, shown, probing.train.names, title)
