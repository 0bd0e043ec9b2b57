"""Holds the first losses of every method against those that are kept: `python -m tests.golden [CASES] [--renew]`.

To the bit, and with all other figures of the metrics, so on the machine that they were made on: between two commits it
shows that not a bit has changed. Says what differs; the exit status is 1 where anything does. `--renew` keeps what is
found, with the machine and the versions.
"""

import argparse
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"

from tests.golden.losses import CASES, differences, keep, kept, made_with, run


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)}; all by default")
    parser.add_argument("--renew", action="store_true", help="keep what is found")
    options = parser.parse_args()
    unknown = sorted(set(options.cases) - set(CASES))
    if unknown:
        parser.error(f"there is no case {', '.join(unknown)}: name some of {', '.join(CASES)}")
    sentences, elsewhere = [], set()
    for case in options.cases or CASES:
        found = run(case)
        if options.renew:
            keep(case, found)
            continue
        sentences += differences(case, found)
        there, here = kept(case)["made_with"], made_with()
        elsewhere |= {
            f"{name} {there.get(name)}, here {value}" for name, value in here.items() if there.get(name) != value
        }
    for sentence in sentences:
        print(sentence)
    if sentences and elsewhere:
        print("they were made elsewhere, which may be why:", *sorted(elsewhere), sep="\n  ")
    print("renewed" if options.renew else f"{len(sentences)} differences")
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
