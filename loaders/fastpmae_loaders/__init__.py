"""Loaders for masked image modelling: one decode, two views, exact resume.

Importing this imports neither ffcv nor any part of the trainer; ffcv comes with the first loader that uses it.
"""

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
