"""The presets: the paper's own settings, those of other methods, and small ones."""

from typing import Any

from fastpmae.config import Config
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import short


def preset(name: str) -> Config:
    """The settings called `name`. Raises UserError with the names there are."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {short(name)!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _named(name: str, base: Config, **settings: Any) -> Config:
    return base.using(preset=name, **settings)


_PAPER = Config().using(preset="paper", warmup_epochs=60.0)


_ABLATION = _named("ablation", Config(), model="vit_small", epochs=100)


_SDAE = _named("sdae", _PAPER, teachers="reconstruction", lambda_c=0.0, lambda_p=0.0)


# Few small images and few steps: pixels teach from the first step, and teachers begin where that has led.
_SMALL = Config().using(
    model="vit_tiny",
    image_size=64,
    patch_size=8,
    drop_path=0.05,
    decoder_heads=4,
    lambda_c=0.1,
    lambda_p=0.1,
    batch_size=32,
    blr=8e-3,
)


PRESETS: dict[str, Config] = {
    # Appendix A of the paper
    "paper": _PAPER,
    # section 4 of the paper
    "paper-800": _named("paper-800", _PAPER, epochs=800),
    # section 5
    "ablation": _ABLATION,
    # SdAE as the paper describes it, and as its authors released it
    "sdae": _SDAE,
    "sdae-code": _named(
        "sdae-code", _SDAE, cosine_axis="token", teacher_init="random", weight_decay=0.04, decay_tokens=True
    ),
    # MAE's own settings
    "mae": _named(
        "mae",
        Config(),
        teachers="none",
        target="pixels",
        lambda_c=0.0,
        lambda_p=0.0,
        drop_path=0.0,
        epochs=1600,
        batch_size=4096,
        blr=1.5e-4,
        warmup_epochs=40.0,
        decay_tokens=True,
    ),
    # Table 6: two teachers, or one for both targets
    "dual": _named("dual", _ABLATION),
    "single-step": _named("single-step", _ABLATION, teachers="single"),
    "single-epoch": _named(
        "single-epoch",
        _ABLATION,
        teachers="single",
        labelling_cadence="epoch",
        labelling_momentum=(0.96, 0.99),
    ),
    # minutes on a laptop
    "demo": _named(
        "demo",
        _SMALL,
        width=128,
        depth=4,
        heads=4,
        decoder_width=64,
        decoder_depth=1,
        head_hidden=256,
        head_bottleneck=64,
        prototypes=128,
        epochs=50,
        pixel_epochs=0.86,
        log_every=10,
    ),
    # ten thousand small images: a teacher that may follow soon; labels cost more time than they gain (docs/learning.md)
    "small-data": _named(
        "small-data",
        _SMALL,
        depth=6,
        decoder_width=128,
        decoder_depth=2,
        head_hidden=512,
        head_bottleneck=128,
        prototypes=256,
        teachers="reconstruction",
        reconstruction_momentum=(0.7, 0.99),
        lambda_c=0.0,
        lambda_p=0.0,
        epochs=25,
        pixel_epochs=0.6,
        log_every=40,
    ),
}
