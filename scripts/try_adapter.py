"""Tries the edits of docs/adapters.md on a checkout of the codebase that they are for: five steps of it on a CPU.

python scripts/try_adapter.py mae CHECKOUT [IMAGES.beton] [--steps 5] [--keep FOLDER] [--more "--flag value"]

The checkout is copied, the copy is edited as the page says and run as its authors run it, with the smallest settings
that it takes, by the Python that runs this script: it needs what the codebase needs. What a CPU and a torch of today
lack for it comes from scripts/adapters/on_cpu.py, apart from the edits. Without images it takes the demo's. Of DINOv3
and CAPI, which do not start without a GPU, the edits are made and nothing is run.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = [str(ROOT / part) for part in ("", "kernels", "loaders")]
sys.path[:0] = [str(ROOT / "scripts"), *OURS]

from adapters.codebases import CODEBASES, Codebase  # noqa: E402
from adapters.edits import Edit, EditError, applied, edits_of  # noqa: E402

PAGE = ROOT / "docs" / "adapters.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codebase", choices=sorted(CODEBASES))
    parser.add_argument("checkout", type=Path, help="a folder with the codebase; it is copied, nothing in it changes")
    parser.add_argument("images", nargs="?", type=Path, help="a .beton file; by default the demo's images")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="where the edited copy goes and stays; by default it is deleted")
    parser.add_argument("--more", default="", help="further arguments of the codebase's program")
    args = parser.parse_args()
    codebase = CODEBASES[args.codebase]
    if not (args.checkout / codebase.program).is_file():
        return _refused(f"{args.checkout} holds no {codebase.program}: it is no checkout for {args.codebase}")
    if args.images is not None and not args.images.is_file():
        return _refused(f"{args.images} is not there")
    if args.keep is not None and args.keep.exists():
        return _refused(f"{args.keep} is there already: name another folder")
    with tempfile.TemporaryDirectory(prefix="adapter-") as temporary:
        work = Path(temporary)
        copy = work / "checkout"
        shutil.copytree(args.checkout, copy, ignore=shutil.ignore_patterns(".git"))
        page = PAGE.read_text()
        try:
            edits = [edit for section in codebase.sections for edit in edits_of(page, section)]
            for path in dict.fromkeys(edit.path for edit in edits):
                _edit(copy / path, [edit for edit in edits if edit.path == path], codebase.smaller)
        except EditError as error:
            return _refused(str(error))
        if args.keep is not None:
            copy = Path(shutil.move(copy, args.keep.absolute()))
        commit = _commit(args.checkout)
        print(f"{args.codebase} at {commit}: {len(edits)} edits of docs/adapters.md made in a copy", flush=True)
        if codebase.needs_gpu:
            for path in dict.fromkeys(edit.path for edit in edits):
                compile((copy / path).read_text(), path, "exec")
            print("it does not start without a GPU, and is not run")
            return 0
        arguments = [*codebase.arguments, *args.more.split()]
        return _train(codebase, arguments, copy, work, args.images or _demo(work), args.steps)


def _edit(path: Path, edits: list[Edit], smaller: tuple[tuple[str, str], ...]) -> None:
    if not path.is_file():
        raise EditError(f"the checkout holds no {edits[0].path}")
    text = path.read_text()
    for edit in edits:
        text = applied(edit, text)
    # the page's lines are for GPUs
    for old, new in (('device="cuda"', 'device="cpu"'), *smaller):
        text = text.replace(old, new)
    path.write_text(text)


def _train(codebase: Codebase, arguments: list[str], copy: Path, work: Path, images: Path, steps: int) -> int:
    """Run the program for some steps in a process of its own, and print them; its exit status."""
    data, out = work / "data", work / "out"
    data.mkdir()
    out.mkdir()
    for name in ("images", "train", "validation"):
        (data / f"{name}.beton").symlink_to(images.absolute())
    named = {"images": data / "images.beton", "folder": data, "out": out, "classes": _classes(images)}
    command = [
        sys.executable,
        str(ROOT / "scripts/adapters/on_cpu.py"),
        *codebase.options,
        str(copy / codebase.program),
    ]
    if codebase.start:
        start = work / "start.py"
        start.write_text(codebase.start)
        command[-1] = str(start)
    command += [part.format(**named) for part in arguments]
    paths = [str(copy / codebase.source), *OURS, os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRY_STEPS": str(steps),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    if codebase.ranked:
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    # programs without arguments find their images where they are run
    folder = copy if codebase.arguments else data
    log = work / "log.txt"
    with log.open("w") as file:
        program = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=file, text=True, errors="replace"
        )
        assert program.stdout is not None
        for line in program.stdout:
            if line.startswith("@ "):
                print(line[2:], end="", flush=True)
            else:
                file.write(line)
                file.flush()
        status = program.wait()
    if status:
        print(log.read_text(errors="replace")[-6000:], file=sys.stderr)
    return status


def _demo(work: Path) -> Path:
    from fastpmae.demo.demo import write_demo_betons

    return write_demo_betons(work / "demo")[0]


def _classes(images: Path) -> int:
    from fastpmae_loaders import Beton

    return int(Beton(images).label.max()) + 1


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "an unknown commit"


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


def _refused(why: str) -> int:
    print(f"try_adapter: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
