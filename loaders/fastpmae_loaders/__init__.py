"""Loaders for masked image modelling: one decode, two views, exact resume.

Names are imported when they are first used: reading a .beton file needs neither torch nor numba, and ffcv comes
with the first loader that uses it. No part of the trainer is ever imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastpmae_loaders.batch import Batch
    from fastpmae_loaders.engines.base import Samples
    from fastpmae_loaders.engines.dali_settings import DaliSettings
    from fastpmae_loaders.errors import BetonError, UserError
    from fastpmae_loaders.folders import ImageFolder, TarShards, open_samples
    from fastpmae_loaders.mixture import Mixture
    from fastpmae_loaders.order import epoch_order
    from fastpmae_loaders.paired import PairedViews
    from fastpmae_loaders.plain import PlainViews
    from fastpmae_loaders.recipes import View, dino_global, dino_local, mae_view, plain_view
    from fastpmae_loaders.sampling import SampleDraws, draw_samples, uniforms
    from fastpmae_loaders.settings import ViewSettings
    from fastpmae_loaders.sources.beton import Beton
    from fastpmae_loaders.sources.beton_set import BetonSet

__all__ = [
    "Batch",
    "Beton",
    "BetonError",
    "BetonSet",
    "DaliSettings",
    "ImageFolder",
    "Mixture",
    "PairedViews",
    "PlainViews",
    "SampleDraws",
    "Samples",
    "TarShards",
    "UserError",
    "View",
    "ViewSettings",
    "dino_global",
    "dino_local",
    "draw_samples",
    "epoch_order",
    "mae_view",
    "open_samples",
    "plain_view",
    "uniforms",
]

_HOMES = {
    "Batch": "batch",
    "Beton": "sources.beton",
    "BetonError": "errors",
    "BetonSet": "sources.beton_set",
    "DaliSettings": "engines.dali_settings",
    "ImageFolder": "folders",
    "Mixture": "mixture",
    "PairedViews": "paired",
    "PlainViews": "plain",
    "SampleDraws": "sampling",
    "Samples": "engines.base",
    "TarShards": "folders",
    "UserError": "errors",
    "View": "recipes",
    "ViewSettings": "settings",
    "dino_global": "recipes",
    "dino_local": "recipes",
    "draw_samples": "sampling",
    "epoch_order": "order",
    "mae_view": "recipes",
    "open_samples": "folders",
    "plain_view": "recipes",
    "uniforms": "sampling",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = import_module(f".{_HOMES[name]}", __name__)
    except AttributeError as error:  # which `from ... import` would take for a name that is not there
        raise ImportError(f"{__name__}.{name} cannot be imported: {error}") from error
    return getattr(home, name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fastpmae-loaders")
    except PackageNotFoundError:  # a checkout that is on the path and not installed
        return "0+unknown"
