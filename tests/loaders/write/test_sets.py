"""Sets of parts: the same bytes whoever writes them, what is there is kept, and what does not fit is refused."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastpmae_loaders import open_samples
from fastpmae_loaders.errors import BetonError, UserError
from fastpmae_loaders.sources.beton import Beton
from fastpmae_loaders.sources.set_index import read_index
from fastpmae_loaders.write.finish import finish_set
from fastpmae_loaders.write.images import ImageSettings
from fastpmae_loaders.write.manifests import HASHES_MAGIC
from fastpmae_loaders.write.plan import plan_set
from fastpmae_loaders.write.sets import share, write_set
from fastpmae_loaders.write.write import BadImages, write_beton
from tests.made import REPOSITORY, made_image, write_tree

PATHS = [str(REPOSITORY / folder) for folder in ("", "kernels", "loaders")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "COLUMNS": "100"}
PROGRAM = [sys.executable, "-m", "fastpmae_loaders.write.cli"]


def command(*arguments: object) -> subprocess.CompletedProcess:
    words = [*PROGRAM, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    made_image(seed, 60 + seed % 5, 50).save(buffer, "JPEG")
    return buffer.getvalue()


def shards(folder: Path, counts: list[int], label: str = "{number}") -> Path:
    """Tar shards of so many images each, with labels in .cls files."""
    folder.mkdir(exist_ok=True)
    number = 0
    for place, count in enumerate(counts):
        with tarfile.open(folder / f"{place:03d}.tar", "w") as archive:
            for _ in range(count):
                for suffix, content in (("cls", label.format(number=number % 5).encode()), ("jpg", jpeg(number))):
                    member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                number += 1
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents(folder).items()}


def payloads(folder: Path) -> list[tuple[bytes, str | int]]:
    """What is stored of each image of a set, with its label: a word where it has one."""
    found = []
    for shard in read_index(folder / "index.json").shards:
        beton = Beton(folder / shard.name)
        names = beton.class_names
        for index in range(len(beton)):
            label = int(beton.label[index])
            found.append((beton.payload(index).tobytes(), label if names is None or label < 0 else names[label]))
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("source") / "tree", 21)


@pytest.fixture(scope="module")
def whole(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set of the tree by one process, which the others are compared with."""
    out = tmp_path_factory.mktemp("set") / "set"
    write_set(tree, out, 4, workers=1)
    return out


def test_a_set_holds_what_one_file_holds(tree: Path, whole: Path, tmp_path: Path) -> None:
    write_beton(tree, tmp_path / "one.beton", workers=1)
    one, index = Beton(tmp_path / "one.beton"), read_index(whole / "index.json")
    assert index.classes == ("class_0", "class_1", "class_2")
    assert [shard.images for shard in index.shards] == [5, 5, 5, 6]
    expected = [(one.payload(index).tobytes(), f"class_{one.label[index]}") for index in range(len(one))]
    assert payloads(whole) == expected
    hashes = b"".join((whole / f"part-0000{part}.hashes").read_bytes()[len(HASHES_MAGIC) :] for part in range(4))
    assert hashes == b"".join(hashlib.blake2b(payload, digest_size=16).digest() for payload, _ in expected)
    for shard in index.shards:
        content = (whole / shard.name).read_bytes()
        assert (shard.bytes, shard.digest) == (len(content), f"sha256:{hashlib.sha256(content).hexdigest()}")


def test_each_image_is_stored_alike_in_one_file_and_in_parts(tree: Path, tmp_path: Path) -> None:
    """--mode proportion draws by an image's name: also where a part knows nothing of the images before its own."""
    for name, source in (("folder", tree), ("tar", shards(tmp_path / "tars", [3, 9, 1, 6]))):
        drawn = {"mode": "proportion", "proportion": 0.4, "seed": 3, "workers": 1}
        write_beton(source, tmp_path / f"{name}.beton", **drawn)
        one = Beton(tmp_path / f"{name}.beton").mode.tolist()
        assert set(one) == {0, 1}
        for parts in (2, 5):
            out = tmp_path / f"{name}-{parts}"
            write_set(source, out, parts, **drawn)
            stored = [Beton(out / shard.name) for shard in read_index(out / "index.json").shards]
            assert [mode for part in stored for mode in part.mode.tolist()] == one
    # wherever the source lies, and whatever part of it is taken
    shutil.copytree(tree, tmp_path / "elsewhere")
    write_beton(tmp_path / "elsewhere", tmp_path / "again.beton", **drawn, limit=7)
    some = Beton(tmp_path / "again.beton").mode.tolist()
    assert some == [Beton(tmp_path / "folder.beton").mode.tolist()[int((place + 0.5) * 3)] for place in range(7)]


def test_three_processes_and_a_finish_write_the_same_bytes(tree: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    running = [
        subprocess.Popen(
            [*PROGRAM, tree, out, "--shards", "4", "--part", f"{part}/3", "--workers", "1"],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in (2, 0, 1)
    ]
    for process in running:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert f"fastpmae-write {out} --finish" in output
    assert not (out / "index.json").exists()
    done = command(out, "--finish")
    assert (done.returncode, "21 images in 4 parts" in done.stdout) == (0, True), done.stderr
    assert contents(out) == contents(whole)


def test_what_is_there_is_kept_and_what_is_missing_written(tree: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(whole, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "part-00001.json").unlink()
    (out / "part-00002.beton").write_bytes(b"cut short")
    (out / "part-00003.hashes").unlink()
    with pytest.raises(
        UserError, match=r"3 of 4 parts are missing or not whole: part-00001.beton, part-00002.beton, part-00003"
    ):
        finish_set(out)
    write_set(tree, out, 4, workers=1)
    assert contents(out) == contents(whole)
    assert (out / "part-00000.beton").stat().st_mtime_ns == before["part-00000.beton"]
    assert (out / "part-00000.json").stat().st_mtime_ns == before["part-00000.json"]


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_shards_are_cut_anywhere_and_nothing_is_lost(tmp_path: Path, parts: int) -> None:
    source = shards(tmp_path / "tars", [4, 0, 3, 1, 2])
    write_set(source, tmp_path / "set", parts, workers=1)
    assert payloads(tmp_path / "set") == [(jpeg(number), number % 5) for number in range(10)]
    assert read_index(tmp_path / "set" / "index.json").classes is None


def test_words_get_one_vocabulary(tmp_path: Path) -> None:
    source = shards(tmp_path / "tars", [2, 2, 3], "kind {number}")
    written = write_set(source, tmp_path / "set", 3, workers=1)
    assert written is not None
    assert written.index.classes == tuple(f"kind {number}" for number in range(5))
    assert payloads(tmp_path / "set") == [(jpeg(number), f"kind {number % 5}") for number in range(7)]
    # and of one part they are those of the file that is no set
    one = write_set(source, tmp_path / "one", 1, workers=1)
    assert one is not None
    assert one.index.classes == written.index.classes


def test_words_beside_numbers_are_refused_at_the_end(tmp_path: Path) -> None:
    source = shards(tmp_path / "tars", [2], "cat {number}")
    shutil.move(shards(tmp_path / "more", [2]) / "000.tar", source / "001.tar")
    with pytest.raises(UserError, match=r"words in part-00000.beton and numbers in part-00001.beton"):
        write_set(source, tmp_path / "set", 2, workers=1)


def test_a_part_of_bad_images(tree: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "tree", tmp_path / "set"
    shutil.copytree(tree, source)
    (source / "class_1" / "0001.jpg").write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(BadImages, match=r"1 image cannot be stored, so 1 of 7 parts were not written") as caught:
        write_set(source, out, 7, workers=1)
    assert [Path(name).name for name, _ in caught.value.bad] == ["0001.jpg"]
    assert sorted(out.glob("part-*.json")) == [out / f"part-{part:05d}.json" for part in (0, 1, 3, 4, 5, 6)]
    written = write_set(source, out, 7, workers=1, skip_bad=True)
    assert written is not None
    assert (written.index.images, len(written.bad)) == (20, 1)
    assert (out / "bad.txt").read_text().startswith(f"{source}/class_1/0001.jpg\t")
    # a part in which nothing can be stored has no file, and the index leaves it out
    for path in (source / "class_1").iterdir():
        path.write_bytes(b"\xff\xd8\xff no picture")
    written = write_set(source, tmp_path / "other", 7, workers=1, skip_bad=True)
    assert written is not None
    assert [shard.name for shard in written.index.shards] == [f"part-{part:05d}.beton" for part in (0, 1, 2, 4, 5, 6)]
    assert written.index.images == 14


def test_an_image_that_ends_its_process_costs_itself(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's decoder that dies at one image: as one that crashes, or takes all memory."""
    monkeypatch.setattr(
        "fastpmae_loaders.write.parts.worker_pool",
        lambda settings, part, workers, tell: _pool("tests.programs.deadly_converter:deadly", settings, workers, tell),
    )
    monkeypatch.setattr(
        "fastpmae_loaders.write.sets.worker_pool",
        lambda settings, part, workers, tell: _pool("tests.programs.deadly_converter:deadly", settings, workers, tell),
    )
    written = write_set(tree, tmp_path / "set", 4, workers=1, skip_bad=True)
    assert written is not None
    assert [(Path(name).name, "SIGSEGV" in reason) for name, reason in written.bad] == [("0007.jpg", True)]
    assert written.index.images == 20


def _pool(task, settings, workers, tell):
    from fastpmae_loaders.write.workers import WorkerPool

    return WorkerPool(task, (settings.images,), workers, settings.timeout, tell=tell)


def test_another_plan_is_refused_and_replaced_with_force(tree: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(whole, out)
    others: list[dict[str, Any]] = [{"shards": 5}, {"shards": 4, "quality": 90}, {"shards": 4, "limit": 8}]
    for wrong in others:
        with pytest.raises(UserError, match="with other settings or of a source with other files"):
            write_set(tree, out, workers=1, **wrong)
    more = tmp_path / "tree"
    shutil.copytree(tree, more)
    made_image(99, 50, 50).save(more / "class_0" / "more.jpg")
    with pytest.raises(UserError, match="with other settings or of a source with other files"):
        write_set(more, out, 4, workers=1)
    assert contents(out) == contents(whole)
    written = write_set(more, out, 3, workers=1, force=True)
    assert written is not None
    assert written.index.images == 22
    assert len(payloads(out)) == 22
    # nor does it matter where the source lies
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tree, elsewhere)
    assert write_set(elsewhere, tmp_path / "same", 4, workers=1) is not None
    assert digests(tmp_path / "same") == digests(whole)


def test_a_set_without_its_plan_is_nobodys_to_overwrite(tree: Path, whole: Path, tmp_path: Path) -> None:
    """Parts and an index are all that a reader needs, and so all that may have been copied."""
    out = tmp_path / "published"
    out.mkdir()
    for path in whole.iterdir():
        if path.suffix == ".beton" or path.name == "index.json":
            shutil.copy(path, out)
    for name in ("plan.json", "part-00001.json"):
        before = contents(out)
        with pytest.raises(UserError, match=r"of which no plan\.json tells that it is this one .*--force"):
            write_set(tree, out, 4, workers=1)
        assert contents(out) == before
        shutil.copy(whole / name, out)
        (out / "plan.json").unlink(missing_ok=True)
    for lost, more in (("plan.json", {"shards": 2}), ("plan.json", {"shards": 4, "quality": 90})):
        other = tmp_path / f"lost-{len(more)}"
        shutil.copytree(whole, other)
        (other / lost).unlink()
        before = contents(other)
        with pytest.raises(UserError, match="holds a set, or parts of one, of which no"):
            write_set(tree, other, workers=1, **more)  # pyright: ignore[reportArgumentType]
        assert contents(other) == before
        assert write_set(tree, other, 4, workers=1) is not None
        assert contents(other) == contents(whole)
    assert write_set(tree, out, 4, workers=1, force=True) is not None
    assert contents(out) == contents(whole)


def test_a_set_of_fewer_parts_leaves_none_of_the_others(tree: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(whole, out)
    assert write_set(tree, out, 2, workers=1, force=True) is not None
    assert sorted(contents(out)) == sorted(
        ["plan.json", "index.json", *(f"part-0000{i}.{kind}" for i in range(2) for kind in ("beton", "hashes", "json"))]
    )


def test_a_set_in_its_source_is_refused_from_the_first_part_on(tree: Path, tmp_path: Path) -> None:
    source = tmp_path / "tree"
    shutil.copytree(tree, source)
    for part in ((0, 2), (1, 2)):
        with pytest.raises(UserError, match="lie in each other"):
            write_set(source, source / "set", 2, part=part, workers=1)
    assert not (source / "set").exists()


def test_parts_without_an_index_say_what_is_missing(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(whole, out)
    (out / "index.json").unlink()
    with pytest.raises(
        UserError, match=r"set has parts of a set and no index\.json: end it by fastpmae-write .* --finish"
    ):
        open_samples(out)


def test_an_index_is_not_believed_that_asks_for_all_memory(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(whole, out)
    index = json.loads((out / "index.json").read_text())
    more = 7_000_000_000_000 - index["shards"][1]["images"]
    index["shards"][1] |= {"images": 7_000_000_000_000, "bytes": 1 << 48}
    index["shards"][1].pop("pages", None)
    index["images"] += more
    (out / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        BetonError, match=r"part-00001\.beton: its bytes: [0-9,]+, and the index says 281,474,976,710,656"
    ):
        open_samples(out)


def test_folders_that_are_refused(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    (tmp_path / "file").write_text("a file")
    for out, says in [
        (tmp_path / "mine", "holds other files, such as thesis.txt"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "missing" / "set", "does not exist; make it first"),
        (tree, "lie in each other"),
        (tree / "class_0", "lie in each other"),
    ]:
        with pytest.raises(UserError, match=says):
            write_set(tree, out, 2, workers=1)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"
    for parts, says in [(0, "between 1 and"), (22, "21 images do not fill"), (10**9, "between 1 and")]:
        with pytest.raises(UserError, match=says):
            write_set(tree, tmp_path / "set", parts, workers=1)
    assert not (tmp_path / "set").exists()


def test_the_command_line(tree: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    for words, says in [
        ((tree, out, "--part", "0/3"), "say with --shards"),
        ((tree, out, "--shards", 4, "--on", "spark"), "expected local, ray or ray://HEAD"),
        ((tree, out, "--shards", 4, "--part", "0/4", "--deduplicate"), "give --deduplicate to --finish"),
        ((tree, out, "--shards", 4, "--part", "3/3"), "--part is 3/3"),
        ((tree, out, "--shards", 4, "--part", "one"), "expected I/N"),
        ((tree, out, "--finish"), "--finish takes the folder"),
        ((tmp_path, "--finish"), "no plan.json"),
        (("--check", out, "--shards", 4), "--check and --to-jpeg"),
    ]:
        refused = command(*words)
        assert (refused.returncode, says in refused.stderr) == (2, True), refused.stderr
        assert "Traceback" not in refused.stderr
    assert not out.exists()
    done = command(tree, out, "--shards", 4, "--workers", 1)
    assert (done.returncode, done.stdout.splitlines()[0].endswith("KB") or "MB" in done.stdout) == (0, True)
    assert "3 classes: class_0, class_1, class_2" in done.stdout
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not written by fastpmae-write"),
        (b"[" * 100_000, "not written by fastpmae-write"),
        (b'{"format": "fastpmae-part", "version": 2}', "only one that is read"),
        (b'{"format": "fastpmae-part", "version": 1}', "no manifest of this part"),
        ("number", "no manifest of this part"),
        ("name", "no manifest of this part"),
        ("bad", "no manifest of this part"),
        ("digest", "digest"),
    ],
)
def test_manifests_of_strangers(tree: Path, whole: Path, tmp_path: Path, content: bytes | str, says: str) -> None:
    out = tmp_path / "set"
    shutil.copytree(whole, out)
    manifest = json.loads((out / "part-00002.json").read_bytes())
    if isinstance(content, str):
        change = {"number": {"number": 1}, "name": {}, "bad": {"bad": [["a", 1]]}, "digest": {}}[content]
        if content == "name":
            manifest["shard"]["name"] = "part-00001.beton"
        if content == "digest":
            manifest["shard"]["digest"] = "md5:1"
        content = json.dumps({**manifest, **change}).encode()
    (out / "part-00002.json").write_bytes(content)
    with pytest.raises(UserError, match=says):
        finish_set(out)
    with pytest.raises(UserError, match=says):
        write_set(tree, out, 4, workers=1)
    write_set(tree, out, 4, workers=1, force=True)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("grown", ["between two parts", "after the plan"])
def test_a_tar_that_grows_meanwhile_loses_no_image_in_silence(grown: str, tmp_path: Path) -> None:
    """Each part takes a share of what a tar holds: of another number of images another one."""
    source = shards(tmp_path / "tars", [40, 30])
    plan = plan_set(source, 5, ImageSettings())
    if grown == "between two parts":
        assert write_set(source, tmp_path / "set", 5, workers=1, part=(0, 2)) is None
    assert len(plan.part(4).list().items) == 12
    shards(source, [40, 41])
    if grown == "between two parts":
        with pytest.raises(UserError, match="of a source with other files"):
            write_set(source, tmp_path / "set", 5, workers=1, part=(1, 2))
    assert len(plan.part(0).list().items) == 16
    with pytest.raises(UserError, match=r"1.tar has changed since the set was begun: its parts would lose images"):
        plan.part(4).list()


def test_parts_that_are_kept_are_spoken_of(tree: Path, whole: Path, tmp_path: Path) -> None:
    """An image that was replaced under its name is not seen, so nobody is to think that it was."""
    out = tmp_path / "set"
    shutil.copytree(whole, out)
    again = command(tree, out, "--shards", 4, "--workers", 1)
    assert again.returncode == 0, again.stderr
    said = again.stdout + again.stderr
    assert f"4 of 4 parts were in {out} already, from files of the same names with the same settings, and kept." in said
    (out / "part-00001.json").unlink()
    again = command(tree, out, "--shards", 4, "--workers", 1)
    assert f"3 of 4 parts were in {out} already" in again.stdout + again.stderr


def test_shares_of_the_parts() -> None:
    for parts, processes in [(4096, 64), (10, 3), (3, 10), (1, 1)]:
        numbers = [number for place in range(processes) for number in share(parts, (place, processes))]
        assert numbers == list(range(parts))


def test_a_plan_opens_no_file(tmp_path: Path) -> None:
    """Shards are not opened for it: they may be terabytes, far away."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(100):
        (folder / f"{number:03d}.tar").touch()
    plan = plan_set(folder, 8, ImageSettings())
    taken = [stretch for number in range(8) for stretch in plan.part(number).stretches]
    assert [stretch.name for stretch in plan.part(0).stretches] == [f"{number:03d}.tar" for number in range(13)]
    for count in (1, 7, 50):
        held = np.zeros((100, count), int)
        for stretch in taken:
            held[int(stretch.name[:3])] += [stretch.holds(place, count) for place in range(count)]
        assert (held == 1).all()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_writer_is_finished_by_the_same_command(tmp_path: Path) -> None:
    """Killed in the midst of a part: its scratch goes, what was done stays, and the bytes are those of a quiet run."""
    source = tmp_path / "many"
    source.mkdir()
    for number in range(120):
        made_image(number, 500, 400).save(source / f"{number:04d}.png", compress_level=1)
    write_set(source, tmp_path / "quiet", 3, workers=1)
    out = tmp_path / "set"
    words = [*PROGRAM, str(source), str(out), "--shards", "3", "--workers", "1"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in out.glob(".partial-part-00001.beton-*/part-00001.beton")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(out.glob(".partial-*"))) == 1
    first = (out / "part-00000.beton").stat().st_mtime_ns
    done = command(source, out, "--shards", "3", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(tmp_path / "quiet")
    assert (out / "part-00000.beton").stat().st_mtime_ns == first
