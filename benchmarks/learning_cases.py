"""The cases of `bench_learning`: what each row of the paper's Tables 6 to 9 changes in one base configuration.

The base is Pseudo-MAE with two teachers. A case differs from it in what its row is about and in nothing else: model,
images, views, learning rate and number of steps are the same.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastpmae.config import Config
from fastpmae.model.build import shape_of
from fastpmae.model.resolutions import resolutions_of

BASE = Path(__file__).parents[1] / "docs" / "learning" / "small-data.json"
"""The settings that the cases share where nobody says; not the preset, which goes with what the tables show."""


@dataclass(frozen=True)
class LearningCase:
    """One row of a table."""

    name: str
    title: str
    changes: Callable[[Config], dict[str, Any]]
    """The settings that differ from the base's."""
    paper: float | None = None
    """Top-1 on ImageNet-1k that the paper gives the row, fine-tuned, with ViT-S."""
    after: str | None = None
    """The case whose encoder this one starts from: with half of the time, or as many epochs as told."""
    as_long_as: str | None = None
    """The case whose steps take as long, where that is another's."""
    pixels_first: bool = False
    """Half of the time goes to pixels without a teacher, in the same run (`--pixel-epochs`)."""

    def parts(self, base: Config) -> tuple[tuple[float, dict[str, Any]], ...]:
        """What a step of the case is timed by: the sizes of its views, each with its share of the epochs."""
        changes = self.changes(base)
        if "progressive_resolution" not in changes:
            return ((1.0, changes),)
        config = base.using(**changes)
        return tuple(
            ((size.last_epoch - size.first_epoch) / config.optimizer.epochs,
             changes | {"image_size": size.size, "progressive_resolution": ()})
            for size in resolutions_of(config)
        )  # fmt: skip

    def timed(self) -> str:
        """The case whose step is timed for it."""
        return self.as_long_as or self.name


def _weights(class_share: float, patch_share: float, token_share: float = 1.0) -> Callable[[Config], dict[str, Any]]:
    """The base's own weights of the losses, those whose share is 0 left out."""

    def changes(base: Config) -> dict[str, Any]:
        loss = base.loss
        weights = {
            "lambda_m": token_share * loss.lambda_m,
            "lambda_c": class_share * loss.lambda_c,
            "lambda_p": patch_share * loss.lambda_p,
        }
        return weights if class_share or patch_share else weights | {"teachers": "reconstruction"}

    return changes


_FORMED: dict[str, Any] = {"class_epsilon": 0.025, "labelling_momentum": (0.99, 1.0)}
_SDAE: dict[str, Any] = {
    "teachers": "reconstruction",
    "lambda_c": 0.0,
    "lambda_p": 0.0,
}
_LATER: dict[str, tuple[str, dict[str, Any]]] = {
    "sdae": ("the reconstruction teacher alone", _SDAE),
    "dual": ("two teachers", {}),
    "dual-formed": ("two teachers, labels that form", _FORMED),
    "dual-centred": ("the same, the bottleneck centred", _FORMED | {"center_bottleneck": True}),
    "dual-frozen": (
        "two teachers, prototypes as DINO's", {"prototype_init": "uniform", "freeze_prototypes": 1, "epsilon": 0.04},
    ),
    "dual-light": ("two teachers, labels at 0.03", {"lambda_c": 0.03, "lambda_p": 0.03}),
    "no-class": ("two teachers, no class labels", {"lambda_c": 0.0}),
    "no-patch": ("two teachers, no patch labels", {"lambda_p": 0.0}),
}  # fmt: skip
"""What pixels can be followed by: a title, and the settings that differ from the base's."""


def _after_pixels() -> Iterator[LearningCase]:
    """Teachers that begin as MAE's encoder, and so may follow the student sooner: after a run of MAE, and in one run.

    A sharper label takes no longer, nor does one that no loss reads: all but `sdae` are timed as `dual`.
    """
    for name, (title, changes) in _LATER.items():
        soon, timed = {"reconstruction_momentum": (0.7, 0.99)} | changes, "sdae" if name == "sdae" else "dual"
        settings = partial(_same, soon)
        yield LearningCase(f"mae-{name}", f"MAE, then {title}", settings, after="mae", as_long_as=timed)
        yield LearningCase(f"pixels-{name}", f"pixels, then {title}", settings, as_long_as=timed, pixels_first=True)


def _same(changes: dict[str, Any], _: Config) -> dict[str, Any]:
    """Changes that no base's settings enter."""
    return changes


_MAE: dict[str, Any] = {"teachers": "none", "target": "pixels", "lambda_c": 0.0, "lambda_p": 0.0, "drop_path": 0.0}


def _smaller_first(base: Config) -> dict[str, Any]:
    """MAE with half of its epochs on views of three quarters of the side, to whole patches."""
    patch, size = shape_of(base.network).patch_size, base.views.image_size
    smaller = 3 * size // (4 * patch) * patch
    return _MAE | {"progressive_resolution": (f"{smaller}:0.5", str(size))}


CASES: dict[str, LearningCase] = {
    case.name: case
    for case in (
        LearningCase("dual", "Pseudo-MAE: two teachers", lambda _: {}, 74.8),
        LearningCase("mae", "MAE: pixels, no teacher", lambda _: _MAE),
        LearningCase(
            "sdae",
            "SdAE: the reconstruction teacher alone",
            lambda _: _SDAE,
            74.19,
        ),
        LearningCase("single-step", "one teacher, follows each step", lambda _: {"teachers": "single"}, 73.5),
        LearningCase(
            "single-epoch",
            "one teacher, follows each epoch",
            lambda base: {
                "teachers": "single",
                "labelling_cadence": "epoch",
                "labelling_momentum": base.teacher.reconstruction_momentum,
            },
            74.3,
        ),
        LearningCase(
            "momentum-0.96", "labelling momentum from 0.96", lambda _: {"labelling_momentum": (0.96, 1.0)}, 73.6
        ),
        LearningCase("weights-1-0-0", "reconstruction alone (1, 0, 0)", _weights(0, 0), 74.19),
        LearningCase("weights-1-0-1", "no class labels (1, 0, 1)", _weights(0, 1), 73.20),
        LearningCase("weights-1-1-0", "no patch labels (1, 1, 0)", _weights(1, 0), 74.23),
        LearningCase("weights-0-1-1", "no reconstruction (0, 1, 1)", _weights(1, 1, 0), 74.09),
        LearningCase("progressive-resolution", "MAE, smaller views in its first half", _smaller_first),
        LearningCase("dual-formed", "two teachers, labels that form", lambda _: _FORMED, as_long_as="dual"),
        *_after_pixels(),
        LearningCase("one-fold", "one fold for the teachers", lambda _: {"folds": 1}),
        LearningCase("simple-view", "simple view for the labelling teacher", lambda _: {"labelling_view": "simple"}),
    )
}
AFTER_MAE = ("dual-formed", *(name for name, case in CASES.items() if case.after or case.pixels_first))
"""Not in the paper: shown beside Table 6."""
BESIDE_MAE = ("progressive-resolution",)
"""Not in the paper either, but without teachers: shown before the others."""
TABLES: dict[int, tuple[str, ...]] = {
    6: ("mae", "sdae", "single-step", "single-epoch", "dual"),
    7: ("momentum-0.96", "dual"),
    8: ("weights-1-0-0", "weights-1-0-1", "weights-1-1-0", "weights-0-1-1", "dual"),
    9: ("one-fold", "simple-view", "dual"),
}
