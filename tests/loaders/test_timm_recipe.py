"""timm's flags as a view, against the transforms that timm itself makes of them."""

from types import SimpleNamespace as Names
from typing import Any

import pytest
from timm.data.transforms_factory import transforms_imagenet_train
from torchvision import transforms

from fastpmae_loaders import UserError, View, plain_view
from fastpmae_loaders.timm_recipe import timm_view

CONFIG = {"input_size": (3, 192, 192), "interpolation": "bicubic"}


def flags(**changes: Any) -> Names:
    """Those of timm's command line by their defaults."""
    defaults = {
        "aa": None, "aug_repeats": 0, "aug_splits": 0, "class_map": "", "epoch_repeats": 0.0, "input_img_mode": None,
        "naflex_loader": False, "no_prefetcher": False, "train_batches_per_epoch": None, "train_crop_mode": None,
        "train_img_sizes": None, "train_num_samples": None, "val_num_samples": None, "vflip": 0.0, "no_aug": False,
        "train_interpolation": "random", "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "hflip": 0.5,
        "color_jitter": 0.4, "color_jitter_prob": None, "grayscale_prob": None, "gaussian_blur_prob": None,
    }  # fmt: skip
    return Names(**defaults | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"color_jitter": None},
        {"color_jitter_prob": 0.8, "grayscale_prob": 0.2, "gaussian_blur_prob": 0.3},
        {"scale": [0.5, 0.9], "ratio": [1.0, 1.0], "hflip": 0.0, "train_interpolation": "bilinear"},
    ],
)
def test_a_view_does_what_timms_transforms_do(changes):
    args = flags(**changes)
    view = timm_view(args, CONFIG)
    theirs: Any = transforms_imagenet_train(
        192, args.scale, args.ratio, hflip=args.hflip, color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob, grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob, interpolation=args.train_interpolation,
    )  # fmt: skip
    flip = jitter = gray = blur = 0.0
    strength = (0.0, 0.0, 0.0, 0.0)
    step: Any
    for step in theirs.transforms:
        often = 1.0
        if isinstance(step, transforms.RandomApply):
            often, step = step.p, step.transforms[0]
        if isinstance(step, transforms.RandomHorizontalFlip):
            flip = step.p
        elif isinstance(step, transforms.RandomGrayscale):
            gray = step.p
        elif isinstance(step, transforms.GaussianBlur):
            blur = often
            assert view.sigma == tuple(step.sigma)
        elif isinstance(step, transforms.ColorJitter):
            jitter = often
            limits: Any = (step.brightness, step.contrast, step.saturation)
            strength = (*(limit[1] - 1 for limit in limits), 0.0)
            assert step.hue is None
        elif hasattr(step, "scale"):
            assert (view.scale, view.ratio) == (tuple(step.scale), tuple(step.ratio))
    assert (view.size, view.flip, view.jitter_probability) == (192, flip, jitter)
    assert (view.grayscale_probability, view.blur, view.solarise) == (gray, (blur, blur), (0.0, 0.0))
    assert view.jitter == pytest.approx(strength)
    assert view.interpolation == ("bilinear" if args.train_interpolation == "bilinear" else "bicubic")


def test_no_aug_is_the_centre():
    assert timm_view(flags(no_aug=True, vflip=0), CONFIG) == plain_view(192, 1.0)


def test_a_flag_that_an_older_timm_lacks_has_its_default():
    args = flags()
    for name in ("color_jitter_prob", "grayscale_prob", "gaussian_blur_prob", "naflex_loader", "train_img_sizes"):
        delattr(args, name)
    assert timm_view(args, CONFIG) == timm_view(flags(), CONFIG)
    assert isinstance(timm_view(args, CONFIG), View)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("vflip", 0.5, "--vflip 0.5"),
        ("aa", "rand-m9-mstd0.5", "--aa rand-m9-mstd0.5"),
        ("train_crop_mode", "rkrc", "--train-crop-mode rkrc"),
        ("aug_repeats", 3, "--aug-repeats 3"),
        ("train_img_sizes", [128, 160], r"--train-img-sizes \[128, 160\]"),
        ("train_interpolation", "lanczos", "--train-interpolation lanczos"),
    ],
)
def test_a_flag_that_there_is_nothing_for_is_refused_by_its_name(name, value, said):
    with pytest.raises(UserError, match=said):
        timm_view(flags(**{name: value}), CONFIG)


@pytest.mark.parametrize(
    ("args", "config", "said"),
    [
        (None, {}, "args has no no_aug: give what timm's own command line makes"),
        (flags(), [192], r"data_config is \[192\]; expected Mapping"),
        (flags(), {}, "data_config has no input_size or no interpolation"),
        (flags(), {"input_size": 192, "interpolation": "bicubic"}, "data_config: input_size is 192; expected 3 values"),
        (flags(scale=0.2), CONFIG, "timm's --scale is 0.2; expected 2 values, each a number"),
        (flags(ratio="1"), CONFIG, "timm's --ratio is '1'; expected 2 values, each a number"),
    ],
)
def test_what_timm_does_not_make_is_a_sentence(args, config, said):
    with pytest.raises(UserError, match=f"^{said}"):
        timm_view(args, config)


def test_images_that_are_not_square_or_not_in_colour_are_refused():
    with pytest.raises(UserError, match="input size 1 x 192 x 192"):
        timm_view(flags(), CONFIG | {"input_size": (1, 192, 192)})
