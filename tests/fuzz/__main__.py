"""Fuzzes what strangers' files are read by: `python -m tests.fuzz [KINDS] --seconds N --seed S`.

Each kind's inputs are broken by structure and given to the program in a worker process, with limits on memory and time.
Every case must work or be refused in one sentence: crashes, hangs, tracebacks, sentences that no terminal should get,
and memory above 4 GB are counted, and all have to be 0. The exit status says whether they are.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.fuzz.case import ENVIRONMENT, KINDS
from tests.fuzz.harness import LIMIT, fuzz
from tests.fuzz.worker import replay


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"some of {', '.join(KINDS)}; all by default")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each kind (60)")
    parser.add_argument("--minutes", type=float, help="the same in minutes")
    parser.add_argument("--stream", type=int, default=0, help="where to go on: the first stream of cases (0)")
    parser.add_argument("--seed", type=int, default=0, help="which cases (0)")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for a case ({LIMIT:g})")
    parser.add_argument("--kept", type=Path, default=Path("fuzz-failures"), help="where inputs that fail are kept")
    parser.add_argument(
        "--replay", type=int, nargs=2, metavar=("STREAM", "POSITION"), help="run one case of a kind again, in here"
    )
    options = parser.parse_args()
    unknown = sorted(set(options.kinds) - set(KINDS))
    if unknown or (options.replay and len(options.kinds) != 1):
        parser.error(f"name {'one' if options.replay else 'some'} of {', '.join(KINDS)}")
    seconds = options.seconds if options.minutes is None else 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="fastpmae-fuzz-") as folder:
        if options.replay:
            stream, position = options.replay
            os.environ.update(ENVIRONMENT.get(options.kinds[0], {}), NUMBA_CACHE_DIR=str(Path(folder) / "numba"))
            outcome, words = replay(options.kinds[0], options.seed, stream, position, Path(folder))
            print(f"{outcome}\n{words}")
            return outcome not in ("ok", "refused")
        failed = 0
        for kind in options.kinds or KINDS:
            report = fuzz(
                *(kind, options.seed, seconds, Path(folder) / kind, options.kept),
                limit=options.limit, stream=options.stream,
            )  # fmt: skip
            print(report, *report.failures, sep="\n", flush=True)
            failed += len(report.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
