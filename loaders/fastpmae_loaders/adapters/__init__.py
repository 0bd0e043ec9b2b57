"""The loader as other codebases expect one: MAE and SdAE, DINO, iBOT, timm's `train.py`, lightly, LightlyTrain,
DINOv2, DINOv3, CAPI; `lightning` and `dataset` are for code that wants a data module or a data set.

Each class is a thin view of a `PairedViews`: it normalises the bytes (on the device, where the loader was given one),
puts them in the codebase's order and types, and draws that codebase's masks. Ranks, seed, engine, threads and device
are the loader's, and so is the position that `state_dict` and `load_state_dict` speak of.

As with a `DataLoader` every pass begins anew and shows new views, also where `set_epoch` is never called (MAE and timm
call it in distributed runs alone, lightly never) and where the pass before was broken off. Only the pass after
`load_state_dict` goes on in the middle of an epoch, as with torchdata's StatefulDataLoader.
"""

from fastpmae_loaders.adapters.base import IMAGENET_MEAN, IMAGENET_STD, Adapter, EpochAdapter
from fastpmae_loaders.adapters.codebases import (
    DINOLoader,
    IBOTLoader,
    LightlyLoader,
    LightlyTrainLoader,
    MAELoader,
    TimmLoader,
)
from fastpmae_loaders.adapters.dataset import AdapterDataset
from fastpmae_loaders.adapters.iterations import CAPILoader, DINOv2Loader, DINOv3Loader, IterationAdapter
from fastpmae_loaders.adapters.lightning import lightning_data_module

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Adapter",
    "AdapterDataset",
    "CAPILoader",
    "DINOLoader",
    "DINOv2Loader",
    "DINOv3Loader",
    "EpochAdapter",
    "IBOTLoader",
    "IterationAdapter",
    "LightlyLoader",
    "LightlyTrainLoader",
    "MAELoader",
    "TimmLoader",
    "lightning_data_module",
]
