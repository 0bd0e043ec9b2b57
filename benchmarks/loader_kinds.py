"""Kinds of JPEGs that data sets consist of, made of photographs: small and large, gray, progressive, by chroma."""

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

QUALITY = 90
LARGE = "2000x1500"
_TILES = 4
"""Photographs across and down in a large image: enlarged ones would have less in them than a camera's."""


def _resized(width: int, height: int) -> Callable[[Sequence[Path], int], Image.Image]:
    def image(files: Sequence[Path], number: int) -> Image.Image:
        with Image.open(files[number % len(files)]) as opened:
            return opened.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)

    return image


def _mosaic(files: Sequence[Path], number: int) -> Image.Image:
    one = _resized(500, 375)
    whole = Image.new("RGB", (_TILES * 500, _TILES * 375))
    for place in range(_TILES**2):
        tile = one(files, number * _TILES**2 + place)
        whole.paste(tile, (place % _TILES * 500, place // _TILES * 375))
    return whole


def _gray(files: Sequence[Path], number: int) -> Image.Image:
    return _resized(500, 375)(files, number).convert("L")


KINDS: dict[str, tuple[Callable[[Sequence[Path], int], Image.Image], dict[str, object]]] = {
    "64x64": (_resized(64, 64), {}),
    "240x180": (_resized(240, 180), {}),
    "500x375": (_resized(500, 375), {}),
    "500x375-4:4:4": (_resized(500, 375), {"subsampling": 0}),
    "500x375-gray": (_gray, {}),
    "500x375-progressive": (_resized(500, 375), {"progressive": True}),
    LARGE: (_mosaic, {}),
}
"""How an image of the kind is made from photographs, and what its JPEG is saved with: 4:2:0 where nothing is said."""


def write_kind(kind: str, photographs: Path, into: Path, count: int) -> None:
    """`count` JPEGs of a kind in a new folder, made of the images in the folder `photographs`."""
    make, options = KINDS[kind]
    files = sorted(photographs.iterdir())
    into.mkdir(parents=True)
    for number in range(count):
        make(files, number).save(into / f"{number:04d}.jpg", "JPEG", quality=QUALITY, **options)
