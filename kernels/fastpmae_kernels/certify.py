"""`python -m fastpmae_kernels.certify [--dry-run]`: build every kernel for every GPU, check the code, write the table.

No GPU is needed. The tables of builds and of modelled traffic go into `kernels/README.md`, between its two marks.
"""

import os
import sys
from collections.abc import Collection
from pathlib import Path

from fastpmae_kernels import traffic
from fastpmae_kernels.traffic import BANDWIDTH, Traffic

README = Path(__file__).parents[1] / "README.md"
MARKS = "<!-- certified: start -->\n", "<!-- certified: end -->\n"


def build_table(targets: Collection[str]) -> tuple[list[str], list[str]]:
    """A line of Markdown for each build, and a sentence for each fault: of a kernel, or of a check that cannot fail."""
    from fastpmae_kernels.builds import builds, examine, faults, spoilt

    lines = [
        "| kernel | GPU | registers (budget) | spills | 16-byte loads | tensor-core instructions | shared memory |",
        "|---|---|---|---|---|---|---|",
    ]
    wrong = []
    for build in builds():
        for target in targets:
            found = examine(build, target)
            budget = "" if target.startswith("gfx") else f" ({build.registers})"
            cores = found.tensor_cores if build.tensor_cores or found.tensor_cores else "–"
            lines.append(
                f"| {build.name} | {target} | {found.registers}{budget} | {found.spills} | {found.wide_loads} "
                f"| {cores} | {found.shared} |"
            )
            wrong += [f"{build.name} for {target}: {fault}" for fault in faults(build, target, found)]
    for words, target, build in spoilt():
        if not any(words in fault for fault in faults(build, target, examine(build, target))):
            wrong.append(f"the check for {words!r} does not fail on {target} for a build made to fail it")
    return lines, wrong


def traffic_table(batch: int = 768, masked: int = 147, prototypes: int = 4096, dim: int = 768) -> list[str]:
    """Modelled bytes and least times at the paper's sizes, logits and tokens in 16 bits."""
    rows = batch * masked
    matrix = rows * prototypes * 2
    cases: list[tuple[str, Traffic, int | None]] = [
        ("Sinkhorn, 3 iterations", traffic.sinkhorn(rows, prototypes), 3 * matrix),
        ("cross-entropy with gradient", traffic.cross_entropy(rows, prototypes), 3 * matrix),
        ("nearest patch", traffic.nearest_patch(batch, masked, masked, dim), 2 * rows * dim * 2),
        ("patch tokens (one view's folds)", traffic.patch_tokens(batch, masked, 16), rows * 768 * 3),
        (
            "photometric (one view; 80 % jittered, 55 % blurred)",
            traffic.photometric(batch, 224, 224, batch * 4 // 5, batch * 11 // 20),
            2 * batch * 3 * 224**2,
        ),
        ("the whole loss", traffic.loss(batch, masked, 3, prototypes), None),
    ]
    times_on = [f"least time {device}" for device in BANDWIDTH]
    lines = [
        "| " + " | ".join(["work", "least possible", "read", "written", "usual code", *times_on]) + " |",
        "|---|---|---|---|---|" + "---|" * len(BANDWIDTH),
    ]
    for name, moved, least in cases:
        usual = gigabytes(traffic.usual_loss(batch, masked, 3, prototypes)) if least is None else "–"
        times = " | ".join(f"{1e3 * moved.seconds(device):.2f} ms" for device in BANDWIDTH)
        lines.append(
            f"| {name} | {'–' if least is None else gigabytes(least)} | {gigabytes(moved.read)} "
            f"| {gigabytes(moved.written)} | {usual} | {times} |"
        )
    return lines


def gigabytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB"


def certify(dry_run: bool = False, gpus: tuple[str, ...] = ()) -> int:
    """Build every kernel for every GPU, check the code and write the table; no GPU is needed.

    Args:
        dry_run: Check, and leave kernels/README.md as it is.
        gpus: With --dry-run, the GPUs to build for (sm_80, sm_90, sm_100, gfx942); all by default.

    Returns:
        The exit status: 1 for a fault, 2 where nothing can be built.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("certify: error: Triton interprets here and cannot build; unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    try:
        import triton
    except ImportError:
        print("certify: error: there is no Triton beside this torch, so there are no kernels to build", file=sys.stderr)
        return 2
    from fastpmae_kernels.builds import TARGETS

    if unknown := [gpu for gpu in gpus if gpu not in TARGETS]:
        print(f"certify: error: --gpus {unknown[0]}: choose of {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    if gpus and not dry_run:
        print("certify: error: --gpus needs --dry-run: the table is of all GPUs", file=sys.stderr)
        return 2
    lines, wrong = build_table(gpus or TARGETS)
    for sentence in wrong:
        print(f"certify: {sentence}", file=sys.stderr)
    tables = [f"Built with Triton {triton.__version__}.", "", *lines, "", *traffic_table()]
    print("\n".join(tables))
    if not dry_run and not wrong:
        start, end = MARKS
        before, rest = README.read_text().split(start)
        README.write_text(before + start + "\n" + "\n".join(tables) + "\n\n" + end + rest.split(end)[1])
    return 1 if wrong else 0


def main() -> int:
    """`python -m fastpmae_kernels.certify`."""
    try:
        import tyro
    except ImportError:
        print("certify: error: tyro is missing; pip install 'fastpmae-kernels[certify]'", file=sys.stderr)
        return 2
    return tyro.cli(certify, prog="python -m fastpmae_kernels.certify")


if __name__ == "__main__":
    sys.exit(main())
