"""Images made for tests, and where things lie."""

import struct
import tomllib
from pathlib import Path

import numpy as np
from PIL import Image

from fastpmae import PRESETS, Config

REPOSITORY = Path(__file__).parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
HOMES = {"fastpmae": REPOSITORY, "fastpmae_kernels": REPOSITORY / "kernels", "fastpmae_loaders": REPOSITORY / "loaders"}
"""The folder of each distribution, by the package that it holds."""
PROJECTS = {package: tomllib.loads((home / "pyproject.toml").read_text())["project"] for package, home in HOMES.items()}
COMMANDS_AT = {name: place for project in PROJECTS.values() for name, place in project.get("scripts", {}).items()}
"""Where each command begins, as `module:function`."""


def module_of(command: str) -> str:
    """The module behind a command, by its name without `fastpmae-`; `demo` has none of its own."""
    return "fastpmae.demo.demo" if command == "demo" else COMMANDS_AT[f"fastpmae-{command}"].split(":")[0]


def made_image(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colours with a few edges: compresses and crops like a photograph, and differs from seed to seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pixels = np.array(coarse)
    for _ in range(4):
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        pixels[top : top + height // 4, left : left + width // 4] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def write_tree(folder: Path, count: int, classes: int = 3) -> Path:
    """A class-per-folder tree of `count` JPEGs of mixed sizes."""
    for number in range(count):
        place = folder / f"class_{number % classes}"
        place.mkdir(parents=True, exist_ok=True)
        made_image(number, 60 + number % 7 * 9, 50 + number % 5 * 11).save(place / f"{number:04d}.jpg", quality=92)
    return folder


def tiny_settings(beton: Path) -> Config:
    """Dual teachers on the small images: a step takes some tens of milliseconds. Uneven folds, stochastic depth on."""
    return PRESETS["demo"].using(
        beton=beton,
        image_size=32,
        width=32,
        heads=2,
        depth=2,
        drop_path=0.3,
        decoder_width=32,
        decoder_depth=1,
        decoder_heads=2,
        head_hidden=32,
        head_bottleneck=16,
        prototypes=24,
        folds=5,
        lambda_c=1.0,
        lambda_p=1.0,
        pixel_epochs=0,
        epochs=3,
        batch_size=8,
        blr=4e-3,
        log_every=1,
        workers=1,
        device="cpu",
        tensorboard=False,
    )


def progressive_bomb(side: int, scans: int) -> bytes:
    """A gray progressive JPEG of side x side pixels: a scan of the blocks' means, and `scans` more that add nothing."""

    def segment(marker: int, content: bytes) -> bytes:
        return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content

    blocks = (-(-side // 8)) ** 2
    # the only code of the second table says that 2^14 blocks and as many more as 14 bits tell are empty
    runs = ["0" + format(min(blocks - at, 32767) - 16384, "014b") for at in range(0, blocks - 16383, 32767)]
    rest = blocks - sum(16384 + int(run, 2) for run in runs)
    bits = "".join(runs) + ("0" + 14 * "0") * (rest > 0)  # a run that is longer than what is left ends with the picture
    bits += "1" * (-len(bits) % 8)
    empty = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    one_code = bytes((1, *(15 * [0])))
    head = segment(0xDB, bytes(1) + 64 * b"\1") + segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    tables = segment(0xC4, b"\x00" + one_code + b"\0") + segment(0xC4, b"\x10" + one_code + b"\xe0")
    body = segment(0xDA, b"\1\1\0\0\0\0") + bytes(blocks // 8 + 1)
    band = (segment(0xDA, bytes((1, 1, 0, 1 + scan % 63, 1 + scan % 63, 0))) + empty for scan in range(scans))
    return b"\xff\xd8" + head + tables + body + b"".join(band) + b"\xff\xd9"
