"""What `benchmarks.on_gpu` needs beside the checkout on a machine that can reach nothing, in one folder.

`python -m benchmarks.gpu.pack DIR [--originals 150] [--python 3.12] [--archive F ...] [--dali]`, on a machine with a
network. DIR then holds `data/` (three .beton files), `wheels/` (the packages that a machine with torch usually lacks)
and the archives that are named (FFCV built elsewhere, say, as it lies in site-packages); or with --dali nothing but
DALI without the machine code of other GPUs. On the machine: `scripts/on_bare_gpu DIR`.
"""

import argparse
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from benchmarks.gpu.images import write_images
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.errors import UserError

WHEELS = ("tyro", "docstring-parser", "typeguard")
"""What the trainer imports and an image with torch and its usual companions does not have."""
DALI = ("nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg")
DALI_NEEDS = ("six", "gast", "astunparse", "makefun", "optree", "packaging")
"""Of what it names the parts that a pipeline imports."""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]

FAT_SECTIONS = (".nv_fatbin", "__nv_relfatbin")
FAT_MAGIC, FAT_HEADER, ENTRY = 0xBA55ED50, "<IHHQ", "<HHIQ"
"""CUDA's fat binaries: a header (magic, version, its own size, what follows), then entries (kind, flags, header's
size, payload's size) for one architecture each, whose number is at byte 28."""
PTX, CUBIN, ARCHITECTURE = 1, 2, 28


def download(names: tuple[str, ...], folder: Path, python: str) -> list[Path]:
    """Wheels of these packages, without what they need in turn, for Linux on x86-64. UserError where pip fails."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    words += ["--python-version", python, "--implementation", "cp"]
    words += [word for platform in PLATFORMS for word in ("--platform", platform)]
    done = subprocess.run([*words, *names], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"pip cannot download {', '.join(names)}: {done.stderr.strip().splitlines()[-1]}")
    return sorted(folder.glob("*.whl"))


def pack_dali(folder: Path, python: str, capability: int) -> None:
    """DALI and its codecs as `dali.tar.xz`: of 270 MB of wheels about 60 are left, with one architecture's code."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch) / "site"
        tag = f"cpython-{python.replace('.', '')}"
        for wheel in download(DALI, Path(scratch) / "wheels", python):
            with zipfile.ZipFile(wheel) as opened:
                opened.extractall(site, [name for name in opened.namelist() if _is_needed(name, tag)])
        for library in sorted(site.rglob("*.so*")):
            zero_others(library, capability)
            subprocess.run(["strip", "--strip-unneeded", str(library)], check=True)
        with tarfile.open(folder / "dali.tar.xz", "w:xz", preset=9) as archive:
            for path in sorted(site.iterdir()):
                archive.add(path, path.name)
    download(DALI_NEEDS, folder / "wheels", python)


def _is_needed(name: str, tag: str) -> bool:
    """Whether a wheel's file is of use at run time on this Python."""
    headers = name.endswith((".pyi", ".h", ".hpp", ".a")) or "/include/" in name or "/test" in name
    return not headers and (".cpython-" not in name or tag in name)


def zero_others(library: Path, capability: int) -> int:
    """Overwrite the machine code of other GPUs in a library with zeros, which pack to nothing; the bytes that were."""
    sections = subprocess.run(["readelf", "-SW", library], capture_output=True, text=True, check=True).stdout
    data, gone = bytearray(library.read_bytes()), 0
    for line in sections.splitlines():
        words = line.replace("[ ", "[").split()
        name = next((name for name in FAT_SECTIONS if name in words), None)
        if name is not None:
            place = words.index(name)
            offset, size = int(words[place + 3], 16), int(words[place + 4], 16)
            gone += _zero_section(data, offset, offset + size, capability)
    if gone:
        library.write_bytes(data)
    return gone


def _zero_section(data: bytearray, start: int, stop: int, capability: int) -> int:
    gone = 0
    while start + struct.calcsize(FAT_HEADER) <= stop:
        magic, _, header, follows = struct.unpack_from(FAT_HEADER, data, start)
        if magic != FAT_MAGIC:  # padding between binaries
            start += 8
            continue
        entry, end = start + header, start + header + follows
        while entry < end:
            kind, _, entry_header, payload = struct.unpack_from(ENTRY, data, entry)
            if kind not in (PTX, CUBIN):
                break
            (architecture,) = struct.unpack_from("<I", data, entry + ARCHITECTURE)
            if (kind, architecture) != (CUBIN, capability):
                data[entry + entry_header : entry + entry_header + payload] = bytes(payload)
                gone += payload
            entry += entry_header + payload
        start = end
    return gone


def pack(given: argparse.Namespace) -> int:
    folder: Path = given.folder
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: name a new folder")
    for archive in given.archive:
        if not archive.is_file() or not archive.name.endswith((".tar.gz", ".tar.xz")):
            raise UserError(f"--archive {archive} is no .tar.gz or .tar.xz file")
    if given.dali:
        pack_dali(folder, given.python, given.capability)
    else:
        (folder / "data").mkdir(parents=True)
        write_images(folder / "data", given.originals)
        download(WHEELS, folder / "wheels", given.python)
    for archive in given.archive:
        shutil.copy(archive, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB; on the machine with the GPU: scripts/on_bare_gpu {folder}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.pack", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--originals", type=int, default=150, help="JPEGs in their original size (150)")
    parser.add_argument("--python", default="3.12", help="of the other machine (3.12)")
    parser.add_argument("--archive", type=Path, nargs="+", default=[], metavar="F",
                        help="archives of packages as they lie in site-packages")  # fmt: skip
    parser.add_argument("--dali", action="store_true", help="DALI alone, for a second call: both are too large for one")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU that DALI is to run on (90: Hopper)")
    given = parser.parse_args()
    return exit_with_sentence("pack", lambda: pack(given))


if __name__ == "__main__":
    sys.exit(main())
