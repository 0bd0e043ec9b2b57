"""What each reader of a .beton file says when the file is cut short, or written over, while it reads.

`python -m tests.programs.cut_short BETON ENGINES`.
"""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from fastpmae_loaders import Beton, PairedViews, PlainViews, UserError, ViewSettings

CUT = 9000


def tell(what: str, function: Callable[[], object]) -> None:
    try:
        function()
        print(what, "- nothing", flush=True)
    except UserError as error:
        print(what, "-", error, flush=True)


def drain(batches: Iterable[object]) -> None:
    for _ in batches:
        pass


def cut_under(path: Path, whole: bytes, engine: str) -> None:
    path.write_bytes(whole)
    settings = ViewSettings(image_size=32, patch_size=8)
    views, plain = PairedViews(path, 4, engine, settings, ahead=1), PlainViews(path, 4, 32, engine=engine)
    with views, plain:
        beton, begun, plainly = Beton(path), iter(views), iter(plain)
        next(begun)
        next(plainly)
        os.truncate(path, CUT)
        tell(engine + " goes on", lambda: drain(begun))
        tell(engine + " begins", lambda: next(iter(views)))
        tell(engine + " one batch", lambda: views.batch_of([150]))
        tell(engine + " plainly", lambda: drain(plainly))
        tell(engine + " bytes", lambda: beton.payload(150))
        path.write_bytes(bytes(len(whole)))
        os.utime(path, (1, 1))
        tell(engine + " written over", lambda: drain(iter(views)))


if __name__ == "__main__":
    beton = Path(sys.argv[1])
    content = beton.read_bytes()
    for engine in sys.argv[2:]:
        cut_under(beton, content, engine)
