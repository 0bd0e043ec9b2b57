"""Stages `kernels` and `bandwidth`: every kernel against float64, and how near each comes to the memory's own rate."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench_kernels
from benchmarks.baseline import sinkhorn as plain_sinkhorn
from benchmarks.gpu.task import Task
from benchmarks.step_cases import matrix_rate
from fastpmae_kernels import (
    nearest_patch,
    patch_tokens,
    patch_tokens_ref,
    photometric,
    photometric_ref,
    prototype_cross_entropy,
    prototype_cross_entropy_from_features,
    sinkhorn_bias,
    sinkhorn_bias_from_features,
    sinkhorn_bias_ref,
    traffic,
)
from fastpmae_kernels.traffic import Traffic

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (FP32, FP16, BF16)
EPSILON, TEMPERATURE, ITERATIONS = bench_kernels.EPSILON, bench_kernels.TEMPERATURE, bench_kernels.ITERATIONS
ODD = ((1, 1), (5, 17), (70, 300), (600, 33))
"""Rows and prototypes that no block size divides."""
LOSS, BIAS, SCORE = 1e-5, 2e-4, 1e-5
"""Largest error of a loss relative to the largest, of Sinkhorn's bias, and of what the nearest patch falls short."""
GRADIENT = {FP32: 1e-4, FP16: 2e-3, BF16: 1e-2}
TOKENS = {FP32: 1e-6, FP16: 1e-3, BF16: 4e-3}


def among_nan(rows: int, columns: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Numbers in [-1, 1) with NaN on all sides: what a kernel reads beyond its matrix shows."""
    generator = torch.Generator().manual_seed(seed)
    around = torch.full((rows + 2, columns + 8), float("nan"), dtype=dtype, device=device)
    inside = around[1 : rows + 1, :columns]
    inside.copy_(torch.rand(rows, columns, generator=generator) * 2 - 1)
    return inside


def error(got: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest value; NaN where anything found is not finite."""
    if not bool(torch.isfinite(got).all()):
        return float("nan")
    difference = (got.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp(min=1e-30))


def kernels(task: Task) -> None:
    """Each kernel x fp32, fp16, bf16 and the trainer's mixed pair x odd sizes and the paper's."""
    wide = 20_000 if not task.tiny else 700  # longer than a row that fits a program's registers
    # The trainer's own size first: after a read out of bounds a GPU answers this process nothing any more.
    for rows, columns in ((task.sizes.check_rows, task.sizes.prototypes), *ODD, (48, wide)):
        for dtype in DTYPES:
            with task.record.trying(f"sinkhorn {rows} x {columns} {dtype}"):
                check_sinkhorn(task, rows, columns, dtype)
            # The trainer's pair: the student's logits in bf16, the teacher's in fp16.
            for teacher_dtype in dict.fromkeys((dtype, FP16)):
                with task.record.trying(f"cross_entropy {rows} x {columns} {dtype}, teacher {teacher_dtype}"):
                    check_cross_entropy(task, rows, columns, dtype, teacher_dtype)
    for dtype in DTYPES:
        for masked, dim, folds in ((147, 768, (49, 49, 49)), (147, 384, (49, 49, 49)), (13, 24, (5, 4, 4))):
            for metric in ("cosine", "l2"):
                for scope in ("image", "fold"):
                    with task.record.trying(f"nearest_patch {masked} x {dim} {dtype} {metric} {scope}"):
                        check_nearest(task, masked, dim, folds, dtype, metric, scope)
    for dtype in DTYPES:
        with task.record.trying(f"patch_tokens {dtype}"):
            check_patch_tokens(task, dtype)
    with task.record.trying("photometric"):
        check_photometric(task)
    with task.record.trying("from_features"):
        check_from_features(task)
    if task.cuda and not task.tiny:
        with task.record.trying("beyond 2^31"):
            check_far_offsets(task)


def check_sinkhorn(task: Task, rows: int, columns: int, dtype: torch.dtype) -> None:
    logits = among_nan(rows, columns, dtype, task.device)
    exact = sinkhorn_bias_ref(logits.double(), EPSILON, ITERATIONS)
    away = (sinkhorn_bias(logits, EPSILON, ITERATIONS).double() - exact).abs().max()
    task.record.check("sinkhorn", float(away), BIAS, case=f"{rows} x {columns} {dtype}")


def check_cross_entropy(task: Task, rows: int, columns: int, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    """Losses and gradients, written beside the student's logits and over them."""
    student = among_nan(rows, columns, dtype, task.device, 1)
    teacher = among_nan(rows + 3, columns, teacher_dtype, task.device, 2)
    generator = torch.Generator().manual_seed(3)
    logv = torch.randn(columns, generator=generator).to(task.device)
    index = torch.randint(rows + 3, (rows,), generator=generator).to(task.device)
    exact = student.double().detach().requires_grad_()
    label = torch.softmax(teacher.double()[index] / EPSILON + logv.double(), dim=1)
    expected = -(label * torch.log_softmax(exact / TEMPERATURE, dim=1)).sum(dim=1)
    (slope,) = torch.autograd.grad(expected.mean(), exact)
    for overwrite in (False, True):
        leaf = student.detach().clone().requires_grad_()
        found = prototype_cross_entropy(
            leaf * 1, teacher, logv, index, EPSILON, TEMPERATURE, overwrite=overwrite, expected_gradient=1 / rows
        )
        found.mean().backward()
        assert leaf.grad is not None
        case = f"{rows} x {columns} {dtype}, teacher {teacher_dtype}{', written over' * overwrite}"
        task.record.check("cross_entropy", error(found.detach(), expected.detach()), LOSS, case=case)
        task.record.check("cross_entropy gradient", error(leaf.grad, slope), GRADIENT[dtype], case=case)


def check_nearest(
    task: Task, masked: int, dim: int, folds: tuple[int, ...], dtype: torch.dtype, metric: str, scope: str
) -> None:
    """How much less similar the patch that is found is than the nearest one in float64."""
    generator = torch.Generator().manual_seed(4)
    batch = 64 if not task.tiny else 2
    student, teacher = (
        torch.randn(batch, masked, dim, generator=generator).to(task.device, dtype) for _ in range(2)
    )  # fmt: skip
    match = nearest_patch(student, teacher, metric, scope, folds)  # pyright: ignore[reportArgumentType]
    ours, theirs = student.double(), teacher.double()
    if metric == "cosine":
        score, scale = F.normalize(ours, dim=-1) @ F.normalize(theirs, dim=-1).mT, 1
    else:
        score, scale = -torch.cdist(ours, theirs).square(), 2 * dim
    if scope == "fold":
        fold = torch.cat([torch.full((size,), number) for number, size in enumerate(folds)]).to(task.device)
        score = score.masked_fill(fold[:, None] != fold[None, :], -torch.inf)
    short = (score.amax(2) - score.gather(2, match.unsqueeze(2)).squeeze(2)).max() / scale
    task.record.check("nearest_patch", float(short), SCORE, case=f"{masked} x {dim} {dtype} {metric} {scope}")


def check_patch_tokens(task: Task, dtype: torch.dtype) -> None:
    images, ids = made_images(task, 8)
    found = patch_tokens(images, ids, 16, dtype)
    exact = patch_tokens_ref(images, ids, 16, torch.float64)
    task.record.check("patch_tokens", error(found, exact), TOKENS[dtype], case=str(dtype))
    if task.cuda:  # a patch that is not there must show; the CPU's form refuses it
        ids[0, 0] = 9999
        task.record.note("patch_tokens outside", ok=bool(patch_tokens(images, ids, 16, dtype)[0, 0].isnan().all()))


def made_images(task: Task, count: int) -> tuple[Tensor, Tensor]:
    """Random bytes, and the masked patches of each image."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8, generator=generator)
    ids = torch.stack([torch.randperm(196, generator=generator)[:147] for _ in range(count)])
    return images.to(task.device), ids.to(task.device)


def check_photometric(task: Task) -> None:
    """The device's colours against the CPU's, which the tests hold to the plain form byte for byte."""
    images, factors, choices = bench_kernels.made_views("cpu", 64 if not task.tiny else 2)
    expected = photometric(images, factors, choices)
    found = photometric(images.to(task.device), factors.to(task.device), choices.to(task.device)).cpu()
    apart = (found.int() - expected.int()).abs()
    # A device may contract a multiplication and an addition: a value on the edge then rounds the other way.
    task.record.check("photometric", int(apart.max()), 2, differing=float((apart > 0).double().mean()))
    small = images[:4, :, :9, :13].contiguous()  # narrower than the blur reaches
    factors, choices = factors[:4], choices[:4]
    found = photometric(small.to(task.device), factors.to(task.device), choices.to(task.device)).cpu()
    apart = (found.int() - photometric_ref(small, factors, choices).int()).abs()
    task.record.check("photometric, narrow", int(apart.max()), 2)


def check_from_features(task: Task) -> None:
    """Bias and loss where logits exist a chunk at a time."""
    rows, count = (4000, 4096) if not task.tiny else (60, 64)
    chunk = count // 4
    generator = torch.Generator().manual_seed(6)
    student, teacher, ours, theirs = (
        F.normalize(torch.randn(number, 256, generator=generator), dim=1).to(task.device)
        for number in (rows, rows, count, count)
    )
    index = torch.randint(rows, (rows,), generator=generator).to(task.device)
    exact_logits = teacher.double() @ theirs.double().T
    exact = sinkhorn_bias_ref(exact_logits, EPSILON, ITERATIONS)
    logv = sinkhorn_bias_from_features(teacher, theirs, EPSILON, ITERATIONS, prototypes_chunk=chunk)
    task.record.check("sinkhorn from features", float((logv.double() - exact).abs().max()), 1e-3)
    student.requires_grad_()
    ours.requires_grad_()
    loss = prototype_cross_entropy_from_features(
        student, ours, teacher, theirs, logv, index, EPSILON, TEMPERATURE, chunk
    )
    found = torch.autograd.grad(loss, (student, ours))
    truth = student.detach().double().requires_grad_(), ours.detach().double().requires_grad_()
    label = torch.softmax(exact_logits[index] / EPSILON + logv.double(), 1)
    score = torch.log_softmax(truth[0] @ truth[1].T / TEMPERATURE, 1)
    expected = -(label * score).sum(1).mean()
    task.record.check("loss from features", error(loss.detach(), expected.detach()), LOSS)
    for name, slope, exact_slope in zip(
        ("features", "prototypes"), found, torch.autograd.grad(expected, truth), strict=True
    ):
        task.record.check("loss from features, gradient", error(slope, exact_slope), 1e-3, case=name)


def check_far_offsets(task: Task) -> None:
    """600,000 x 4,096 logits: offsets past 2^31 numbers. Rows at both ends against the same rows alone."""
    rows, prototypes = 600_000, 4096
    logits = torch.empty(rows, prototypes, dtype=FP16, device=task.device).uniform_(-1, 1)
    ends = torch.cat([logits[:8], logits[-8:]])
    index = torch.arange(rows, device=task.device)
    logv = sinkhorn_bias(logits, EPSILON, ITERATIONS)
    few = prototype_cross_entropy(ends, ends, logv, torch.arange(16, device=task.device), EPSILON, TEMPERATURE)
    found = prototype_cross_entropy(logits, logits, logv, index, EPSILON, TEMPERATURE)
    task.record.check("beyond 2^31", error(torch.cat([found[:8], found[-8:]]), few), 1e-6, case="cross_entropy")
    exact = sum_of_columns(logits, logv)
    task.record.check("beyond 2^31", float((exact / exact.mean() - 1).abs().max()), 0.2, case="balanced columns")
    leaf = logits.clone().requires_grad_()
    loss = prototype_cross_entropy(
        leaf * 1, logits, logv, index, EPSILON, TEMPERATURE, overwrite=True, expected_gradient=1.0
    )
    loss.sum().backward()
    assert leaf.grad is not None
    small = ends.clone().requires_grad_()
    prototype_cross_entropy(
        small, ends, logv, torch.arange(16, device=task.device), EPSILON, TEMPERATURE, expected_gradient=1.0
    ).sum().backward()
    assert small.grad is not None
    far = torch.cat([leaf.grad[:8], leaf.grad[-8:]])
    task.record.check("beyond 2^31", error(far, small.grad), 1e-6, case="cross_entropy gradient")


def sum_of_columns(logits: Tensor, logv: Tensor) -> Tensor:
    total = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device)
    for rows in logits.split(50_000):
        total += torch.softmax(rows.float() / EPSILON + logv, 1).double().sum(0)
    return total


def bandwidth(task: Task) -> None:
    """Each operation at a batch of 768, as a share of the measured copy, and against the usual code."""
    sizes, device, record = task.sizes, task.device, task.record
    batch, masked, prototypes, dim = sizes.kernel_batch, sizes.masked, sizes.prototypes, sizes.dim
    rows = batch * masked
    source = torch.empty(2**30 if not task.tiny else 2**20, dtype=torch.uint8, device=device)
    copied = 2 * source.nbytes / task.median(source.clone)
    del source
    record.note("copy", bytes_per_second=copied)
    record.note("matrix product", flops_per_second=matrix_rate(device, 8192 if not task.tiny else 64))

    def tell(name: str, run: Callable[[], object], moved: Traffic, usual: float | None = None) -> None:
        seconds = task.median(run)
        rate = moved.total / seconds
        record.note(
            name, milliseconds=1e3 * seconds, bytes_per_second=rate, of_copy=rate / copied,
            usual_milliseconds=None if usual is None else 1e3 * usual, times=None if usual is None else usual / seconds,
        )  # fmt: skip

    logits = torch.empty(rows, prototypes, dtype=FP16, device=device).uniform_(-1, 1)
    with record.trying("sinkhorn"):
        usual = task.median(lambda: plain_sinkhorn(logits.float(), EPSILON, ITERATIONS))
        tell("sinkhorn", lambda: sinkhorn_bias(logits, EPSILON, ITERATIONS), traffic.sinkhorn(rows, prototypes), usual)
    with record.trying("cross_entropy"):
        logv = sinkhorn_bias(logits, EPSILON, ITERATIONS)
        index = torch.randperm(rows, device=device)
        few = min(64, batch) * masked  # the usual code does not fit a GPU at 768 images; its time grows evenly
        leaf = logits[:few].bfloat16().requires_grad_()
        label, own = torch.softmax(logits[:few].float() / EPSILON + logv, 1), index[:few] % few

        def usual_loss() -> None:
            loss = bench_kernels.usual_cross_entropy(leaf, label, own)
            torch.autograd.grad(loss, leaf)

        usual = task.median(usual_loss) * rows / few
        del leaf, label
        student = torch.empty(rows, prototypes, dtype=BF16, device=device).uniform_(-1, 1)

        def our_loss() -> None:
            leaf = student.detach().requires_grad_()
            # A view is no leaf, so the gradient goes over the logits, as in the trainer.
            loss = bench_kernels.our_cross_entropy(leaf.view_as(leaf), logits, logv, index)
            torch.autograd.grad(loss, leaf)

        moved = traffic.cross_entropy(rows, prototypes) + traffic.scale_rows(rows)
        tell("cross_entropy with its gradient", our_loss, moved, usual)
        del student
    del logits
    with record.trying("nearest_patch"):
        ours, theirs = (torch.randn(batch, masked, dim, device=device, dtype=BF16) for _ in range(2))
        usual = task.median(lambda: bench_kernels.nearest_by_cdist(ours.float(), theirs.float()))
        moved = traffic.nearest_patch(batch, masked, masked, dim)
        tell("nearest_patch", lambda: nearest_patch(ours, theirs), moved, usual)
        del ours, theirs
    with record.trying("patch_tokens"):
        images, ids = made_images(task, batch)
        tell("patch_tokens", lambda: patch_tokens(images, ids, 16, BF16), traffic.patch_tokens(batch, 147, 16))
        del images, ids
    with record.trying("photometric"):
        images, factors, choices = bench_kernels.made_views(device.type, batch)
        moved = traffic.photometric(batch, 224, 224, round(0.8 * batch), round(0.55 * batch))
        tell("photometric", lambda: photometric(images, factors, choices), moved)
