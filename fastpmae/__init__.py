"""Pseudo-MAE pretraining of vision transformers: one decode, two views, two teachers.

    from fastpmae import PRESETS, pretrain
    folder = pretrain(PRESETS["demo"].using(beton=Path("images.beton"), out=Path("runs/first")))

Names are imported when they are first used, so that the commands that need no torch start without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastpmae_loaders.cli.process import begin

if TYPE_CHECKING:
    from fastpmae.config import Config
    from fastpmae.config_file import read_config
    from fastpmae.evaluate.dense.loading import load_detector, load_segmenter
    from fastpmae.evaluate.features import embed_images, load_encoder
    from fastpmae.evaluate.knn import knn_accuracy
    from fastpmae.export.export import export_encoder
    from fastpmae.presets import PRESETS, preset
    from fastpmae.train import pretrain
    from fastpmae_loaders.errors import RunError, UserError
    from fastpmae_loaders.write.finish import finish_set
    from fastpmae_loaders.write.sets import write_set
    from fastpmae_loaders.write.write import write_beton

__version__ = "0.1.0"

_HOMES = {
    "PRESETS": "fastpmae.presets",
    "Config": "fastpmae.config",
    "preset": "fastpmae.presets",
    "read_config": "fastpmae.config_file",
    "embed_images": "fastpmae.evaluate.features",
    "load_encoder": "fastpmae.evaluate.features",
    "load_detector": "fastpmae.evaluate.dense.loading",
    "load_segmenter": "fastpmae.evaluate.dense.loading",
    "RunError": "fastpmae_loaders.errors",
    "UserError": "fastpmae_loaders.errors",
    "export_encoder": "fastpmae.export.export",
    "finish_set": "fastpmae_loaders.write.finish",
    "knn_accuracy": "fastpmae.evaluate.knn",
    "pretrain": "fastpmae.train",
    "write_beton": "fastpmae_loaders.write.write",
    "write_set": "fastpmae_loaders.write.sets",
}

__all__ = [  # noqa: RUF022
    "PRESETS",
    "Config",
    "RunError",
    "UserError",
    "embed_images",
    "export_encoder",
    "finish_set",
    "knn_accuracy",
    "load_encoder",
    "load_detector",
    "load_segmenter",
    "preset",
    "read_config",
    "pretrain",
    "write_beton",
    "write_set",
]


begin()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastpmae' has no attribute {name!r}")
    try:
        home = import_module(_HOMES[name])
    except AttributeError as error:  # which `from ... import` would take for a name that is not there
        raise ImportError(f"fastpmae.{name} cannot be imported: {error}") from error
    return getattr(home, name)
