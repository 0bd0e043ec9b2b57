"""The view that timm's `train.py` asks for on its command line."""

from collections.abc import Mapping
from typing import Any

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.recipes import View, plain_view
from fastpmae_loaders.values import checked, typed

# what there is nothing for here, and the values under which timm does nothing of it either
_NOT_HERE: dict[str, tuple[Any, ...]] = {
    "aa": (None, ""),
    "aug_repeats": (0,),
    "aug_splits": (0,),
    "class_map": (None, ""),
    "epoch_repeats": (0,),
    "input_img_mode": (None, "RGB"),
    "naflex_loader": (False,),
    "no_prefetcher": (False,),
    "train_batches_per_epoch": (None,),
    "train_crop_mode": (None, "rrc"),
    "train_img_sizes": (None,),
    "train_num_samples": (None,),
    "val_num_samples": (None,),
    "vflip": (0,),
}

_NEEDED = ("no_aug", "scale", "ratio", "hflip", "color_jitter", "train_interpolation")


@checked
def timm_view(args: Any, data_config: Mapping[str, Any]) -> View:
    """The training view of timm's flags, all of which it follows or refuses.

    Followed are `--scale`, `--ratio`, `--hflip`, `--color-jitter` (one number, without hue), `--color-jitter-prob`,
    `--grayscale-prob`, `--gaussian-blur-prob`, `--no-aug` and `--train-interpolation`, whose default `random`, a filter
    drawn for each image, is bicubic here. A flag that an older timm lacks has its default.

    Args:
        args: what timm's command line gives.
        data_config: what its `resolve_data_config` gives, of which `input_size` and `interpolation` are read.

    Raises:
        UserError: for a flag that there is nothing for here, named as on the command line, and for what is neither.

    Contract: huggingface/pytorch-image-models train.py, timm/data/transforms_factory.py.
    """
    for name, unused in _NOT_HERE.items():
        if (value := getattr(args, name, unused[0])) not in unused:
            raise UserError(f"timm's --{name.replace('_', '-')} {value} is not there with this loader; leave it out")
    for name in _NEEDED:
        if not hasattr(args, name):
            raise UserError(f"args has no {name}: give what timm's own command line makes, with all its flags")
    if not {"input_size", "interpolation"} <= data_config.keys():
        raise UserError("data_config has no input_size or no interpolation: give what timm's resolve_data_config makes")
    channels, height, width = typed(data_config["input_size"], tuple[int, int, int], "data_config: input_size")
    if channels != 3 or height != width:
        raise UserError(f"input size {channels} x {height} x {width}: images are square and of 3 channels here")
    if args.no_aug:
        return plain_view(height, 1.0, interpolation=_filter("interpolation", data_config["interpolation"]))
    low, high = typed(args.scale or (0.08, 1.0), tuple[float, float], "timm's --scale")
    narrow, wide = typed(args.ratio or (3 / 4, 4 / 3), tuple[float, float], "timm's --ratio")
    asked = args.train_interpolation or data_config["interpolation"]
    jitter = args.color_jitter or 0.0
    often = getattr(args, "color_jitter_prob", None)
    blur = getattr(args, "gaussian_blur_prob", None) or 0.0
    return View(
        height,
        (low, high),
        (narrow, wide),
        args.hflip,
        jitter=(jitter, jitter, jitter, 0.0),
        jitter_probability=(1.0 if often is None else often) if jitter else 0.0,
        grayscale_probability=getattr(args, "grayscale_prob", None) or 0.0,
        blur=(blur, blur),
        interpolation="bicubic" if asked == "random" else _filter("train-interpolation", asked),
    )


def _filter(flag: str, asked: str) -> Any:
    if asked not in ("bicubic", "bilinear"):
        raise UserError(f"timm's --{flag} {asked} is not there with this loader: it has bicubic and bilinear")
    return asked
