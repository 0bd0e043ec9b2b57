"""Values from Python: what is converted without a loss, what is refused, and addresses that are no paths."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from fastpmae.config_file import read_config
from fastpmae.run.checkpoint import find_checkpoint, read_checkpoint
from fastpmae.weights.foreign import read_foreign, read_tensors
from fastpmae_loaders import Beton, DaliSettings, ImageFolder, PairedViews, PlainViews, View, ViewSettings, open_samples
from fastpmae_loaders.blockwise import IBOTMasks
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.stores.address import SCHEMES
from fastpmae_loaders.values import Typed, checked, local_path, typed

Compile = Literal["auto", "on", "off"]


@pytest.mark.parametrize(
    ("value", "kind", "became"),
    [
        (1, int, 1),
        (1.0, int, 1),
        (np.int64(3), int, 3),
        (np.float32(2), int, 2),
        (10**30, int, 10**30),
        (1, float, 1.0),
        (np.float32(0.1), float, float(np.float32(0.1))),
        (Fraction(1, 4), float, 0.25),
        (np.bool_(True), bool, True),
        ("off", Compile, "off"),
        (np.str_("off"), Compile, "off"),
        (None, int | None, None),
        (7.0, int | None, 7),
        ([0.2, 1], tuple[float, float], (0.2, 1.0)),
        (np.array([0.2, 1]), tuple[float, float], (0.2, 1.0)),
        ([1, 2.0, np.int8(3)], tuple[int, ...], (1, 2, 3)),
        ("runs/x", Path, Path("runs/x")),
        ("runs/x", Path | None, Path("runs/x")),
        (Path("runs/x"), str | None, "runs/x"),
    ],
)
def test_what_loses_nothing_is_converted(value: Any, kind: Any, became: Any):
    found = typed(value, kind, "it")
    assert found == became
    assert type(found) is type(became)
    if isinstance(found, tuple):
        assert [type(part) for part in found] == [type(part) for part in became]


def test_an_array_stays_one_where_one_may_stand():
    array = np.arange(3)
    assert typed(array, Sequence[int] | np.ndarray | None, "it") is array
    assert typed([0.0, 1], Sequence[int] | np.ndarray | None, "it") == (0, 1)


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        (1.5, int, "it is 1.5; expected a whole number"),
        (float("nan"), int, "a whole number"),
        (float("inf"), int, "a whole number"),
        (True, int, "it is True; expected a whole number"),
        (np.bool_(True), int, "a whole number"),
        ("2", int, "it is '2'; expected a whole number"),
        (None, int, "it is None"),
        (b"1", int, "a whole number"),
        (2**53 + 1, float, "a number"),
        (10**400, float, "a number"),
        ("1e-3", float, "it is '1e-3'; expected a number"),
        (False, float, "a number"),
        (1j, float, "a number"),
        (0, bool, "it is 0; expected True or False"),
        ("yes", bool, "True or False"),
        (False, Compile, r"it is False; expected 'auto' or 'on' or 'off' \(False is 'off'\)"),
        (True, Compile, r"\(True is 'on'\)"),
        ("maybe", Compile, "it is 'maybe'; expected 'auto' or 'on' or 'off'"),
        (np.array([1, 2]), Compile, "expected 'auto'"),
        (["on"], Compile, "expected 'auto'"),
        ("cuda:1", Literal["auto", "cpu", "cuda"], r"expected 'auto' or 'cpu' or 'cuda' .*CUDA_VISIBLE_DEVICES=1"),
        (3, str, "it is 3; expected a text"),
        (3, str | None, "it is 3; expected a text or None"),
        (3, Path, "it is 3; expected a path"),
        (b"runs/x", Path | None, "expected a path or None"),
        (0.5, tuple[float, float], "it is 0.5; expected 2 values, each a number"),
        ((0.1, 0.2, 0.3), tuple[float, float], "expected 2 values"),
        (("a", "b"), tuple[float, float], "expected 2 values"),
        ("ab", tuple[str, str], "expected 2 values"),
        ({0: 1.0, 1: 2.0}, tuple[float, float], "expected 2 values"),
        ({"size": 3}, View, "expected View"),
        (["view"], Sequence[View] | None, "expected several values, each View or None"),
    ],
)
def test_the_rest_is_refused_by_a_sentence(value: Any, kind: Any, said: str):
    with pytest.raises(UserError, match=said):
        typed(value, kind, "it")


def test_a_number_of_more_digits_than_python_writes() -> None:
    with pytest.raises(UserError, match="it is of the kind int, and very long; expected a number"):
        typed(10**5000, float, "it")


def test_files_say_whole_numbers_without_a_point():
    assert typed(2, int, "it", strict=True) == 2
    with pytest.raises(UserError, match=r"it is 2\.0; expected a whole number"):
        typed(2.0, int, "it", strict=True)


def test_a_long_value_is_cut_short():
    with pytest.raises(UserError) as caught:
        typed("x" * 10**6, int, "it")
    assert len(str(caught.value)) < 200


def test_fields_and_arguments():
    @dataclass(frozen=True)
    class Sizes(Typed):
        side: int = 1
        share: float | None = None

    assert Sizes(2.0, 1) == Sizes(2, 1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="side is '2'"):
        Sizes("2")  # pyright: ignore[reportArgumentType]

    @checked
    def area(side: int, *more: int, names: Sequence[str] = (), **others: Any) -> tuple[int, Sequence[str]]:
        return side * side, names

    assert area(3.0, names=["a"]) == (9, ("a",))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"side is 1\.5"):
        area(1.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="side"):
        area()  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    "path", ["s3://bucket/run", "gs:/bucket/run", "hf://datasets/x", "file:///tmp/x", "https://a.b/c", "S3://b"]
)
@pytest.mark.parametrize("kind", [str, Path])
def test_addresses_are_no_paths(path: str, kind: type, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scheme = path.partition(":")[0]
    in_stores = () if scheme.lower() in SCHEMES else (open_samples,)
    for use in (local_path, ImageFolder, lambda given: typed(given, Path | None, "it"), *in_stores):
        with pytest.raises(UserError, match=rf"^{scheme}://.*: {scheme}:// is not supported"):
            use(kind(path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["c:data.beton", "C:/data", "run:1", "a:b/c", "12:30/x", "s3:", "/x/s3://y", "x/s3:/y"]
)
def test_names_with_colons_are_paths(name: str):
    assert local_path(name) == Path(name)


def test_an_address_is_said_on_one_line():
    with pytest.raises(UserError) as refused:
        local_path("s3://b\x1b[31m\n/x\u202e")
    assert str(refused.value).startswith(r"s3://b\x1b[31m\n/x\u202e: s3:// is not supported")


def test_names_that_no_file_can_have(tmp_path: Path):
    kinds = (local_path, open_samples, lambda given: typed(given, Path | None, "it"))
    for name in ("n" * 256, "é" * 128, f"{tmp_path}/{'n' * 256}/x", "x/" * 2048):
        for use in kinds:
            with pytest.raises(UserError, match=r"^.{120}: no file or folder can have so long a name$"):
                use(name)
    with pytest.raises(UserError, match=r"^\\ud800: no file can be called so$"):
        local_path("\ud800")
    (tmp_path / ("é" * 127)).touch()
    assert local_path(tmp_path / ("é" * 127)).exists()
    assert local_path("\udcff") == Path("\udcff")  # a byte that is no UTF-8, as Python tells it


def test_a_folder_that_is_called_like_an_address(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data:/x").mkdir(parents=True)
    assert local_path("data:/x") == Path("data:/x")


@pytest.mark.untyped
def test_the_loaders_arguments(small_beton: Path):
    """What was a TypeError, or was taken for something else, is a sentence; NumPy's numbers are numbers."""
    with PairedViews(str(small_beton), np.int64(4), "torch", seed=np.int64(3), workers=1.0) as views:  # pyright: ignore
        assert type(views.batch_size) is int
        assert type(views.state_dict()["seed"]) is int
    right: dict[str, Any] = {"samples": small_beton, "batch_size": 4, "engine": "torch"}
    for wrong, said in (
        ({"batch_size": "4"}, "batch_size is '4'; expected a whole number"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"shuffle": "no"}, "shuffle is 'no'; expected True or False"),
        ({"drop_last": 0}, "drop_last is 0"),
        ({"seed": "1"}, "seed is '1'"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"augment_on": True}, "augment_on is True"),
        ({"views": [224]}, "views is"),
        ({"settings": {"image_size": 3}}, "settings is"),
        ({"samples": 3}, "3"),
        ({"samples": None}, "None"),
        ({"engine": None}, "engine is None"),
    ):
        with pytest.raises(UserError, match=said):
            PairedViews(**{**right, **wrong})
    with pytest.raises(UserError, match="image_size is '64'"):
        PlainViews(small_beton, 4, image_size="64")  # pyright: ignore[reportArgumentType]
    with PairedViews(small_beton, 4, "torch") as views, pytest.raises(UserError, match="epoch is '1'"):
        views.set_epoch("1")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("read", [read_tensors, read_foreign, read_checkpoint, find_checkpoint, read_config, Beton])
def test_a_path_with_a_nul_is_a_sentence(read):
    for path in (Path("a\0b"), Path("weights/a\0.pth")):
        with pytest.raises(UserError, match=r"(no file can be called so|does not exist)$"):
            read(path)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (View, {"size": "224"}),
        (View, {"scale": 0.5}),
        (View, {"flip": "half"}),
        (ViewSettings, {"image_size": None}),
        (ViewSettings, {"folds": 2.5}),
        (ViewSettings, {"jitter": (0.1, 0.2)}),
        (DaliSettings, {"part": "many"}),
        (IBOTMasks, {"pred_ratio": "0.3"}),
    ],
)
@pytest.mark.untyped
def test_the_loaders_settings(kind: Any, wrong: dict[str, Any]):
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is "):
        kind(**wrong)


@pytest.mark.untyped
def test_lists_are_as_good_as_tuples():
    assert View(scale=[0.2, 1]) == View(scale=(0.2, 1.0))  # pyright: ignore[reportArgumentType]
    assert hash(IBOTMasks(pred_ratio=[0, 0.3], pred_ratio_var=[0, 0.2]))
