"""Hostile parquet and arrow files: each costs itself, whatever the library does with it."""

import io
import mmap
import os
import signal
import struct
from pathlib import Path
from typing import Any

import pytest

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.sources.beton import PIXEL_LIMIT
from fastpmae_loaders.write.hf_datasets import list_tables
from fastpmae_loaders.write.sources import SourceSettings, find_images, read_item
from fastpmae_loaders.write.table_reader import lister
from fastpmae_loaders.write.workers import WorkerPool
from tests.made import made_image

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet  # noqa: E402, F401 - loads the submodule

KIND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    made_image(seed, 40, 30).save(buffer, "JPEG")
    return buffer.getvalue()


def arrow(table: Any, path: Path) -> Path:
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def reasons(path: Path, **settings: Any) -> list[str]:
    return [item.where[0] for item in find_images(path, SourceSettings(**settings)).items if item.kind == "bad"]


@pytest.mark.parametrize("column", ["label", "image"])
@pytest.mark.parametrize(
    "offsets", [(0x40000000, 0x40000010, 16, 24, 32), (0, 0x7FFFFFFF, 16, 24, 32), (0, -5, 16, 24, 32)]
)
def test_offsets_that_lie(tmp_path: Path, column: str, offsets: tuple[int, ...]) -> None:
    """They were followed wherever they pointed: a read out of bounds, or the end of the process."""
    images = pa.array([b"image" if column == "label" else b"8 bytes."] * 4, pa.binary())
    table = pa.table({"image": images, "label": ["MARKER__"] * 4 if column == "label" else [1, 2, 3, 4]})
    good = arrow(table, tmp_path / "a.arrow").read_bytes()
    at = good.index(struct.pack("<5i", 0, 8, 16, 24, 32))
    (tmp_path / "a.arrow").write_bytes(good[:at] + struct.pack("<5i", *offsets) + good[at + 20 :])
    if column == "label":
        (reason,) = reasons(tmp_path)
        assert "cannot be read: ArrowInvalid" in reason
        return
    for item in find_images(tmp_path).items:
        with pytest.raises(UserError, match="cannot be read: In chunk 0"):
            read_item(item)


def test_indices_beyond_a_dictionary(tmp_path: Path) -> None:
    labels = pa.DictionaryArray.from_arrays(pa.array([0, 1, 1000000, 0], pa.int32()), ["cat", "dog"], safe=False)
    arrow(pa.table({"image": [b"x" * 9] * 4, "label": labels}), tmp_path / "a.arrow")
    (reason,) = reasons(tmp_path, label_column="label")
    assert "cannot be read" in reason


def test_rows_that_cannot_be(tmp_path: Path) -> None:
    """A column of nothing has any length in a few bytes."""
    arrow(pa.table({"image": pa.nulls(10**7), "label": pa.nulls(10**7)}), tmp_path / "a.arrow")
    (reason,) = reasons(tmp_path, image_column="image")
    assert "10,000,000 rows" in reason


def test_a_label_without_end(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"image": [b"x"] * 3, "label": ["a" * 10**6] * 3}), tmp_path / "a.parquet")
    (reason,) = reasons(tmp_path)
    assert "one of its labels has 1,000,000 bytes" in reason


@pytest.mark.slow
def test_labels_of_other_types(tmp_path: Path) -> None:
    table = pa.table({"image": [picture()] * 3, "label": [[1], [2], [3]], "\x1b[31m": [1, 2, 3]})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    assert [item.label for item in find_images(tmp_path).items] == [-1] * 3
    with pytest.raises(UserError, match=r"'label' holds list<.*and labels are integers or words"):
        find_images(tmp_path, SourceSettings(label_column="label"))
    with pytest.raises(UserError, match="no column 'nothing'") as caught:
        find_images(tmp_path, SourceSettings(image_column="nothing"))
    assert str(caught.value).isprintable()
    pa.parquet.write_table(pa.table([[picture()], [1], [2]], names=["image", "label", "label"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="several columns named 'label'"):
        find_images(tmp_path)
    words = pa.array(["b", None, "a"]).dictionary_encode()
    pa.parquet.write_table(pa.table({"image": [picture()] * 3, "label": words}), tmp_path / "a.parquet")
    listing = find_images(tmp_path, SourceSettings(label_column="label"))
    assert [item.label for item in listing.items] == [1, -1, 0]


def test_rows_that_name_files(tmp_path: Path) -> None:
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "images" / "a.jpg").write_bytes(picture(3))
    (tmp_path / "secret.jpg").write_bytes(picture(4))
    os.mkfifo(tmp_path / "set" / "pipe")
    named = ["images/a.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "/dev/zero", "pipe", "a\0b", "none.jpg"]
    rows = pa.table({"image": pa.array([{"bytes": None, "path": name} for name in named], KIND)})
    pa.parquet.write_table(rows, tmp_path / "set" / "a.parquet")
    first, *rest = find_images(tmp_path / "set", SourceSettings(kind="hf")).items
    assert read_item(first) == picture(3)
    for item, says in zip(rest, ("outside", "outside", "outside", "regular", "no path", "No such file"), strict=True):
        with pytest.raises(UserError, match=says):
            read_item(item)


def test_a_file_that_ends_its_process_costs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library crashes; what stands before and behind is listed."""
    for name in "abc":
        pa.parquet.write_table(pa.table({"image": [picture()], "label": [1]}), tmp_path / f"{name}.parquet")
    monkeypatch.setattr(
        "fastpmae_loaders.write.hf_datasets._TASK", "tests.loaders.write.test_table_reader:crashing_lister"
    )
    listing = list_tables([str(tmp_path / f"{name}.parquet") for name in "abc"], None, None)
    assert [(item.kind, Path(item.path).name) for item in listing.items] == [
        ("parquet", "a.parquet"), ("parquet", "c.parquet"), ("bad", "b.parquet"),
    ]  # fmt: skip
    assert listing.items[2].where == ("cannot be read: the decoder crashed (SIGSEGV)",)


def crashing_lister(*columns: str | None) -> Any:
    look = lister(*columns)

    def listed(place: int, path: str) -> Any:
        if path.endswith("b.parquet"):
            signal.raise_signal(signal.SIGSEGV)
        return look(place, path)

    return listed


def test_memory_of_a_small_file_is_limited(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"image": [b"x"]}), tmp_path / "a.parquet")
    with WorkerPool("tests.loaders.write.test_table_reader:greedy", (), 1, 60.0) as pool:
        ((_, result),) = list(pool.in_order([str(tmp_path / "a.parquet")]))
    assert "memory" in result.reason


@pytest.mark.slow
def test_memory_follows_the_pixels_that_are_asked_for(tmp_path: Path) -> None:
    """An image of 2^28 pixels more than are taken by default may have 4 GiB more; memory is asked for, not filled."""
    pa.parquet.write_table(pa.table({"image": [b"x"]}), tmp_path / "a.parquet")
    for more in (2**28, 2**80):
        with WorkerPool("tests.loaders.write.test_table_reader:greedy", (PIXEL_LIMIT + more,), 1, 60.0) as pool:
            ((_, result),) = list(pool.in_order([str(tmp_path / "a.parquet")]))
        assert result == 5 << 30


def greedy(max_pixels: int = PIXEL_LIMIT) -> Any:
    from fastpmae_loaders.write.table_reader import confine

    def take(place: int, path: str) -> int:
        confine(path, max_pixels)
        with mmap.mmap(-1, 5 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            return len(memory)

    return take
