"""Loaders for masked image modelling: one decode, two views, exact resume.

Names are imported when they are first used: reading a .beton file needs neither torch nor numba, and ffcv comes
with the first loader that uses it. No part of the trainer is ever imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Batch
    from .beton import Beton
    from .dali_settings import DaliSettings
    from .engine import Samples
    from .errors import BetonError, UserError
    from .folders import ImageFolder, TarShards, open_samples
    from .paired import PairedViews
    from .plain import PlainViews
    from .plan import Plans, draw_plans, epoch_order, uniforms
    from .recipes import View, dino_global, dino_local, mae_view, plain_view
    from .settings import ViewSettings

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Beton",
    "BetonError",
    "DaliSettings",
    "ImageFolder",
    "PairedViews",
    "PlainViews",
    "Plans",
    "Samples",
    "TarShards",
    "UserError",
    "View",
    "ViewSettings",
    "dino_global",
    "dino_local",
    "draw_plans",
    "epoch_order",
    "mae_view",
    "open_samples",
    "plain_view",
    "uniforms",
]

_HOMES = {
    "Batch": "batch",
    "Beton": "beton",
    "BetonError": "errors",
    "DaliSettings": "dali_settings",
    "ImageFolder": "folders",
    "PairedViews": "paired",
    "PlainViews": "plain",
    "Plans": "plan",
    "Samples": "engine",
    "TarShards": "folders",
    "UserError": "errors",
    "View": "recipes",
    "ViewSettings": "settings",
    "dino_global": "recipes",
    "dino_local": "recipes",
    "draw_plans": "plan",
    "epoch_order": "plan",
    "mae_view": "recipes",
    "open_samples": "folders",
    "plain_view": "recipes",
    "uniforms": "plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = import_module(f".{_HOMES[name]}", __name__)
    except AttributeError as error:  # which `from ... import` would take for a name that is not there
        raise ImportError(f"{__name__}.{name} cannot be imported: {error}") from error
    return getattr(home, name)
