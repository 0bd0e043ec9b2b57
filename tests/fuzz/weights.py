"""Weights of other projects, broken by structure: .pth as torch.save writes them, pickles by hand, and safetensors."""

import argparse
import functools
import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fastpmae.evaluate.backbone import features, find_backbone
from fastpmae.model.vit import Encoder
from fastpmae.run.init_weights import start_encoder
from tests.fuzz.case import Case

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
NUMBERS = (0, 1, 2, 3, 7, -1, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 10**12, 10**30)
WORDS = ("", "\x1b[31mred", "blocks.1000000000.norm1.weight", "blocks.x.norm1.weight", "blocks", "blocks.-1.a")
WORDS += ("blocks.٣.norm1.weight", "patch_embed.proj.weight", "module.patch_embed.proj.weight", "\u202eright")
WORDS += (
    "pos_embed",
    "a" * 9999,
    "conv_proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "model",
    "teacher",
    "reg_token",
)
IMAGES = torch.zeros(2, 3, 32, 32)


class Named:
    """Pickled as a call of any function by its name."""

    def __init__(self, module: str, name: str, arguments: tuple[Any, ...] = ()):
        self.module, self.name, self.arguments = module, name, arguments


@functools.cache
def sound() -> tuple[dict[str, Tensor], ...]:
    """A few networks' tensors."""
    torch.manual_seed(0)
    pooled = VisionTransformer(**SIZES, global_pool="avg", init_values=1e-5, qk_norm=True, reg_tokens=2)
    beit = Beit(**SIZES, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
    return tuple(model.state_dict() for model in (VisionTransformer(**SIZES), pooled, beit))


def use(path: Path) -> None:
    """What every command does with weights: an evaluation's network, and the start of a run."""
    backbone = find_backbone(str(path), heads=2)
    if backbone.image_size <= 64:
        model = backbone.build().eval()
        with torch.no_grad():
            features(model, IMAGES if backbone.image_size == 32 else torch.zeros(1, 3, *(2 * [backbone.image_size])))
    start_encoder(Encoder(32, 8, 32, 2, 2), path)


def number(rng: np.random.Generator) -> int:
    return int(NUMBERS[rng.integers(len(NUMBERS))])


def odd_tensor(rng: np.random.Generator, like: Tensor) -> tuple[str, Tensor]:
    """A tensor that is not what its name promises."""
    small = tuple(int(size) for size in rng.integers(0, 9, size=rng.integers(0, 6)))
    makers: dict[str, Callable[[], Tensor]] = {
        "shape": lambda: torch.zeros(small),
        "transposed": lambda: like.mT if like.ndim > 1 else like[:0],
        "cut": lambda: like[: len(like) // 2] if like.ndim else like,
        "sparse": lambda: like.to_sparse(),
        "meta": lambda: torch.empty(like.shape, device="meta"),
        "complex": lambda: like.to(torch.complex64),
        "bool": lambda: like > 0,
        "int": lambda: like.long(),
        "float8": lambda: like.to(torch.float8_e4m3fn),
        "double": lambda: like.double(),
        "not finite": lambda: like * float("nan"),
        "wide": lambda: torch.zeros(1).expand(1, 10 ** int(rng.integers(1, 9)), 32),
        "huge": lambda: torch.zeros(1).expand(10 ** int(rng.integers(1, 6)), 3, 8, 8),
        "parameter": lambda: torch.nn.Parameter(like.float()),
        "square": lambda: torch.zeros(1).expand(1, int(rng.integers(1, 3000)) ** 2 + 1, 32),
    }
    kind = str(rng.choice(list(makers)))
    return kind, makers[kind]()


def changed(rng: np.random.Generator) -> tuple[str, dict[Any, Any]]:
    """A network's tensors with some of them odd, gone, or under another name."""
    sane = sound()[rng.integers(len(sound()))]
    tensors: dict[Any, Any] = dict(sane)
    said = []
    for _ in range(rng.integers(0, 4)):
        name = str(rng.choice(sorted(name for name in tensors if isinstance(name, str))))
        match rng.integers(6):
            case 0:
                tensors.pop(name)
                said.append(f"no {name}")
            case 1:
                word = str(rng.choice(WORDS))
                tensors[word] = tensors[name]
                said.append(f"{name} as {word!r:.40}")
            case 2:
                tensors[name] = None if rng.random() < 0.5 else {"a": 1}
                said.append(f"{name} is none")
            case 3:
                tensors[number(rng)] = 1
            case _:
                kind, tensor = odd_tensor(rng, sane.get(name, torch.zeros(2)))
                tensors[name] = tensor
                said.append(f"{name} {kind}")
    return ", ".join(said) or "sound", tensors


def wrapped(rng: np.random.Generator, tensors: dict[Any, Any]) -> Any:
    """In what trainers keep a network, and in some things that they do not."""
    options = argparse.Namespace(lr=np.float64(0.1), path=Path("/x"), table=np.arange(3))
    match rng.integers(9):
        case 0:
            return tensors
        case 1:
            return {"model": tensors, "args": options, "optimizer": {"param_groups": [{"lr": np.float64(0.1)}]}}
        case 2:
            student = {f"module.backbone.{name}": tensor for name, tensor in tensors.items()}
            return {"student": student, "teacher": {f"backbone.{name}": t for name, t in tensors.items()}}
        case 3:
            return {"state_dict": {f"encoder.{name}": tensor for name, tensor in tensors.items()}}
        case 4:
            both = {f"momentum_backbone.{name}": tensor for name, tensor in tensors.items()}
            return {"state_dict": both | {f"backbone.{name}": tensor for name, tensor in tensors.items()}}
        case 5:
            return OrderedDict(tensors)
        case 6:
            deep: Any = tensors
            for _ in range(int(rng.integers(1, 200))):
                deep = {"model": deep}
            return deep
        case 7:
            return [tensors]
        case _:
            return {"model": tensors, "model_teacher": tensors}


def pth(rng: np.random.Generator, path: Path) -> str:
    """As torch.save writes it, the odd thing being within."""
    said, tensors = changed(rng)
    form = {"_use_new_zipfile_serialization": bool(rng.random() < 0.7)}
    try:
        torch.save(wrapped(rng, tensors), path, **form)
    except (NotImplementedError, RuntimeError):  # the older form holds fewer kinds
        torch.save(wrapped(rng, tensors), path)
    return said


def bytes_of(rng: np.random.Generator, path: Path) -> str:
    """Bytes of a sound file changed, most of them where its structure is, or the file cut off or continued."""
    data = bytearray(path.read_bytes())
    kind = rng.integers(4)
    if kind == 0:
        del data[int(rng.integers(len(data))) :]
        path.write_bytes(data)
        return "cut off"
    if kind == 1:
        path.write_bytes(bytes(data) + bytes(rng.integers(0, 256, int(rng.integers(1, 300)), dtype=np.uint8)))
        return "continued"
    # the pickle stands at the beginning of a .pth, the directory of a zip at its end
    for _ in range(rng.integers(1, 12)):
        reach = min(len(data), 3000)
        place = int(rng.integers(reach)) if rng.random() < 0.5 else len(data) - 1 - int(rng.integers(reach))
        if rng.random() < 0.3 and place + 4 < len(data):
            data[place : place + 4] = struct.pack("<I", number(rng) % 2**32)
        else:
            data[place] = int(rng.integers(256))
    path.write_bytes(data)
    return "bytes"


def _operation(rng: np.random.Generator) -> bytes:
    """A step of the pickle machine, often one that it should not take."""
    word = str(rng.choice(WORDS)).encode("utf-8", "replace")[:200]
    name = str(rng.choice(["torch._utils _rebuild_tensor_v2", "collections OrderedDict", "torch FloatStorage",
                           "os system", "builtins eval", "torch._utils _rebuild_parameter", "torch Size",
                           "numpy.core.multiarray scalar", "torch.storage UntypedStorage",
                           "__builtin__ set"]))  # fmt: skip
    module, _, function = name.partition(" ")
    steps = [
        b"(", b"}", b"]", b")", b"t", b"u", b"s", b"a", b"e", b"R", b"b", b"\x81", b"\x92", b"Q", b"0", b"1", b"2",
        b"l", b"d", b"N", b"\x88", b"\x85", b"\x86", b"\x87", b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94", b"o", b".",
        b"K" + bytes([int(rng.integers(256))]),
        b"J" + struct.pack("<I", number(rng) % 2**32),
        b"X" + struct.pack("<I", len(word)) + word,
        b"X" + struct.pack("<I", number(rng) % 2**32) + word,
        b"\x8d" + struct.pack("<Q", number(rng) % 2**64) + word,
        b"\x8a\x08" + struct.pack("<Q", number(rng) % 2**64),
        b"\x8b" + struct.pack("<I", number(rng) % 2**32),
        b"c" + module.encode() + b"\n" + function.encode() + b"\n",
        b"q" + bytes([int(rng.integers(4))]),
        b"r" + struct.pack("<I", number(rng) % 2**32),
        b"h" + bytes([int(rng.integers(4))]),
        b"I" + str(number(rng)).encode() + b"\n",
        b"\x95" + struct.pack("<Q", number(rng) % 2**64),
        b"P0\n", b"\x82\x01", b"\x97", b"G" + bytes(8), b"L1" + b"0" * int(rng.integers(1, 6000)) + b"L\n",
    ]  # fmt: skip
    return steps[rng.integers(len(steps))]


def pickled(rng: np.random.Generator, path: Path) -> str:
    """The pickle of a sound .pth with steps put in, taken out or doubled, in a sound zip."""
    torch.save(wrapped(rng, dict(sound()[0])), path)
    with zipfile.ZipFile(path) as archive:
        held = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    place = next(name for name in held if name.endswith("data.pkl"))
    data = held[place]
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(2, len(data)))
        if rng.random() < 0.6:
            data = data[:at] + _operation(rng) + data[at:]
        else:
            data = data[:at] + data[at + int(rng.integers(1, 20)) :]
    if rng.random() < 0.2:
        data = b"\x80\x02" + b"".join(_operation(rng) for _ in range(rng.integers(1, 60))) + b"."
    held[place] = data
    packing = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, content in held.items():
            if rng.random() > 0.02:
                archive.writestr(name, content)
    return "steps of the pickle"


def tensors_by_hand(rng: np.random.Generator, path: Path) -> str:
    """Offsets, shapes, strides and sizes that do not fit the numbers."""
    numbers = [int(rng.choice([2, 8, 32, 0, -1, 2**31, 2**40, 2**62, 2**63])) for _ in range(rng.integers(1, 6))]
    strides = [int(rng.choice([0, 1, 8, -1, 2**40, 2**62])) for _ in numbers][: int(rng.integers(1, 7))]
    body = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.arguments if isinstance(obj, Named) and obj.module == "storage" else None

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, Named):
                return _function(obj.module, obj.name), obj.arguments
            return NotImplemented

    storage = Named("storage", "", ("storage", torch.FloatStorage, "0", "cpu", int(rng.choice([64, 0, 2**40, -3]))))
    offset = int(rng.choice([0, 1, 63, -1, 2**62]))
    tensor = Named("torch._utils", "_rebuild_tensor_v2",
                   (storage, offset, tuple(numbers), tuple(strides), False, OrderedDict()))  # fmt: skip
    Pickler(body, 2).dump({"model": {"patch_embed.proj.weight": tensor, "pos_embed": tensor, "cls_token": tensor}})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body.getvalue())
        archive.writestr("archive/data/0", bytes(256))
    return f"a tensor of {numbers} by {strides} from {offset}"


def _function(module: str, name: str) -> Any:
    return getattr(__import__(module, fromlist=[name]), name)


def safetensors_file(rng: np.random.Generator, path: Path) -> str:
    """Headers of safetensors with other sizes, types, places and words."""
    tensors = {name: tensor.contiguous().clone() for name, tensor in sound()[rng.integers(2)].items()}
    save_file(tensors, path, {"format": "pt", "timm": json.dumps({"num_heads": 2})})
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    said = []
    for _ in range(rng.integers(1, 4)):
        name = str(rng.choice([key for key in header if key != "__metadata__"]))
        entry = header[name]
        match rng.integers(7):
            case 0:
                entry["shape"] = [number(rng) for _ in range(rng.integers(0, 5))]
            case 1:
                kinds = ["I64", "F8_E5M2", "BOOL", "BF16", "F4", "C64", "F64", "X", "U16", "F8_E8M0"]
                entry["dtype"] = str(rng.choice(kinds))
            case 2:
                entry["data_offsets"] = [number(rng), number(rng)]
            case 3:
                header[str(rng.choice(WORDS))] = header.pop(name)
            case 4:
                header["__metadata__"] = {"format": str(rng.choice(["pt", "fastpmae-checkpoint-1", "\x1b[31m"])),
                                          "timm": str(rng.choice(["[1]", "{" * 2000, '{"num_heads": 1e400}', "null"])),
                                          "mean": str(rng.choice(["[1, 2, 3]", '"x"', "[]"])), "std": "[0, 0, 0]",
                                          "finetune": "{}", "progress": "{}", "digest": ""}  # fmt: skip
            case 5:
                entry["shape"], entry["data_offsets"] = [0, number(rng)], [0, 0]
            case _:
                entry["shape"] = [*entry["shape"], 1]
        said.append(name)
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    size = number(rng) % 2**64 if rng.random() < 0.1 else len(told)
    path.write_bytes(struct.pack("<Q", size) + told + (rest if rng.random() < 0.9 else rest[: len(rest) // 2]))
    return f"header: {', '.join(said)}"


def other(rng: np.random.Generator, path: Path) -> str:
    """No weights at all."""
    contents = [b"", b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n",
                b"PK\3\4" + bytes(60), b"\x80\x02", b"hello", bytes(4096), pickle.dumps({"model": 1}), b"{}",
                b"\x89PNG\r\n", b"PK\5\6" + bytes(18), b"S" * 100000,
                bytes(rng.integers(0, 256, 3000, dtype=np.uint8))]  # fmt: skip
    content = contents[rng.integers(len(contents))]
    path.write_bytes(content)
    return f"other contents: {content[:20]!r}"


def cases(rng: np.random.Generator, folder: Path) -> Iterator[Case]:
    """See `tests.fuzz.case`."""
    sound()
    while True:
        kind = rng.integers(12)
        path = folder / ("weights.safetensors" if kind in (8, 9) else "weights.pth")
        if kind < 3:
            said = pth(rng, path)
        elif kind < 6:
            said = pickled(rng, path)
        elif kind == 6:
            said = tensors_by_hand(rng, path)
        elif kind == 7:
            pth(rng, path)
            said = bytes_of(rng, path)
        elif kind == 8:
            said = safetensors_file(rng, path)
        elif kind == 9:
            safetensors_file(rng, path)
            said = bytes_of(rng, path)
        elif kind == 10:
            said = other(rng, path)
        else:
            torch.save(wrapped(rng, dict(sound()[rng.integers(3)])), path)
            said = bytes_of(rng, path)
        yield Case(said, functools.partial(use, path), (path,))
