"""The Triton kernels built for GPUs that are not there, and what their machine code says.

Triton's compiler needs no driver. The code is read with the tools in its wheel: registers, spills to memory, 16-byte
loads, tensor-core instructions, shared memory. A process that interprets Triton cannot build: see `certify.py`.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastpmae_kernels import long_rows
from fastpmae_kernels.match import nearest_kernel, nearest_meta
from fastpmae_kernels.patch_tokens import tokens_kernel, tokens_meta
from fastpmae_kernels.photometric_gpu import (
    COLUMNS,
    LINES,
    PIXELS,
    blur_kernel,
    luma_kernel,
    photometric_meta,
    point_kernel,
)
from fastpmae_kernels.photometric_numbers import RADIUS
from fastpmae_kernels.prototype_loss import cross_entropy_kernel, cross_entropy_meta, scale_kernel
from fastpmae_kernels.sinkhorn import assigned_kernel, assigned_meta, column_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that one block may use on the part."""

TENSOR_CORES = r"\b(HMMA|HGMMA|UTC\w*MMA)\b|v_mfma"
SPILLS = r"\b(STL|LDL)\b"
WIDE_LOADS = r"\bLDG\.\S*128|\bLDGSTS\.\S*128|\bUTMALDG|(global|buffer)_load_dwordx4"


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NEAREST = (("", True, False), ("'s l2", False, False), (" in folds", True, True), ("'s l2 in folds", False, True))
"""Words for it, whether by the cosine, whether within folds."""


@dataclass(frozen=True)
class Build:
    """A kernel with the types and tile it is launched with, and what its machine code must show."""

    name: str
    kernel: Any
    types: dict[str, str]
    """Of each argument, in Triton's notation."""
    tile: dict[str, Any]
    registers: int
    """At most, a thread."""
    wide_loads: bool = True
    tensor_cores: bool = False
    aligned: tuple[str, ...] = ()
    """Numbers that 16 divides at the paper's sizes; all pointers are 16-byte aligned."""
    unaligned: bool = field(default=False)


@dataclass(frozen=True)
class Findings:
    """What the machine code of a build says."""

    registers: int
    spills: int
    wide_loads: int
    tensor_cores: int
    shared: int


def _types(kernel: Any, pointers: dict[str, str], floats: tuple[str, ...] = ()) -> dict[str, str]:
    """Types by name: what is neither a pointer nor among `floats` is an integer; capitals are constants."""
    kinds = {}
    for name in kernel.arg_names:
        if name.isupper():
            kinds[name] = "constexpr"
        else:
            kinds[name] = pointers.get(name, "fp32" if name in floats else "i32")
    return kinds


def builds(prototypes: int = 4096, patch_size: int = 16) -> list[Build]:
    """Every kernel as the paper's sizes launch it.

    Logits and tokens in all types that the trainer has (where it computes in bf16 the teacher's logits are in fp16),
    and in some that other code has.
    """
    strides = ("prototypes", "stride", "student_stride", "teacher_stride", "gradient_stride")
    tokens = ("dim", "student_image", "student_row", "teacher_image", "teacher_row", "height", "width")
    half, brain, whole = "fp16", "bf16", "fp32"
    found = []
    for dtype in (half, whole):
        pointers = {"logits": f"*{dtype}"} | dict.fromkeys(("peaks", "totals", "logv", "sums"), "*fp32")
        found += [
            Build(
                f"column_logsumexp {dtype}", column_kernel, _types(column_kernel, pointers, ("scale",)),
                {"ROWS": 16, "COLUMNS": 256, "num_warps": 4}, registers=128, aligned=strides,
            ),
            Build(
                f"assigned_sums {dtype}", assigned_kernel, _types(assigned_kernel, pointers, ("scale",)),
                assigned_meta(prototypes), registers=128, aligned=strides,
            ),
            *_sweeps_of_long_rows(dtype, strides),
        ]  # fmt: skip
    for dtype in (half, brain, whole):
        found.append(
            Build(
                f"scale_rows {dtype}", scale_kernel, _types(scale_kernel, {"rows": f"*{dtype}", "factor": "*fp32"}),
                {"COLUMNS": 4096, "num_warps": 4}, registers=64, aligned=strides,
            )
        )  # fmt: skip
    for student, teacher in ((half, half), (brain, half), (brain, brain), (whole, whole)):
        pair = student if student == teacher else f"{student}, teacher's {teacher}"
        pointers = {"student": f"*{student}", "teacher": f"*{teacher}", "gradient": f"*{student}", "index": "*i64"}
        pointers |= dict.fromkeys(("logv", "loss"), "*fp32")
        floats = ("label_scale", "scale", "expected")
        for words, kernel, tile, registers in (
            ("cross_entropy", cross_entropy_kernel, cross_entropy_meta(prototypes), 80),
            ("long rows' cross_entropy", long_rows.long_cross_entropy_kernel,
             {"COLUMNS": long_rows.TILE, "num_warps": 4}, 160),
        ):  # fmt: skip
            types, tile = _types(kernel, pointers, floats), {"GRADIENT": True, **tile}
            found.append(Build(f"{words} {pair}", kernel, types, tile, registers, aligned=strides))
    for dtype, by in ((brain, NEAREST), (whole, NEAREST), (half, NEAREST[:1])):
        for words, cosine, folds in by:
            pointers = {"student": f"*{dtype}", "teacher": f"*{dtype}", "fold": "*i32" if folds else "*i64"}
            pointers |= {"index": "*i64", "similarity": "*fp32"}
            found.append(
                Build(
                    f"nearest_patch{words} {dtype}", nearest_kernel, _types(nearest_kernel, pointers),
                    {"COSINE": cosine, "FOLDS": folds, **nearest_meta(DTYPES[dtype])}, registers=128,
                    tensor_cores=dtype != whole, aligned=tokens,
                )
            )  # fmt: skip
    affine = tuple(f"{kind}_{channel}" for kind in ("scale", "shift") for channel in "rgb")
    for dtype in (brain, half, whole):
        found.append(
            Build(
                f"patch_tokens {dtype}", tokens_kernel,
                _types(tokens_kernel, {"images": "*u8", "ids": "*i64", "tokens": f"*{dtype}"}, affine),
                {"SIZE": patch_size, **tokens_meta(patch_size)}, registers=48, aligned=tokens,
            )
        )  # fmt: skip
    pointers = {"images": "*u8", "choices": "*u8", "source": "*u8", "unblurred": "*u8", "taps": "*i32", "sums": "*i32",
                "numbers": "*fp32", "means": "*fp32"}  # fmt: skip
    planes = ("pixels", "height", "width")
    tile = {"PIXELS": PIXELS, **photometric_meta()}
    found.append(Build("luma_sums", luma_kernel, _types(luma_kernel, pointers), tile, registers=160, aligned=planes))
    for dtype, name in (("*u8", "bytes"), ("*bf16", "bf16")):
        types = _types(point_kernel, pointers | {"changed": dtype}, affine)
        tile = {"NORMALISED": dtype != "*u8", "PIXELS": PIXELS, **photometric_meta()}
        found.append(Build(f"photometric {name}", point_kernel, types, tile, registers=160, aligned=planes))
    for down, dtype, name in ((False, "*u8", "bytes"), (True, "*u8", "bytes"), (True, "*bf16", "bf16")):
        types = _types(blur_kernel, pointers | {"target": dtype}, affine)
        tile = {"DOWN": down, "NORMALISED": dtype != "*u8", "TINY": False, "RADIUS": RADIUS, "LINES": LINES,
                "COLUMNS": COLUMNS, **photometric_meta()}  # fmt: skip
        way = "down" if down else "along"
        # Triton 3.6 takes 157 along the rows on sm_80, and spills none.
        found.append(Build(f"blur {way} {name}", blur_kernel, types, tile, registers=160, aligned=planes))
    return found


def _sweeps_of_long_rows(dtype: str, aligned: tuple[str, ...]) -> list[Build]:
    """What more prototypes than fit into registers are swept with, the same for any number of them."""
    pointers = {"logits": f"*{dtype}"} | dict.fromkeys(("logv", "peaks", "totals", "sums"), "*fp32")
    return [
        Build(f"long rows' {words} {dtype}", kernel, _types(kernel, pointers, ("scale",)), tile, registers,
              aligned=aligned)
        for words, kernel, tile, registers in (
            ("maxima", long_rows.row_peak_kernel, {"COLUMNS": long_rows.TILE, "num_warps": 4}, 96),
            ("column sums", long_rows.column_sums_kernel,
             {"ROWS": long_rows.ROWS, "COLUMNS": long_rows.COLUMNS, "num_warps": 4}, 128),
        )
    ]  # fmt: skip


def examine(build: Build, target: str) -> Findings:
    """Compile for the target and read the machine code."""
    options = {name: number for name, number in build.tile.items() if name.startswith(("num_", "enable_"))}
    if build.kernel is tokens_kernel:
        options["num_warps"] = tokens_meta(build.tile["SIZE"], TARGETS[target].warp_size)["num_warps"]
    if build.kernel in (luma_kernel, point_kernel, blur_kernel):
        options |= photometric_meta(TARGETS[target].warp_size)
    constants = {name: number for name, number in build.tile.items() if name not in options}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(build.types.items())
        if (kind.startswith("*") or name in build.aligned) and not build.unaligned
    }
    source = ASTSource(build.kernel, build.types, constants, aligned)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("gfx"):
        code = compiled.asm["amdgcn"]
        spills = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", code)))
        registers = max(map(int, re.findall(r"\.vgpr_count:\s*(\d+)", code)))
    else:
        code, usage = _disassemble(compiled.asm["cubin"])
        spills = len(re.findall(SPILLS, code))
        registers = int(re.findall(r"REG:(\d+)", usage)[0])
    return Findings(
        registers,
        spills,
        len(re.findall(WIDE_LOADS, code)),
        len(re.findall(TENSOR_CORES, code)),
        compiled.metadata.shared,
    )


def faults(build: Build, target: str, found: Findings) -> list[str]:
    """In which ways the machine code is not what it must be."""
    # AMD counts registers of another width and file; there spills alone say that they did not suffice.
    too_many = found.registers > build.registers and not target.startswith("gfx")
    checks = {
        f"{found.registers} registers, more than {build.registers}": too_many,
        f"{found.spills} spills": found.spills > 0,
        "no 16-byte load": build.wide_loads and found.wide_loads == 0,
        "no tensor-core instruction": build.tensor_cores and found.tensor_cores == 0,
        f"{found.shared} bytes of shared memory": found.shared > SHARED_LIMIT[target],
    }
    return [sentence for sentence, wrong in checks.items() if wrong]


def spoilt() -> Iterator[tuple[str, str, Build]]:
    """The words of a fault, a target, and a build that must have it: proof that every check can fail."""
    known = {build.name: build for build in builds()}
    sweep, nearest = known["assigned_sums fp16"], known["nearest_patch bf16"]
    long_rows = replace(sweep, tile={"ROWS": 2, "COLUMNS": 16384, "num_warps": 4})
    large = replace(nearest, tile={**nearest.tile, "ROWS": 128, "PATCHES": 128, "FEATURES": 128, "num_stages": 6})
    yield "spills", "sm_90", long_rows
    yield "spills", "gfx942", large
    yield "registers", "sm_100", replace(sweep, tile={"ROWS": 2, "COLUMNS": 4096, "num_warps": 4})
    for target in ("sm_80", "gfx942"):
        yield "no 16-byte load", target, replace(sweep, unaligned=True)
    yield "no tensor-core instruction", "sm_80", replace(known["nearest_patch fp32"], tensor_cores=True)
    yield "no tensor-core instruction", "gfx942", replace(sweep, tensor_cores=True)
    yield "shared memory", "sm_80", large


def _disassemble(cubin: bytes) -> tuple[str, str]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        return tuple(  # pyright: ignore[reportReturnType]
            subprocess.run([tools / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout
            for tool, *flags in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    finally:
        Path(file.name).unlink()
