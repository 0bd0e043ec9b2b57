"""Loaders for masked image modelling: one decode, two views, exact resume.

Names are imported when they are first used: reading a .beton file needs neither torch nor numba, and ffcv comes
with the first loader that uses it. No part of the trainer is ever imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Batch
    from .beton import Beton
    from .errors import BetonError, UserError
    from .paired import PairedViews
    from .plain import PlainViews
    from .plan import Plans, draw_plans, epoch_order, uniforms
    from .settings import ViewSettings

__all__ = [
    "Batch",
    "Beton",
    "BetonError",
    "PairedViews",
    "PlainViews",
    "Plans",
    "UserError",
    "ViewSettings",
    "draw_plans",
    "epoch_order",
    "uniforms",
]

_HOMES = {
    "Batch": "batch",
    "Beton": "beton",
    "BetonError": "errors",
    "PairedViews": "paired",
    "PlainViews": "plain",
    "Plans": "plan",
    "UserError": "errors",
    "ViewSettings": "settings",
    "draw_plans": "plan",
    "epoch_order": "plan",
    "uniforms": "plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
