"""Sources and targets in a store: the bytes of the local ones, exactly once, and what cannot be is refused."""

import json
import tarfile
from pathlib import Path

import pytest

from fastpmae_loaders import UserError
from fastpmae_loaders.stores.address import Address, parse_address
from fastpmae_loaders.stores.client import Store
from fastpmae_loaders.write.finish import finish_set
from fastpmae_loaders.write.images import ImageSettings
from fastpmae_loaders.write.plan import plan_set
from fastpmae_loaders.write.sets import write_set
from fastpmae_loaders.write.write import write_beton
from tests.made import write_tree
from tests.stores import BUCKET, put_folder


def contents(address: Address) -> dict[str, bytes]:
    store = Store(address)
    return {key.removeprefix(address.key + "/"): bytes(store.read(key)) for key, _ in store.files(address.key)}


def of_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree", 14)


@pytest.fixture
def tars(tmp_path: Path, tree: Path) -> Path:
    (tmp_path / "tars").mkdir()
    paths = sorted(tree.rglob("*.jpg"))
    for number in range(3):
        with tarfile.open(tmp_path / "tars" / f"{number}.tar", "w") as archive:
            for path in paths[number::3]:
                archive.add(path, f"{path.stem}.jpg")
    return tmp_path / "tars"


def left_here(tmp_path: Path) -> list[Path]:
    """Files with contents that the writer left in its folders of this machine."""
    found = [*(tmp_path / "caches").rglob("writing/**/*"), *(tmp_path / "caches").rglob("sources/**/*")]
    return [path for path in found if path.is_file() and path.stat().st_size]


@pytest.mark.parametrize("kind", ["tree", "tars"])
def test_a_file_from_a_store_to_a_store_has_the_local_bytes(kind, place, tmp_path, request):
    source = request.getfixturevalue(kind)
    put_folder(source, place / "raw")
    local = write_beton(source, tmp_path / "local.beton", workers=1)
    there = write_beton(str(place / "raw"), str(place / "out" / "there.beton"), workers=1)
    assert str(there.path) == str(place / "out" / "there.beton")
    assert contents(place / "out") == {"there.beton": local.path.read_bytes() if isinstance(local.path, Path) else b""}
    assert left_here(tmp_path) == []
    with pytest.raises(UserError, match="exists already; --force replaces it"):
        write_beton(source, str(place / "out" / "there.beton"), workers=1)


@pytest.mark.parametrize("kind", ["tree", "tars"])
def test_a_set_from_a_store_to_a_store_has_the_local_bytes_and_is_written_once(kind, place, tmp_path, request):
    source = request.getfixturevalue(kind)
    put_folder(source, place / "raw")
    write_set(source, tmp_path / "local", 4, workers=1)
    for part in ((0, 2), (1, 2)):
        assert write_set(str(place / "raw"), str(place / "set"), 4, part=part, workers=1) is None
    finish_set(str(place / "set"))
    assert contents(place / "set") == of_folder(tmp_path / "local")
    assert left_here(tmp_path) == []
    before = {name: Store(place).stat(f"{place.key}/set/{name}") for name in ("part-00000.beton", "part-00003.beton")}
    written = write_set(str(place / "raw"), str(place / "set"), 4, workers=1)
    assert written is not None
    assert written.index.images == 14
    assert before == {name: Store(place).stat(f"{place.key}/set/{name}") for name in before}
    assert json.loads(contents(place / "set")["index.json"])["images"] == 14


def test_a_tar_that_grows_in_a_store_between_two_parts_is_told(tars, tree, place):
    put_folder(tars, place / "raw")
    assert write_set(str(place / "raw"), str(place / "set"), 4, part=(0, 2), workers=1) is None
    plan = plan_set(str(place / "raw"), 4, ImageSettings())
    with tarfile.open(tars / "2.tar", "a") as archive:
        archive.add(next(tree.rglob("*.jpg")), "more.jpg")
    put_folder(tars, place / "raw")
    with pytest.raises(UserError, match="of a source with other files"):
        write_set(str(place / "raw"), str(place / "set"), 4, part=(1, 2), workers=1)
    with pytest.raises(UserError, match=rf"^{place}/raw/2.tar has changed since the set was begun"):
        plan.part(3).list()


def test_one_tar_in_a_store_is_a_source(tars, place, tmp_path):
    put_folder(tars, place / "raw")
    local = write_beton(tars / "1.tar", tmp_path / "local.beton", workers=1)
    write_beton(str(place / "raw" / "1.tar"), tmp_path / "there.beton", workers=1)
    assert isinstance(local.path, Path)
    assert (tmp_path / "there.beton").read_bytes() == local.path.read_bytes()


def test_what_cannot_be_is_refused(tree, place, tmp_path):
    put_folder(tree, place / "raw")
    write_set(tree, str(place / "set"), 2, workers=1)
    for source, out, words in (
        (place / "nothing", tmp_path / "x.beton", "does not exist, or holds no files"),
        (
            place / "set",
            tmp_path / "x.beton",
            f"{place}/set holds no images, but .beton files such as part-0",
        ),
        (tree, Address("s3", BUCKET), "names a bucket and no file"),
        (tree, parse_address("https://example.org/x.beton"), "can only be read from"),
    ):
        with pytest.raises(UserError, match=words):
            write_beton(source, out, workers=1)
    with pytest.raises(UserError, match="lie in each other"):
        write_set(str(place / "raw"), str(place / "raw" / "set"), 2, workers=1)
    with pytest.raises(UserError, match="holds other files, such as"):
        write_set(tree, str(place / "raw"), 2, workers=1)


def test_a_list_of_bad_images_is_that_of_the_file_beside_it(place, tree, tmp_path):
    (tree / "class_0" / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    out = str(place / "out" / "a.beton")
    write_beton(tree, out, workers=1, skip_bad=True)
    assert sorted(contents(place / "out")) == ["a.beton", "a.beton.bad.txt"]
    Store(place).delete(f"{place.key}/out/a.beton")
    with pytest.raises(UserError, match=r"a\.beton\.bad\.txt exists already; --force replaces it"):
        write_beton(tree, out, workers=1, skip_bad=True)
    (tree / "class_0" / "broken.jpg").unlink()
    write_beton(tree, out, workers=1, force=True)
    assert sorted(contents(place / "out")) == ["a.beton"]
