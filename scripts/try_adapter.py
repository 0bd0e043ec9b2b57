"""Tries the edits of docs/adapters.md on a checkout of the codebase that they are for: five steps of it on a CPU.

python scripts/try_adapter.py mae CHECKOUT [IMAGES.beton] [--steps 5] [--keep FOLDER]

The checkout is copied, the copy is edited as the page says and then run as its authors run it, with the smallest settings
that it takes, by the Python that runs this script: it needs what the codebase needs. What a CPU and a torch of today lack
for it comes from scripts/adapters/on_cpu.py, apart from the edits. Without images it takes the demo's.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts")]

from adapters.edits import Edit, EditError, applied, edits_of  # noqa: E402

PAGE = ROOT / "docs" / "adapters.md"


@dataclass(frozen=True)
class Codebase:
    """How a codebase is tried: the page's sections, what is run and its arguments, and settings in its environment.

    In the arguments {images} is the file (for timm its folder), {out} a folder to write to, {classes} how many there are.
    `options` are those of on_cpu.py. Where a program has no arguments, `smaller` are pairs of texts, the second of which is tried in place of the first.
    """

    sections: tuple[str, ...]
    program: str
    arguments: str
    images: str = "images.beton"
    smaller: tuple[tuple[str, str], ...] = ()
    options: tuple[str, ...] = ()


_MAE = "--batch_size 4 --num_workers 0 --epochs 2 --warmup_epochs 1 --data_path {images} --output_dir {out}"
_MAE += " --log_dir {out} --device cpu"
_DINO = "--arch vit_tiny --out_dim 64 --batch_size_per_gpu 4 --num_workers 0 --epochs 2 --warmup_epochs 1"
_DINO += " --warmup_teacher_temp_epochs 1 --local_crops_number 2 --use_fp16 false --data_path {images} --output_dir {out}"
_SIMMIM = "--cfg configs/vit_base__800ep/simmim_pretrain__vit_base__img224__800ep.yaml --local_rank 0 --batch-size 4"
_SIMMIM += " --amp-opt-level O0 --data-path {images} --output {out} --opts DATA.NUM_WORKERS 0 MODEL.VIT.DEPTH 2"
_DINOV2 = "--config-file dinov2/configs/train/vitl16_short.yaml --output-dir {out} train.dataset_path={images}"
_DINOV2 += " train.batch_size_per_gpu=4 train.num_workers=0 student.arch=vit_small student.drop_path_rate=0"
_DINOV2 += " student.block_chunks=1 compute_precision.grad_scaler=false crops.local_crops_number=2 dino.head_n_prototypes=64 ibot.head_n_prototypes=64"
_TIMM = "--data-dir {images} --model vit_tiny_patch16_224 --num-classes {classes} --batch-size 4 --workers 0 --device cpu"
_TIMM += " --mixup 0.2 --reprob 0.25 --epochs 1 --output {out}"

CODEBASES = {
    "mae": Codebase(("MAE and SdAE",), "main_pretrain.py", f"{_MAE} --model mae_vit_base_patch16"),
    "mae-masks": Codebase(("MAE and SdAE", "Our masks in MAE and SdAE"), "main_pretrain.py", f"{_MAE} --model mae_vit_base_patch16"),
    "sdae": Codebase(("MAE and SdAE",), "main_pretrain.py", f"{_MAE} --model mae_vit_small_patch16 --model_teacher vit_small_patch16"),
    "sdae-masks": Codebase(
        ("MAE and SdAE", "Our masks in MAE and SdAE"),
        "main_pretrain.py",
        f"{_MAE} --model mae_vit_small_patch16 --model_teacher vit_small_patch16 --shrink_num 147 --ncrop_loss 3",
    ),
    "dino": Codebase(("DINO",), "main_dino.py", _DINO),
    "ibot": Codebase(("iBOT",), "main_ibot.py", f"{_DINO} --patch_out_dim 64 --pred_ratio 0 0.3 --pred_ratio_var 0 0.2"),
    "dinov2": Codebase(("DINOv2",), "dinov2/train/train.py", _DINOV2, options=("--one-process",)),
    "timm": Codebase(("timm",), "train.py", _TIMM, images="train.beton"),
    "lightly-byol": Codebase(("BYOL in lightly",), "examples/pytorch/byol.py", "", smaller=(('"images.beton", 256', '"images.beton", 4'),)),
    "lightly-dino": Codebase(("DINO in lightly",), "examples/pytorch/dino.py", "", smaller=(('"images.beton", 64', '"images.beton", 4'),)),
    "simmim": Codebase(("SimMIM",), "main_simmim.py", _SIMMIM),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codebase", choices=sorted(CODEBASES))
    parser.add_argument("checkout", type=Path, help="a folder with the codebase; it is copied, nothing in it changes")
    parser.add_argument("images", nargs="?", type=Path, help="a .beton file; by default the demo's images")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="where the edited copy goes and stays; by default it is deleted")
    args = parser.parse_args()
    codebase = CODEBASES[args.codebase]
    if not (args.checkout / codebase.program).is_file():
        return _refused(f"{args.checkout} holds no {codebase.program}: it is no checkout of what {args.codebase} is for")
    if args.images is not None and not args.images.is_file():
        return _refused(f"{args.images} is not there")
    if args.keep is not None and args.keep.exists():
        return _refused(f"{args.keep} is there already: name another folder")
    with tempfile.TemporaryDirectory(prefix="adapter-") as temporary:
        work = Path(temporary)
        copy = (args.keep or work / "checkout").absolute()
        shutil.copytree(args.checkout, copy, ignore=shutil.ignore_patterns(".git"))
        page = PAGE.read_text()
        try:
            edits = [edit for section in codebase.sections for edit in edits_of(page, section)]
            for path in dict.fromkeys(edit.path for edit in edits):
                _edit(copy / path, [edit for edit in edits if edit.path == path], codebase.smaller)
        except EditError as error:
            return _refused(str(error))
        print(f"{args.codebase} at {_commit(args.checkout)}: {len(edits)} edits of docs/adapters.md made in a copy", flush=True)
        return _train(codebase, copy, work, args.images, args.steps)


def _edit(path: Path, edits: list[Edit], smaller: tuple[tuple[str, str], ...]) -> None:
    if not path.is_file():
        raise EditError(f"{path} is not there")
    text = path.read_text()
    for edit in edits:
        text = applied(edit, text)
    # the page's lines are for GPUs
    for old, new in (('device="cuda"', 'device="cpu"'), *smaller):
        text = text.replace(old, new)
    compile(text, str(path), "exec")
    path.write_text(text)


def _train(codebase: Codebase, copy: Path, work: Path, images: Path | None, steps: int) -> int:
    """Run the program for some steps in a process of its own; its exit status."""
    data, out = work / "data", work / "out"
    data.mkdir()
    out.mkdir()
    images = images or _demo(work)
    for name in (codebase.images, "validation.beton", "images.beton"):
        if not (data / name).exists():
            (data / name).symlink_to(images.absolute())
    named = {"images": data if codebase.images != "images.beton" else data / "images.beton", "out": out, "classes": _classes(images)}
    arguments = [part.format(**named) for part in codebase.arguments.split()]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TRY_STEPS": str(steps)}
    if "--device cpu" not in codebase.arguments:  # those that have no such flag run as a group of ranks alone
        environment |= dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1")
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    paths = [str(copy), *(str(ROOT / part) for part in ("", "kernels", "loaders")), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, str(ROOT / "scripts/adapters/on_cpu.py"), *codebase.options, str(copy / codebase.program), *arguments]
    log = work / "log.txt"
    cwd = data if codebase.program.startswith("examples") else copy
    with log.open("w") as file:
        done = subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=file, text=True)
        assert done.stdout is not None
        for line in done.stdout:
            file.write(line)
            if line.startswith("@ "):
                print(line[2:], end="", flush=True)
        status = done.wait()
    if status:
        print(log.read_text()[-6000:], file=sys.stderr)
    return status


def _demo(work: Path) -> Path:
    from fastpmae.demo import write_demo_betons

    return write_demo_betons(work / "demo")[0]


def _classes(images: Path) -> int:
    sys.path[:0] = [str(ROOT / "loaders")]
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
