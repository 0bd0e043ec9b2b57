"""The first twenty losses of every method, from weights and images that hang on no library's random numbers.

Whole runs of `pretrain` at a size of milliseconds a step. Weights and pixels come from the raw words of numpy's PCG64,
whose stream numpy promises to keep, and pixels lie in PNG files, so that no encoder and no resize has a say in them;
one case goes the way of most runs, by a .beton file and the default loader. What is imported of fastpmae is its public
face and, to put the weights in, `make_networks` where the loop looks for it.
"""

import contextlib
import hashlib
import json
import math
import platform
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import PIL.Image
import torch
from torch import nn

import fastpmae.train
from fastpmae import PRESETS, Config, pretrain, write_beton
from fastpmae_loaders.engines.names import DEFAULT_ENGINE

FOLDER = Path(__file__).parent
STEPS = 20
LOSSES = ("loss", "loss_m", "loss_c", "loss_p")
CLOCKED = ("images_per_second", "data_wait", "mfu", "peak_memory_gib", "partial")

# six epochs of four steps, of which the last is not reached: teachers that follow by epoch do so five times
TINY: dict[str, Any] = {
    "loader": "torch",
    "image_size": 16,
    "patch_size": 4,
    "width": 16,
    "heads": 2,
    "depth": 2,
    "decoder_width": 8,
    "decoder_heads": 2,
    "decoder_depth": 1,
    "head_hidden": 12,
    "head_bottleneck": 6,
    "prototypes": 10,
    "epochs": 6,
    "warmup_epochs": 1.0,
    "batch_size": 4,
    "blr": 0.2,
    "steps": STEPS,
    "log_every": 1,
    "tensorboard": False,
    "workers": 1,
    "device": "cpu",
    "precision": "fp32",
    "compile": "off",
}

# each method by its preset, and what the presets leave at its default
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("paper", {"loader": DEFAULT_ENGINE}),
    "sdae": ("sdae", {}),
    "sdae-code": ("sdae-code", {}),
    "mae": ("mae", {}),
    "dual": ("dual", {}),
    "single-step": ("single-step", {}),
    "single-epoch": ("single-epoch", {}),
    "demo": ("demo", {"pixel_epochs": 0}),
    "uneven-parts": (
        "dual",
        {
            "folds": 5,
            "accumulate": 2,
            "sinkhorn_over": "step",
            "clip_grad": 0.5,
            "match_metric": "l2",
            "match_scope": "fold",
        },
    ),
    "spare-memory": (
        "dual",
        {
            "prototypes_chunk": 7,
            "activation_checkpointing": 1,
            "reconstruction_view": "complex",
            "labelling_view": "simple",
            "complex_recipe": "t2",
        },
    ),
}


def settings_of(case: str) -> Config:
    """The settings of a case but for its images and its folder."""
    preset, changes = CASES[case]
    return PRESETS[preset].using(**(TINY | changes))


def uniform(name: str, count: int) -> np.ndarray:
    """float64 [count] in [-1, 1), which the name decides."""
    words = np.random.PCG64(zlib.crc32(name.encode())).random_raw(count)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1


def write_images(folder: Path, count: int = 17) -> Path:
    """PNG files of mixed sizes: planes that rise and fall, and noise, so that each crop is another."""
    folder.mkdir()
    for number in range(count):
        width, height = 24 + number % 5 * 7, 20 + number % 3 * 11
        slopes = np.floor(uniform(f"slopes {number}", 6).reshape(3, 2) * 16).astype(np.int64)
        noise = np.floor(uniform(f"noise {number}", height * width * 3) * 24).astype(np.int64)
        down, across = np.arange(height)[:, None, None], np.arange(width)[None, :, None]
        waves = (down * slopes[:, 0] + across * slopes[:, 1]) % 512
        pixels = np.abs(waves - 256) + noise.reshape(height, width, 3)
        PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02d}.png")
    return folder


@torch.no_grad()
def fill(network: nn.Module, who: str) -> None:
    """Give every weight a value that its name decides: matrices as Xavier's, the others near where they start."""
    for name, weight in network.named_parameters():
        values = torch.from_numpy(uniform(f"{who} {name}", weight.numel())).view(weight.shape)
        if weight.dim() == 1:
            weight += 0.05 * values.to(weight.dtype)
        else:
            inputs = weight[0].numel()
            weight.copy_(values * math.sqrt(6 / (inputs + weight.numel() // inputs)))


def digest(networks: Mapping[str, nn.Module]) -> str:
    """A digest of all their tensors."""
    total = hashlib.sha256()
    for who, network in networks.items():
        for name, tensor in network.state_dict().items():
            total.update(f"{who} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()[:24]


@contextlib.contextmanager
def fixed_networks(config: Config) -> Iterator[tuple[dict[str, nn.Module], list[str]]]:
    """Runs in here start from our weights. Yields the networks of the run, once there is one, and the digest of the
    weights that its seed gave."""
    networks: dict[str, nn.Module] = {}
    seeded: list[str] = []
    make = fastpmae.train.make_networks

    def make_ours(*arguments: Any) -> Any:
        student, teachers = made = make(*arguments)
        networks.update({"student": student} | teachers.modules())
        seeded.append(digest(networks))
        fill(student, "student")
        student_weights = dict(student.named_parameters())
        for who, teacher in teachers.modules().items():
            if config.teacher.teacher_init == "random":
                fill(teacher, who)
                continue
            with torch.no_grad():
                for name, weight in teacher.named_parameters():
                    weight.copy_(student_weights[name])
        return made

    with mock.patch.object(fastpmae.train, "make_networks", make_ours):
        yield networks, seeded


def run(case: str) -> dict[str, Any]:
    """What a case comes to here: `figures` holds each figure of the metrics step by step, `weights` two digests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="fastpmae-golden-") as place:
            images = write_images(Path(place) / "images")
            config = settings_of(case)
            if config.data.loader == DEFAULT_ENGINE:
                images = write_beton(images, Path(place) / "images.beton").path
            config = config.using(beton=images, out=Path(place) / "run")
            with fixed_networks(config) as (networks, seeded):
                folder = pretrain(config)
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    finally:
        torch.set_num_threads(threads)
    names = [name for name in rows[0] if name not in CLOCKED]
    return {
        "figures": {name: [row[name] for row in rows] for name in names},
        "weights": {"of the seed": seeded[0], f"after {STEPS} steps": digest(networks)},
    }


def made_with() -> dict[str, str]:
    """The machine and the libraries that decide the last bits."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    packages = {name: version(name) for name in ("torch", "numpy", "numba", "pillow")}
    return {
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    } | packages


def path_of(case: str) -> Path:
    """Where a case's figures are kept."""
    return FOLDER / f"{case}.json"


def kept(case: str) -> dict[str, Any]:
    """A case as it was kept."""
    return json.loads(path_of(case).read_text())


def keep(case: str, found: Mapping[str, Any]) -> None:
    """Keep a case: Python writes a float so that it reads the very same back."""
    groups = []
    for group, values in ({"made_with": made_with()} | dict(found)).items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
        groups.append(f" {json.dumps(group)}: {{\n{lines}\n }}")
    path_of(case).write_text("{\n" + ",\n".join(groups) + "\n}\n")


def differences(case: str, found: Mapping[str, Any]) -> list[str]:
    """What differs from the kept figures in any bit, a sentence each."""
    before, sentences = kept(case), []
    names = list(dict.fromkeys((*before["figures"], *found["figures"])))
    for name in names:
        was, now = before["figures"].get(name), found["figures"].get(name)
        if was is None or now is None:
            sentences.append(f"{case}: {name} is {'new' if was is None else 'gone'}")
            continue
        for step, (old, new) in enumerate(zip(was, now, strict=True), 1):
            if old != new:
                sentences.append(f"{case}: {name} differs from step {step} on: {old!r} was kept, {new!r} is found")
                break
    for name, old in before["weights"].items():
        if found["weights"][name] != old:
            sentences.append(f"{case}: the weights {name} differ")
    return sentences
