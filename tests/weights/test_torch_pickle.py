"""Files of torch.save read without unpickling: against torch.load, in every form that torch has, and hostile ones."""

import argparse
import collections
import os
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastpmae.weights.pickle_machine import CutOffError, PickleError, StandIn, Stored
from fastpmae.weights.torch_pickle import held_by_name, read_pickled

FORMS: list[dict[str, Any]] = [
    {},
    {"pickle_protocol": 4},
    {"pickle_protocol": 5},
    {"_use_new_zipfile_serialization": False},
    {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
]
TENSORS = {
    "float": torch.arange(12.0).view(3, 4),
    "transposed": torch.arange(12.0).view(3, 4).T,
    "part": torch.arange(100)[10:40:3],
    "half": torch.arange(5).half(),
    "bfloat16": torch.arange(5).bfloat16(),
    "double": torch.arange(5).double(),
    "bool": torch.tensor([True, False]),
    "complex": torch.tensor([1 + 2j]),
    "float8": torch.arange(4.0).to(torch.float8_e4m3fn),
    "uint16": torch.arange(4).to(torch.uint16),
    "parameter": torch.nn.Parameter(torch.ones(2, 3)),
    "buffer": torch.nn.Buffer(torch.ones(2)),
    "number": torch.tensor(2.5),
    "nothing": torch.zeros(0, 3),
    "expanded": torch.ones(1).expand(3, 2),
}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_same_tensors_as_torch_loads(form: dict[str, Any], tmp_path: Path):
    torch.save({"model": collections.OrderedDict(TENSORS), "epoch": 3, "names": ("a", "b")}, tmp_path / "a.pth", **form)
    found = read_pickled(tmp_path / "a.pth")
    assert (found["epoch"], found["names"]) == (3, ("a", "b"))
    for name, tensor in TENSORS.items():
        stored = found["model"][name]
        assert isinstance(stored, Stored)
        assert (stored.shape, stored.dtype) == (tuple(tensor.shape), tensor.dtype), name
        loaded = stored.load()
        assert loaded.is_contiguous()
        assert torch.equal(loaded.to(torch.complex128), tensor.detach().to(torch.complex128)), name


class Odd(dict):
    """A trainer's own class, as yacs' CfgNode or Lightning's AttributeDict is one."""


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_whatever_a_trainer_keeps_beside_its_weights_is_passed_over(form: dict[str, Any], tmp_path: Path):
    beside = {
        "args": argparse.Namespace(lr=np.float64(0.1), out=Path("/x"), sizes={1, 2}, frozen=frozenset([3])),
        "optimizer": {"param_groups": [{"lr": np.float64(0.1), "betas": (0.9, np.float32(0.95))}]},
        "best": np.int64(3), "table": np.arange(4), "device": torch.device("cpu"), "dtype": torch.float16,
        "config": Odd(a=1), "losses": collections.defaultdict(list, a=[1]), "counts": collections.Counter("ab"),
        "slice": slice(3), "complex": 1j, "bytes": b"\xff", "large": 10**30,
    }  # fmt: skip
    torch.save({"model": TENSORS, **beside}, tmp_path / "a.pth", **form)
    found = read_pickled(tmp_path / "a.pth")
    assert torch.equal(found["model"]["float"].load(), TENSORS["float"])
    assert isinstance(found["args"], StandIn)
    assert isinstance(found["optimizer"]["param_groups"][0]["lr"], StandIn)
    assert "numpy" in found["best"].kind
    assert found["large"] == 10**30


def test_tensors_of_other_kinds_say_what_they_are(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own of what is in beta
        odd = {
            "sparse": torch.eye(3).to_sparse(),
            "rows": torch.eye(3).to_sparse_csr(),
            "meta": torch.empty(3, device="meta"),
            "quantised": torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
            "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        }
        torch.save(odd, tmp_path / "a.pth")
    found = read_pickled(tmp_path / "a.pth")
    kinds = {name: value.kind for name, value in found.items()}
    assert kinds["sparse"] == kinds["rows"] == "a sparse tensor"
    assert (kinds["quantised"], kinds["nested"]) == ("a quantised tensor", "a nested tensor")
    assert "meta" in kinds["meta"]


class Calls:
    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("form", FORMS[:4], ids=str)
def test_a_file_that_would_call_something_is_refused_and_calls_nothing(form: dict[str, Any], tmp_path: Path):
    mark = tmp_path / "called"
    for harmful in (
        Calls(os.system, f"touch {mark}"),
        Calls(eval, f"open({str(mark)!r}, 'w')"),
        Calls(open, str(mark), "w"),
        {"hidden": [Calls(os.mkdir, str(mark))]},
    ):
        torch.save({"model": TENSORS, "more": harmful}, tmp_path / "a.pth", **form)
        with pytest.raises(PickleError, match=r"it would call (posix|builtins|__builtin__|io|_io)\."):
            read_pickled(tmp_path / "a.pth")
        (tmp_path / "raw.pth").write_bytes(pickle.dumps(harmful))
        with pytest.raises(PickleError):
            read_pickled(tmp_path / "raw.pth")
    # a function of a module that nobody has heard of is a name like others, and is not called either
    torch.save({"model": Calls(Path.touch, mark)}, tmp_path / "a.pth")
    assert isinstance(read_pickled(tmp_path / "a.pth")["model"], StandIn)
    assert not mark.exists()


def test_a_whole_network_and_other_contents_are_no_tensors_by_name(tmp_path: Path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(PickleError, match=r"whole object of the type torch\.nn\.modules\.linear\.Linear: save its"):
        held_by_name(read_pickled(tmp_path / "a.pth"))
    with pytest.raises(PickleError, match="no tensors by name"):
        held_by_name([1])


@pytest.mark.slow
@pytest.mark.parametrize("form", [FORMS[0], FORMS[3]], ids=str)
def test_cut_off_at_any_place_is_a_sentence(form: dict[str, Any], tmp_path: Path):
    torch.save({"model": TENSORS}, tmp_path / "a.pth", **form)
    whole = (tmp_path / "a.pth").read_bytes()
    for length in range(1, len(whole), 37):
        (tmp_path / "a.pth").write_bytes(whole[:length])
        with pytest.raises(PickleError):
            read_pickled(tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes(whole[:-30])
    with pytest.raises(CutOffError):
        read_pickled(tmp_path / "a.pth")


def with_pickle(path: Path, data: bytes, numbers: bytes = bytes(64), packing: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/data/0", numbers)
    return path


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuJ%btQ"


def tensor_of(count: int, offset: int, shape: int | list[int], stride: int | list[int]) -> bytes:
    """A pickle of one tensor, as torch.save writes them; of one axis, or of a list of axes."""

    def number(value: int) -> bytes:
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)

    def numbers(values: int | list[int]) -> bytes:
        return b"(" + b"".join(map(number, [values] if isinstance(values, int) else values)) + b"t"

    storage = STORAGE % struct.pack("<i", count)
    sizes = number(offset) + numbers(shape) + numbers(stride)
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + sizes + hooks + b"tR."


def test_a_tensor_by_hand_is_read(tmp_path: Path):
    numbers = np.arange(16, dtype=np.float32)
    found = read_pickled(with_pickle(tmp_path / "a.pth", tensor_of(16, 2, 4, 3), numbers.tobytes()))
    assert found.load().tolist() == [2, 5, 8, 11]


@pytest.mark.parametrize(
    ("count", "offset", "shape", "stride"),
    [
        (16, 0, 17, 1),
        (16, 13, 4, 1),
        (16, -1, 4, 1),
        (16, 0, 4, -1),
        (16, 0, -4, 1),
        (16, 0, 2, 2**62),
        (16, 2**62, 1, 1),
        (17, 0, 17, 1),  # more than the file holds
        (2**31 - 1, 0, 10**8, 1),
        (-16, 0, 1, 1),
        (16, 0, [2**31, 8, 2**31, 0], [0, 2**40, 0, 1]),  # empty, and torch counts its axes nevertheless
        (16, 0, [0, 2**40, 2**40], [1, 1, 1]),
    ],
)
def test_a_tensor_that_its_numbers_do_not_hold_is_refused(count: int, offset: int, shape: Any, stride: Any, tmp_path):
    with pytest.raises(PickleError, match="damaged"):
        read_pickled(with_pickle(tmp_path / "a.pth", tensor_of(count, offset, shape, stride)))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"\x80\x02" + b"N0" * 600 + b".", "too many steps"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged"),
        (b"\x80\x04\x8d" + struct.pack("<Q", 2**63 - 1) + b"abc.", "damaged"),
        (b"\x80\x02r\xff\xff\xff\xff.", "damaged"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (10**13).to_bytes(6, "little") + b"\x85R", "cut off|damaged"),
        (b"", "cut off|damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02\x82\x01.", "damaged"),
    ],
)
def test_a_pickle_that_is_none_is_refused_soon(data: bytes, sentence: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("fastpmae.weights.pickle_machine.STEPS", 1000)
    with pytest.raises(PickleError, match=sentence):
        read_pickled(with_pickle(tmp_path / "a.pth", data))


def doubled(levels: int) -> bytes:
    """Lists of two lists each, all the same: a few bytes a level, and twice as many words at each where it is shown."""
    return b"]\x94" + b"".join(b"0(h" + bytes([level]) + b"h" + bytes([level]) + b"l\x94" for level in range(levels))


@pytest.mark.parametrize(
    "data",
    [
        doubled(60) + b"h\x3ch\x3c\x93.",
        b"\x8c\x01a" + doubled(60) + b"\x93.",
        b"X" + struct.pack("<I", 10**6) + b"n" * 10**6 + b"\x94" + b"h\0h\0\x93)R" * 1000 + b".",
        b"cnumpy\n" + b"n" * 2000 + b"\n.",
    ],
    ids=["a module that is lists", "a class that is none", "a name of a megabyte a thousand times", "a long name"],
)
def test_a_name_is_a_short_text(data: bytes, tmp_path: Path):
    with pytest.raises(PickleError, match="damaged"):
        read_pickled(with_pickle(tmp_path / "a.pth", b"\x80\x04" + data))


def test_a_type_of_numbers_is_a_name(tmp_path: Path):
    def tensor_with(kind: bytes) -> Path:
        call = b"(" + STORAGE % struct.pack("<i", 4) + b"K\0K\4\x85K\1\x85\x89N" + kind + b"tR."
        return with_pickle(tmp_path / "a.pth", b"\x80\x04ctorch._utils\n_rebuild_tensor_v3\n" + call)

    assert isinstance(read_pickled(tensor_with(doubled(60))), StandIn)
    assert read_pickled(tensor_with(b"ctorch\nint32\n")).dtype == torch.int32
    assert read_pickled(tensor_with(b"ctorch\nfloat5\n")).kind.startswith("a tensor of torch.float5")


def test_keys_are_names_and_small_numbers(tmp_path: Path):
    held = {"a": 1, 7: 2, None: 3, (1, 2): 4, 10**100: 5, -(2**70): 6}
    torch.save(held, tmp_path / "a.pth")
    assert read_pickled(tmp_path / "a.pth") == {"a": 1, 7: 2, None: 3}


def test_what_is_packed_anew_or_a_program_is_refused(tmp_path: Path):
    path = with_pickle(tmp_path / "a.pth", b"\x80\x02N." + bytes(10**7), packing=zipfile.ZIP_DEFLATED)
    with pytest.raises(PickleError, match="packed anew"):
        read_pickled(path)
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N.")
        archive.writestr("a/constants.pkl", b"")
    with pytest.raises(PickleError, match="TorchScript"):
        read_pickled(tmp_path / "b.pth")
