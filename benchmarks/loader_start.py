"""How soon a loader's first batch is there, and what memory it takes: `python -m benchmarks.loader_start F.beton`.

Each engine gets a fresh process, twice: the first may still compile, the second is the warm start that is reported.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

CHILD = """
import sys, time
began = float(sys.argv[4])
from fastpmae_loaders import PairedViews
with PairedViews(sys.argv[1], int(sys.argv[3]), sys.argv[2], workers=2) as views:
    batches = iter(views)
    next(batches)
    first = time.time() - began
    for _ in range(8):
        next(batches, None)
status = {line.split(":")[0]: line.split()[1] for line in open("/proc/self/status") if line.startswith(("Vm", "Rss"))}
import json
print(json.dumps({"first": first, "peak": int(status["VmHWM"]), "anon": int(status["RssAnon"]),
                  "file": int(status["RssFile"])}))
"""


def measure(beton: Path, engine: str, batch_size: int) -> dict[str, float]:
    """Seconds from the start of a process to its first batch; kB of memory at the peak, and of both kinds after it."""
    words = [sys.executable, "-c", CHILD, str(beton), engine, str(batch_size), str(time.time())]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """See the module. 1 where a warm start takes more than 8 seconds or the peak is above 1.2 GB."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader_start", description=__doc__)
    parser.add_argument("beton", type=Path, metavar="F.beton")
    parser.add_argument("--engine", nargs="+", default=["native", "torch"])
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    failed = False
    for engine in options.engine:
        measure(options.beton, engine, options.batch_size)
        found = measure(options.beton, engine, options.batch_size)
        failed |= found["first"] > 8 or found["peak"] * 1024 > 1.2e9
        peak, anonymous, files = (found[name] * 1024 / 1e6 for name in ("peak", "anon", "file"))
        print(
            f"{engine}: first batch after {found['first']:.1f} s; peak {peak:.0f} MB, "
            f"of its own {anonymous:.0f} MB, files {files:.0f} MB"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
