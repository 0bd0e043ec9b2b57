"""What sets and large files cost to open and to order, and how often their pages are read by several nodes.

`python -m benchmarks.bench_sets [--quick] [--json F] [--plot F]`. No image is read. A set is its index alone, made up:
parts of 250,000 images, 84 on a page of 8 MiB, as ImageNet's originals lie. A file is real but for its pixels: header
and tables, and holes where the images would be. A folder's files are empty, and listed as `fastpmae-write` does. Each
is opened in a process of its own, whose peak of memory is compared with what it was before. `open` is what has to be
done until the first batch can be asked for; `a batch` is 4,096 places out of the middle of an epoch. Times are the
processor's, so that what else runs on the machine counts little. The list is the order as it was made before: eight
bytes a sample, sorted.

Pages are counted for an epoch of 1.28 M images in batches of 4,096: a node reads a page when one of its images is asked
for, and has it until it was not asked for over eight batches. 1 is each page read once by one node.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import Row, arguments, finish, make_row, processor_name

IMAGENET = 1_281_167
ON_A_PAGE, PAGE = 84, 8 << 20
PER_PART = 250_000
BATCH = 4096
LARGE = 5_000_000
"""Images above which each size is opened once, and not by FFCV: its dictionaries would take gigabytes."""
KEPT = 8
"""Batches for which a node keeps a page that it was not asked for."""


def made_index(images: int) -> str:
    """The text of an index of so many images."""
    from fastpmae_loaders.sources.set_index import SetIndex, Shard

    def part(number: int) -> Shard:
        count = min(PER_PART, images - number * PER_PART)
        whole, rest = divmod(count, ON_A_PAGE)
        pages = [ON_A_PAGE] * whole + [rest] * (rest > 0)
        size = (len(pages) + 1) * PAGE
        return Shard(f"part-{number:05d}.beton", count, size, PAGE, 500, 500, f"sha256:{number:064x}", pages)

    return SetIndex(tuple(part(number) for number in range(-(-images // PER_PART)))).to_json()


def write_index(path: Path, images: int) -> None:
    """An index of so many images."""
    path.write_text(made_index(images))


def write_hollow(path: Path, images: int) -> None:
    """A .beton whose tables are whole, and whose images are holes in the file."""
    from fastpmae_loaders.sources.beton import DESCRIPTOR, HEADER
    from fastpmae_loaders.sources.tables import ALLOCATION, IMAGE_FIELD, INT_FIELD, metadata_type

    fields = np.zeros(2, DESCRIPTOR)
    for field, (name, kind) in zip(fields, ((b"image", IMAGE_FIELD), (b"label", INT_FIELD)), strict=True):
        field["type_id"] = kind
        field["name"][: len(name)] = list(name)
    records = np.zeros(images, metadata_type([IMAGE_FIELD, INT_FIELD]))
    start = -(-(HEADER.itemsize + fields.nbytes + records.nbytes) // PAGE) * PAGE
    page, place = np.divmod(np.arange(images), ON_A_PAGE)
    pointer = start + page * PAGE + place * (PAGE // ON_A_PAGE)
    records["f0"]["width"], records["f0"]["height"], records["f0"]["data_ptr"] = 500, 375, pointer
    table = np.zeros(images, ALLOCATION)
    table["sample_id"], table["ptr"], table["size"] = np.arange(images), pointer, PAGE // ON_A_PAGE
    end = start + (int(page[-1]) + 1) * PAGE
    with path.open("wb") as file:
        file.write(np.array((2, 2, PAGE, images, end), HEADER).tobytes() + fields.tobytes() + records.tobytes())
        file.seek(end)
        file.write(table.tobytes())


def opened_set(path: str) -> Callable[[int, int], np.ndarray]:
    """Opens a set's index: the first epoch's order, place by place."""
    from fastpmae_loaders.order import PageOrder, Pages
    from fastpmae_loaders.sources.beton_set import BetonSet
    from fastpmae_loaders.sources.set_index import read_index

    samples = BetonSet(read_index(path), Path(path).parent)
    return PageOrder(0, 0, Pages(samples.page_starts)).places


def opened_file(path: str) -> Callable[[int, int], np.ndarray]:
    """Opens one file: the first epoch's order, place by place."""
    from fastpmae_loaders.order import PageOrder, pages_of
    from fastpmae_loaders.sources.beton import Beton

    return PageOrder(0, 0, pages_of(Beton(path).page_of)).places


def opened_list(path: str) -> Callable[[int, int], np.ndarray]:
    """Opens one file, and lists the order of its samples."""
    from fastpmae_loaders.order import EPOCH_ORDER, PAGE_ORDER, _shuffle
    from fastpmae_loaders.sources.beton import Beton

    pages, place = np.unique(Beton(path).page_of, return_inverse=True)
    shuffled = np.arange(len(pages))
    _shuffle(0, 0, 0, PAGE_ORDER, shuffled)
    rank = np.empty_like(shuffled)
    rank[shuffled] = np.arange(len(pages))
    group = rank[place] // 32
    order = np.argsort(group, kind="stable")
    edges = np.searchsorted(group[order], np.arange(group.max() + 2))
    for part in range(len(edges) - 1):
        _shuffle(0, 0, part, EPOCH_ORDER, order[edges[part] : edges[part + 1]])
    return lambda start, stop: order[start:stop]


def write_folder(path: Path, images: int) -> None:
    """Empty files, 1,000 in a folder, called as ImageNet's are."""
    for first in range(0, images, 1000):
        folder = path / f"n{first // 1000 * 7919 % 10**8:08d}"
        folder.mkdir(parents=True)
        for number in range(min(1000, images - first)):
            (folder / f"{folder.name}_{31 * number}.JPEG").touch()


def listed_folder(path: str) -> Callable[[int, int], np.ndarray]:
    """Lists a folder as `fastpmae-write` does: the numbers of images whose names are those of the files."""
    from fastpmae_loaders.write.sources import find_images

    items = find_images(path).items

    def places(start: int, stop: int) -> np.ndarray:
        there = [item.label >= 0 and Path(item.path).name.startswith("n") for item in items[start:stop]]
        return np.arange(start, stop)[np.array(there)]

    return places


def opened_by_ffcv(path: str) -> None:
    """Opens one file as FFCV's own Loader does."""
    from fastpmae_loaders.engines.ffcv_package import import_ffcv

    ffcv = import_ffcv()
    ffcv.memory_managers.OSCacheManager(ffcv.reader.Reader(path))


NAMES = {
    "set": "one set",
    "file": "one file",
    "list": "one file, order listed",
    "ffcv": "one file, FFCV's memory manager",
    "folder": "a folder's listing",
}
WAYS = {
    "set": opened_set, "file": opened_file, "list": opened_list, "ffcv": opened_by_ffcv, "folder": listed_folder,
}  # fmt: skip


def child(way: str, path: str, images: int) -> None:
    """In a process of its own: open, and take batches; prints CPU-seconds, MB and CPU-milliseconds."""
    from fastpmae_loaders.order import PageOrder, Pages

    PageOrder(0, 0, Pages(np.array([0, 1, 2]))).places(0, 2)  # compiled, or read from where that is kept
    if way == "ffcv":
        from fastpmae_loaders.engines.ffcv_package import import_ffcv

        import_ffcv()
    before = _peak()
    start = time.process_time()
    places = WAYS[way](path)
    seconds = time.process_time() - start
    times, sound, last = [], True, np.empty(0, np.int64)
    for number in range(min(20, images // 2 // BATCH) if places else 0):
        first = images // 2 + number * BATCH
        start = time.process_time()
        last = places(first, first + BATCH)
        times.append(1e3 * (time.process_time() - start))
        sound = sound and len(np.unique(last)) == BATCH and bool(((last >= 0) & (last < images)).all())
    print(json.dumps([seconds, max(_peak() - before, 0.1), times, sound, int(last.sum())]))


def _peak() -> float:
    """MB that this process has held at most. (The peak that `getrusage` tells begins at the parent's.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


class Opened(NamedTuple):
    """What `child` says of one opening."""

    seconds: float
    memory: float
    times: list[float]
    sound: bool
    last: int
    """The sum of the last batch: the same for the same order."""


def measured(way: str, path: Path, images: int) -> Opened:
    """One opening, in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.bench_sets", "--child", way, str(path), str(images)]
    return Opened(
        *json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    )


def opening_rows(sizes: Sequence[tuple[str, int]], rounds: int) -> list[Row]:
    """Time and memory of opening sets and files of several sizes, and of a batch's places."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fastpmae-sets-") as folder:
        for kind, images in sizes:
            path = Path(folder) / f"{kind}-{images}"
            {"set": write_index, "file": write_hollow, "folder": write_folder}[kind](path, images)
            ways = (kind,) if kind != "file" else ("list", "file", "ffcv") if images <= LARGE else ("list", "file")
            turns = rounds if images <= LARGE else 1
            found = {way: [measured(way, path, images) for _ in range(turns)] for way in ways}
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            first = found[ways[0]]
            for way in ways:
                rows += _rows_of(found[way], way, images, None if way == ways[0] else first)
    return rows


def _rows_of(found: list[Opened], way: str, images: int, first: list[Opened] | None) -> list[Row]:
    case, base = (f"{NAMES[name]}, {images:,} images" for name in (way, "list"))
    # FFCV's has no order of ours to be checked
    gate = way == "ffcv" or all(run.sound and run.last == (first or found)[0].last for run in found)
    seconds = (base, [run.seconds for run in first]) if first else None
    memory = (base, [run.memory for run in first]) if first else None
    rows = [
        make_row(case, "open", "CPU-s", [run.seconds for run in found], "cpu", gate, seconds),
        make_row(case, "memory", "MB", [run.memory for run in found], "cpu", gate, memory),
    ]
    times = [value for run in found for value in run.times]
    if times and way != "folder":
        rows.append(make_row(case, f"a batch of {BATCH}", "CPU-ms", times, "cpu", gate))
    return rows


def page_rows(images: int) -> list[Row]:
    """Pages read by all nodes together, for each page that there is."""
    from fastpmae_loaders.order import PageOrder, Pages

    pages = Pages(np.minimum(np.arange(-(-images // ON_A_PAGE) + 1) * ON_A_PAGE, images))
    order = PageOrder(0, 0, pages)
    rows: list[Row] = []
    for nodes in (8, 32):
        by_places = f"{nodes} nodes, dealt by places"
        read = {
            way: [_pages_read(order, len(pages), nodes, by_page)] for way, by_page in (("place", False), ("page", True))
        }
        once = len(pages) * (images // BATCH * BATCH) / images
        values = {way: [count / once for count in counts] for way, counts in read.items()}
        rows.append(make_row(by_places, "reads of a page", "times", values["place"], "cpu", True))
        case = f"{nodes} nodes, pages dealt out"
        baseline = (by_places, values["place"])
        rows.append(make_row(case, "reads of a page", "times", values["page"], "cpu", True, baseline))
    return rows


def _pages_read(order: Any, count: int, nodes: int, by_page: bool) -> int:
    from fastpmae_loaders.order import deal

    last = np.full((nodes, count), -KEPT - 1, np.int64)
    read = 0
    for number in range(len(order) // BATCH):
        page = order.places(number * BATCH, (number + 1) * BATCH) // ON_A_PAGE
        for node in range(nodes):
            if by_page:
                mine = page[deal(page, node, nodes)]
            else:
                mine = page[BATCH * node // nodes : BATCH * (node + 1) // nodes]
            mine = np.unique(mine)
            read += int((last[node, mine] < number - KEPT).sum())
            last[node, mine] = number
    return read


def main(words: Sequence[str] | None = None) -> int:
    """The command line."""
    words = sys.argv[1:] if words is None else list(words)
    if words[:1] == ["--child"]:
        child(words[1], words[2], int(words[3]))
        return 0
    options = arguments("bench_sets", __doc__ or "").parse_args(words)
    sizes = [("set", 10**6), ("set", 10**7), ("file", IMAGENET)]
    sizes += [("folder", 10**4)] if options.quick else [("set", 10**9), ("file", 10**7), ("folder", 10**6)]
    rows = opening_rows(sizes, 1 if options.quick else 3) + page_rows(IMAGENET)
    return finish(rows, f"Sets and large files on {processor_name()}", options.json, options.plot)


if __name__ == "__main__":
    sys.exit(main())
