"""Fuzzes our decoder in its Python form by coverage: `python -m tests.fuzz.scalar_decoder --minutes N`.

Needs atheris, which is no requirement of this project (an environment of its own with atheris, numba and Pillow will
do). It is blind in machine code, so here Python runs what is compiled elsewhere (NUMBA_DISABLE_JIT): headers, Huffman
codes, coefficients, and no index may be negative or reach past an array's end. Each input goes to a process of compiled
code too, whose answer must be the same; that one also holds pixels against Pillow's. The corpus is kept from one run to
the next, and so are inputs that fail.
"""

import argparse
import ctypes
import importlib
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).parent.parent.parent
_STEP = 32


class Bounded(np.ndarray):
    """An array that counts no index from its end, and cuts no slice short."""

    def _check(self, key: Any) -> None:
        for place, length in zip(key if isinstance(key, tuple) else (key,), self.shape, strict=False):
            if isinstance(place, slice):
                assert (place.start or 0) >= 0, f"a slice from {place.start} on"
                assert place.stop is None or 0 <= place.stop <= length, f"a slice up to {place.stop} of {length}"
            else:
                assert 0 <= place < length, f"index {place} of {length}"

    def __getitem__(self, key: Any) -> Any:
        self._check(key)
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._check(key)
        super().__setitem__(key, value)


class Memory:
    """Copies 32 bytes between arrays that it knows, as `native/data.py` does by addresses."""

    def __init__(self) -> None:
        self.payload = self.segment = np.empty(0, np.uint8)

    def see(self, payload: np.ndarray) -> None:
        """The payload that is read from now on."""
        self.payload = payload

    def copy_and_find(self, target: int, source: int) -> int:
        """How many bytes of those copied stand before the first FF."""
        target, source = int(target), int(source)
        for address, array in ((source, self.payload), (target, self.segment)):
            first = array.ctypes.data
            assert first <= address <= first + array.nbytes - _STEP, f"byte {address - first} of {array.nbytes}"
        content = ctypes.string_at(source, _STEP)
        ctypes.memmove(target, content, _STEP)
        found = content.find(b"\xff")
        return _STEP if found < 0 else found


def both_forms(imports: AbstractContextManager[Any]) -> Callable[[bytes], None]:
    """What gives a payload to both forms and compares; AssertionError where they differ or an index is wrong.

    The decoder is imported, as Python, within `imports`.
    """
    compiled = {name: value for name, value in os.environ.items() if name != "NUMBA_DISABLE_JIT"}
    os.environ["NUMBA_DISABLE_JIT"] = "1"
    with imports:
        from fastpmae_loaders.native import coefficients, data, huffman

    from tests.fuzz.decoder_answers import DIGEST, Answers, digest

    np.seterr(over="ignore")  # numbers of 64 bits go round in machine code, too

    def bounded(array: np.ndarray) -> np.ndarray:
        return array.view(Bounded)

    memory: Any = Memory()
    module: Any
    for module, names in ((coefficients, ("CODES", "MEANINGS", "LIMITS", "UNFOLDED")), (huffman, ("PLACES",))):
        for name in names:
            setattr(module, name, bounded(getattr(module, name)))
    module = data
    module._copy_and_find = memory.copy_and_find
    answers = Answers(bounded)
    memory.segment = answers.work.data
    other = subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz.decoder_answers"],
        cwd=REPOSITORY,
        env=compiled,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def run(payload: bytes) -> None:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(struct.pack("<I", len(payload)) + payload)
        other.stdin.flush()
        found = digest(answers.answer(payload, memory.see))
        expected = other.stdout.read(DIGEST)
        assert len(expected) == DIGEST, "the compiled form has ended"
        assert found == expected, "the compiled form answers otherwise"

    return run


def fuzz(words: list[str]) -> None:
    """Give libFuzzer's inputs to both forms; ends the process."""
    atheris: Any = importlib.import_module("atheris")
    run = both_forms(atheris.instrument_imports(include=["fastpmae_loaders.native"]))
    atheris.Setup([sys.argv[0], *words], run)
    atheris.Fuzz()


def compare(corpus: Path) -> None:
    """Give a folder's inputs to both forms, without atheris."""
    run = both_forms(nullcontext())
    for path in sorted(corpus.iterdir()):
        try:
            run(path.read_bytes())
        except AssertionError as error:
            raise AssertionError(f"{path}: {error}") from error


def fill(corpus: Path) -> None:
    """Put what the fuzzer starts from into a folder."""
    words = [sys.executable, "-c", f"from tests.fuzz.scalar_decoder import write_seeds; write_seeds({str(corpus)!r})"]
    subprocess.run(words, cwd=REPOSITORY, check=True)


def write_seeds(folder: str) -> None:
    """Sound JPEGs and codes as files, made by compiled code."""
    from tests.fuzz.small_jpegs import small_codes, small_jpegs

    for number, payload in enumerate(small_jpegs() + small_codes()):
        (Path(folder) / f"seed-{number:03}").write_bytes(payload)


def main() -> int:
    """See the module; the exit status says whether no input failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.scalar_decoder", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (5)")
    parser.add_argument("--corpus", type=Path, default=Path("fuzz-corpus"), help="inputs that reach something new")
    parser.add_argument("--kept", type=Path, default=Path("fuzz-failures"), help="where inputs that fail are kept")
    parser.add_argument("--replay", type=Path, nargs="+", help="run these inputs alone")
    parser.add_argument("--compare", action="store_true", help="give the corpus to both forms; needs no atheris")
    parser.add_argument("--inside", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is not None:
        fuzz(options.inside)
    inside = [sys.executable, "-m", "tests.fuzz.scalar_decoder", "--inside"]
    if options.replay:
        return subprocess.run(inside + [str(path.resolve()) for path in options.replay], cwd=REPOSITORY).returncode
    for folder in (options.corpus, options.kept):
        folder.mkdir(parents=True, exist_ok=True)
    fill(options.corpus.resolve())
    if options.compare:
        compare(options.corpus)
        return 0
    ends, failed = time.monotonic() + 60 * options.minutes, 0
    while (left := int(ends - time.monotonic())) > 0:
        words = [
            *(f"-max_total_time={left}", "-max_len=2048", "-timeout=60", "-rss_limit_mb=4096", "-print_final_stats=1"),
            *(f"-artifact_prefix={options.kept.resolve()}/scalar-", str(options.corpus.resolve())),
        ]
        failed += subprocess.run(inside + words, cwd=REPOSITORY).returncode != 0
    print(f"{failed} inputs failed; {len(list(options.corpus.iterdir())):,} are in {options.corpus}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
