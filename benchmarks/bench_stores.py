"""Images a second from an S3 server of this machine against the local file, with a cold and a warm cache.

`python -m benchmarks.bench_stores [--quick] [--json F] [--plot F]`. The server is hadro, which answers `--latency-ms`
after it is asked; it shares the machine's cores with the loader, so what is measured is what the loader itself costs,
and not how fast a network is. The cases take turns. `cold` has an empty cache in each round, `warm` one that holds the
file, and `half` one of half the file's size, in which nothing is left of an epoch when the next one comes to it. Each
epoch is page by page. The check: every batch has the images of the local file, in its order.
"""

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.common import Row, arguments, finish, make_row, processor_name
from fastpmae_loaders import PairedViews, ViewSettings, open_samples
from fastpmae_loaders.stores.cache import PAGE, CacheSettings
from fastpmae_loaders.write.pages import PageWriter
from tests.stores import BUCKET, faulty_server, told

SETTINGS = ViewSettings()
LATENCY_MS = 20


def write_file(path: Path, images: int) -> None:
    """JPEGs of 500 by 375 pixels, 110 KB each on average, as ImageNet's originals are."""
    import io

    from PIL import Image

    from tests.made import made_image

    noise = np.random.default_rng(0)
    stored = []
    for number in range(32):
        pixels = np.asarray(made_image(number, 500, 375), np.int16)
        rough = np.clip(pixels + noise.normal(0, 14, pixels.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(rough).save(file, "jpeg", quality=88)
        stored.append(file.getvalue())
    with path.open("wb") as file:
        pages = PageWriter(file, images, PAGE)
        for number in range(images):
            pages.add(0, 500, 375, -1, stored[number % len(stored)])
        pages.finish(None)


def rate(samples: object, batch: int) -> tuple[float, int]:
    """Images a second of an epoch, and a digest of what was shown."""
    with PairedViews(samples, batch, settings=SETTINGS, page_order=True, workers=2) as loader:  # pyright: ignore[reportArgumentType]
        began = time.perf_counter()
        shown = [shown.index.numpy().copy() for shown in loader]
        seconds = time.perf_counter() - began
    order = np.concatenate(shown)
    return len(order) / seconds, hash(order.tobytes())


def rows_of(folder: Path, images: int, rounds: int, batch: int, latency_ms: int) -> list[Row]:
    """Every case, in turns, of a made file of so many images in `folder`; the first round is left out."""
    (folder / "data" / BUCKET).mkdir(parents=True)
    local = folder / "data" / BUCKET / "images.beton"
    write_file(local, images)
    half = str(max(8 * PAGE, local.stat().st_size // 2))
    caches = {"cold": "10GB", "warm": "10GB", "half": half}

    def from_store(case: str) -> tuple[float, int]:
        place = folder / f"cache-{case}"
        if case == "cold":
            shutil.rmtree(place, ignore_errors=True)
        return rate(open_samples(f"s3://{BUCKET}/images.beton", cache=CacheSettings(place, caches[case])), batch)

    cases: dict[str, Callable[[], tuple[float, int]]] = {"local file": lambda: rate(local, batch)}
    cases |= {f"S3, {case} cache": lambda case=case: from_store(case) for case in caches}
    seen: dict[str, list[tuple[float, int]]] = {case: [] for case in cases}
    requests: dict[str, list[float]] = {case: [] for case in cases}
    with faulty_server(folder / "data", latency_ms=latency_ms) as server, told(server):
        for number in range(rounds + 1):
            for case, run in cases.items():
                before = _requests(server.log)
                found = run()
                if number:
                    seen[case].append(found)
                    requests[case].append(float(_requests(server.log) - before))
    device, rows = processor_name(), list[Row]()
    truth = seen["local file"][0][1]
    pages = -(-local.stat().st_size // PAGE)
    rates = {case: [speed for speed, _ in found] for case, found in seen.items()}
    for case, found in seen.items():
        gate = all(digest == truth for _, digest in found)
        baseline = None if case == "local file" else ("local file", rates["local file"])
        rows.append(make_row(case, "rate", "images/s", rates[case], device, gate, baseline, more_is_better=True))
        if baseline:
            hits = [100 * max(0.0, 1 - count / pages) for count in requests[case]]
            rows.append(make_row(case, "pages from the cache", "%", hits, device, gate))
    return rows


def _requests(log: Path) -> int:
    """How many parts of files a server has sent."""
    return len(re.findall(rb"GET .* 206", log.read_bytes()))


def main(words: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = arguments("bench_stores", "Images a second from a store against the local file.")
    parser.add_argument("--latency-ms", type=int, default=LATENCY_MS, help=f"of each answer ({LATENCY_MS})")
    options = parser.parse_args(words)
    images, rounds, batch = (1200, 2, 64) if options.quick else (12_000, 3, 128)
    with tempfile.TemporaryDirectory(prefix="fastpmae-stores-") as folder:
        rows = rows_of(Path(folder), images, rounds, batch, options.latency_ms)
    return finish(rows, "Images a second from a store", options.json, options.plot)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
