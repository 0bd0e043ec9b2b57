"""The pair of views and the masks of Pseudo-MAE as one frozen dataclass."""

from dataclasses import dataclass, replace
from typing import Literal

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.recipes import View
from fastpmae_loaders.values import Typed


@dataclass(frozen=True)
class ViewSettings(Typed):
    """Views and masks of one sample; the defaults are MAE's and DINO's own.

    Attributes:
        image_size: side of both views, pixels.
        patch_size: side of a patch, pixels; divides image_size.
        mask_ratio: share of the patches that is hidden from the student.
        folds: K, the number of parts the hidden patches are cut into.
        simple_scale, complex_scale: smallest and largest share of the image's area in a crop.
        ratio: smallest and largest aspect ratio (width / height) of a crop.
        complex_recipe: "t1" (always blur, never solarise), "t2" (seldom blur, sometimes solarise), or "coin".
        flip: probability of a left-right flip, drawn for each view apart.
        jitter: largest change of brightness, contrast, saturation and hue.
        sigma: smallest and largest width of the blur, pixels.
        t1_blur ... t2_solarise: probabilities of blur and solarise in the two recipes.

    Raises:
        UserError: for numbers that make no views.
    """

    OF = "views: "
    image_size: int = 224
    patch_size: int = 16
    mask_ratio: float = 0.75
    folds: int = 3
    simple_scale: tuple[float, float] = (0.2, 1.0)
    complex_scale: tuple[float, float] = (0.14, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    complex_recipe: Literal["coin", "t1", "t2"] = "coin"
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: float = 0.8
    grayscale_probability: float = 0.2
    sigma: tuple[float, float] = (0.1, 2.0)
    t1_blur: float = 1.0
    t1_solarise: float = 0.0
    t2_blur: float = 0.1
    t2_solarise: float = 0.2
    solarise_threshold: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()

        def refuse(name: str, must: str) -> None:
            raise UserError(f"views: {name} = {getattr(self, name)!r} must be {must}")

        if not 1 <= self.patch_size <= self.image_size <= 4096 or self.image_size % self.patch_size:
            raise UserError(
                f"views: image_size {self.image_size} must be a multiple of patch_size {self.patch_size}, at most 4096"
            )
        if not 0 < self.mask_ratio < 1:
            refuse("mask_ratio", "above 0 and below 1")
        if not 1 <= self.folds < self.patches:
            refuse("folds", f"at least 1 and below the number of patches, {self.patches}")
        if self.folds > self.patches - self.visible:
            refuse(
                "folds", f"at most the {self.patches - self.visible} patches that mask_ratio {self.mask_ratio} hides"
            )
        for name in ("simple_scale", "complex_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                refuse(name, "two shares of the image's area, 0 < low <= high <= 1")
        for name in ("t1_blur", "t1_solarise", "t2_blur", "t2_solarise"):
            if not 0 <= getattr(self, name) <= 1:
                refuse(name, "a probability between 0 and 1")
        _ = self.views  # which check the rest

    def of_size(self, size: int) -> "ViewSettings":
        """The same for masks of views that are given, whose first has this side.

        Raises:
            UserError: where another side was asked for here.
        """
        fitting = self if self.image_size == size else replace(self, image_size=size)
        if self.image_size not in (size, ViewSettings.image_size):
            raise UserError(f"views: image_size {self.image_size} is not the first view's {size}: leave it out")
        return fitting

    @property
    def patches(self) -> int:
        """N, the patches of a view."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def visible(self) -> int:
        """V, the patches that the student sees: at least one."""
        return max(int(self.patches * (1 - self.mask_ratio) + 1e-6), 1)

    @property
    def fold_sizes(self) -> tuple[int, ...]:
        """Hidden patches of each fold: equal within one, the larger first."""
        masked = self.patches - self.visible
        return tuple(masked // self.folds + (fold < masked % self.folds) for fold in range(self.folds))

    @property
    def simple(self) -> View:
        """The MAE-style view."""
        return View(self.image_size, self.simple_scale, self.ratio, self.flip)

    @property
    def complex(self) -> View:
        """The DINO-style view."""
        return View(
            self.image_size,
            self.complex_scale,
            self.ratio,
            self.flip,
            jitter=self.jitter,
            jitter_probability=self.jitter_probability,
            grayscale_probability=self.grayscale_probability,
            sigma=self.sigma,
            blur=(self.t1_blur, self.t2_blur),
            solarise=(self.t1_solarise, self.t2_solarise),
            first_share={"coin": 0.5, "t1": 1.0, "t2": 0.0}[self.complex_recipe],
            solarise_threshold=self.solarise_threshold,
        )

    @property
    def views(self) -> tuple[View, View]:
        """Both."""
        return self.simple, self.complex
