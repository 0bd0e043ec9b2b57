"""The index of a set: what it says comes back, and whatever a stranger wrote into it is refused by one sentence."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from fastpmae_loaders.errors import BetonError
from fastpmae_loaders.sources.beton import Beton
from fastpmae_loaders.sources.set_index import SetIndex, Shard, read_index, shard_from, shard_of

DIGEST = "sha256:" + "0123456789abcdef" * 4
TWO = SetIndex(
    (
        Shard("part-00000.beton", 100, 1 << 23, 1 << 21, 90, 80, DIGEST, (60, 40)),
        Shard("part-00001.beton", 99, 1 << 22, 1 << 21, 70, 65535, DIGEST),
    ),
    ("a cat", "Straße"),
)


def test_what_is_written_is_read_back():
    text = TWO.to_json()
    found = read_index(text.encode())
    assert found == TWO
    assert found.images == 199
    assert [np.asarray(shard.pages).tolist() for shard in found.shards] == [[60, 40], []]
    assert found.to_json() == text


def test_the_text_is_json_with_what_the_format_promises():
    found = json.loads(TWO.to_json())
    assert (found["format"], found["version"], found["images"]) == ("fastpmae-set", 1, 199)
    assert found["classes"] == ["a cat", "Straße"]
    assert found["shards"][1] == {
        "name": "part-00001.beton",
        "images": 99,
        "bytes": 1 << 22,
        "page_size": 1 << 21,
        "height": 70,
        "width": 65535,
        "digest": DIGEST,
    }
    assert list(found) == sorted(found)
    assert TWO.to_json().splitlines()[-1].endswith("}")
    assert TWO.to_json().count("\n\n") == 0


def test_classes_may_be_unknown():
    assert read_index(SetIndex(TWO.shards).to_json().encode()).classes is None


def changed(**values) -> bytes:
    return json.dumps(json.loads(TWO.to_json()) | values).encode()


def changed_part(**values) -> bytes:
    found = json.loads(TWO.to_json())
    found["shards"][0] |= values
    return json.dumps(found).encode()


def without(*names: str) -> bytes:
    return json.dumps({name: value for name, value in json.loads(TWO.to_json()).items() if name not in names}).encode()


TWICE = json.loads(TWO.to_json())["shards"]
BAD = {
    "empty": (b"", "no index of a set"),
    "no JSON": (b"\x89PNG\r\n", "no index of a set"),
    "a list": (b"[]", '"format"'),
    "nested deeply": (b"[" * 200_000, "no index of a set"),
    "a number of many digits": (b'{"format": ' + b"9" * 10_000 + b"}", "no index of a set"),
    "two of one key": (b'{"format": 1, "format": 2}', "same key twice"),
    "another format": (changed(format="webdataset"), '"format"'),
    "a later version": (changed(version=2), "update fastpmae"),
    "a version that is true": (changed(version=True), "its version is true"),
    "no version": (without("version"), "its version is null"),
    "no parts": (without("shards"), '"shards"'),
    "an empty list of parts": (changed(shards=[]), '"shards"'),
    "a part that is a text": (changed(shards=["part-00000.beton"]), "should be an object"),
    "a total that is wrong": (changed(images=200), "its parts have 199"),
    "a total that is no number": (changed(images="199"), '"images"'),
    "a part twice": (changed(shards=[TWICE[0], TWICE[0]], images=200), "named twice"),
    "a part twice but for its case": (
        changed(shards=[TWICE[0], TWICE[0] | {"name": "PART-00000.beton"}], images=200),
        "named twice",
    ),
    "classes that are a text": (changed(classes="cat"), '"classes"'),
    "classes that are numbers": (changed(classes=[1, 2]), '"classes"'),
    "a folder in a name": (changed_part(name="../part-00000.beton"), "no folder and no drive"),
    "a Windows folder in a name": (changed_part(name="x\\part.beton"), "no folder and no drive"),
    "a drive in a name": (changed_part(name="C:part.beton"), "no folder and no drive"),
    "an absolute name": (changed_part(name="/etc/passwd.beton"), "no folder and no drive"),
    "two dots": (changed_part(name=".."), "does not begin with a dot"),
    "no name": (changed_part(name=""), "ends in .beton"),
    "the index itself": (changed_part(name="index.json"), "ends in .beton"),
    "an escape in a name": (changed_part(name="\x1b[2J.beton"), "printable"),
    "a NUL in a name": (changed_part(name="a\0.beton"), "printable"),
    "a surrogate in a name": (changed_part(name="\ud800.beton"), "printable"),
    "a long name": (changed_part(name="x" * 300 + ".beton"), "255 bytes"),
    "no images": (changed_part(images=0), '"images"'),
    "fewer than none": (changed_part(images=-1), '"images"'),
    "more images than bytes": (changed_part(images=1 << 23), '"images"'),
    "a huge count": (changed_part(images=10**300), '"images"'),
    "half an image": (changed_part(images=99.5), "whole number"),
    "true images": (changed_part(images=True), "whole number"),
    "null": (changed_part(bytes=None), "whole number"),
    "too many bytes": (changed_part(bytes=1 << 60), '"bytes"'),
    "a page size of 3": (changed_part(page_size=3), "no power of two"),
    "a page size of 0": (changed_part(page_size=0), '"page_size"'),
    "a side of 0": (changed_part(height=0), '"height"'),
    "a side above the format's": (changed_part(width=65536), '"width"'),
    "no digest": (changed_part(digest=""), "digest"),
    "another digest": (changed_part(digest="md5:" + "0" * 32), "digest"),
    "a digest with a line behind it": (changed_part(digest=DIGEST + "\n"), "digest"),
    "pages that are no list": (changed_part(pages=100), '"pages"'),
    "no pages": (changed_part(pages=[]), '"pages"'),
    "pages of halves": (changed_part(pages=[99.5, 0.5]), '"pages"'),
    "an empty page": (changed_part(pages=[100, 0]), '"pages"'),
    "a page of fewer than none": (changed_part(pages=[101, -1]), '"pages"'),
    "pages that do not add up": (changed_part(pages=[60, 41]), '"pages"'),
    "more pages than bytes": (changed_part(pages=[1] * 100), "more than its"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_one_sentence(case: str):
    blob, said = BAD[case]
    with pytest.raises(BetonError) as error:
        read_index(blob, "photos/index.json")
    text = str(error.value)
    assert said in text
    assert text.startswith("photos/index.json")
    assert text.isprintable()
    assert len(text) < 500


@pytest.mark.parametrize("name", ["name", "images", "bytes", "page_size", "height", "width", "digest"])
def test_a_field_that_is_missing_is_named(name: str):
    found = json.loads(TWO.to_json())
    del found["shards"][1][name]
    with pytest.raises(BetonError, match=f'part 1 has no "{name}"'):
        read_index(json.dumps(found).encode())


def test_damage_anywhere_is_an_index_or_a_sentence():
    text = TWO.to_json().encode()
    noise = np.random.default_rng(0)
    refused = []
    for _ in range(400):
        blob = bytearray(text)
        for place in noise.integers(0, len(blob), 3):
            blob[place] = noise.integers(0, 256)
        try:
            read_index(bytes(blob))
        except BetonError as error:
            refused.append(str(error))
    assert len(refused) > 300
    assert all(map(str.isprintable, refused))


@pytest.mark.parametrize(("most", "dtype"), [(84, np.uint8), (300, np.uint16), (70_000, np.uint32)])
def test_a_page_takes_as_many_bytes_as_its_images_need(most: int, dtype: type):
    counts = [most, 1, most]
    shard = Shard("a.beton", sum(counts), 1 << 30, 1 << 23, 5, 5, "sha256:" + 64 * "0", counts)
    (read,) = read_index(SetIndex((shard,)).to_json().encode()).shards
    for kept in (shard, read):
        assert np.asarray(kept.pages).dtype == dtype
        assert np.asarray(kept.pages).tolist() == counts


def test_a_file_that_is_missing_or_a_folder(tmp_path: Path):
    for path in (tmp_path / "index.json", tmp_path):
        with pytest.raises(BetonError, match="cannot be read"):
            read_index(path)


def test_a_part_is_what_its_file_is(mixed: Path):
    shard, beton = shard_of(mixed), Beton(mixed)
    assert (shard.name, shard.images, shard.bytes) == ("mixed.beton", 23, mixed.stat().st_size)
    assert (shard.page_size, shard.height, shard.width) == (1 << 15, beton.height.max(), beton.width.max())
    assert shard.digest == "sha256:" + hashlib.sha256(mixed.read_bytes()).hexdigest()
    assert np.asarray(shard.pages).tolist() == np.unique(beton.page_of, return_counts=True)[1].tolist()
    assert len(np.asarray(shard.pages)) > 1
    assert shard_from(json.loads(json.dumps(shard.entry()))) == shard


def test_a_file_of_that_name_is_no_part(mixed: Path, tmp_path: Path):
    hidden = tmp_path / ".hidden.beton"
    hidden.write_bytes(mixed.read_bytes())
    with pytest.raises(BetonError, match="cannot be a part of a set"):
        shard_of(hidden)
