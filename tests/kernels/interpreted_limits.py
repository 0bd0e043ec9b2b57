"""Every Triton kernel in Triton's interpreter at its limits: long rows, far memory, errors, and the bytes it moves."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpmae_kernels import backend, nearest_patch_similarity, traffic
from fastpmae_kernels.long_rows import LONGEST_ROW
from fastpmae_kernels.match import nearest_patch_triton
from fastpmae_kernels.patch_tokens import IMAGENET_MEAN, IMAGENET_STD, patch_tokens_ref, patch_tokens_triton
from fastpmae_kernels.photometric import photometric_ref
from fastpmae_kernels.photometric_gpu import photometric_triton
from fastpmae_kernels.prototype_loss import on_gpu, prototype_cross_entropy_ref, scale_rows_triton
from fastpmae_kernels.sinkhorn import assigned_sums_triton, column_logsumexp_triton
from tests.kernels.interpreting import (
    DTYPES,
    assert_close,
    assert_moved,
    made_bytes,
    made_draws,
    made_logits,
    similarity_of,
    sparse,
)  # fmt: skip

# Interpreted, a masked lane's inf - inf makes numpy warn.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LONG = [
    pytest.param(17, LONGEST_ROW + 1, id="one too many, in parts"),
    pytest.param(1, 65_536, id="DINOv2's"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "prototypes"), LONG)
def test_rows_longer_than_the_registers(rows: int, prototypes: int, dtype: torch.dtype, counted: dict[str, int]):
    student, teacher = made_logits(rows, prototypes, dtype), made_logits(rows + 1, prototypes, dtype, 1)
    logv = torch.randn(prototypes, generator=torch.Generator().manual_seed(1)) * 10
    expected = torch.softmax(student.double() / 0.05 + logv.double(), dim=1).sum(dim=0)
    sums = assigned_sums_triton(student, logv, 0.05)
    assert_moved(counted, traffic.assigned_sums(rows, prototypes, dtype.itemsize))
    assert_close(sums, expected, 1e-5)

    index = torch.arange(1, rows + 1)
    exact = student.double().requires_grad_()
    truth = prototype_cross_entropy_ref(exact, teacher.double(), logv.double(), index)
    (slope,) = torch.autograd.grad(0.25 * truth.sum(), exact)
    assert_close(on_gpu(student, teacher, logv, index, 0.05, 0.1, 0.25, None), truth.detach(), 2e-5)
    assert_moved(counted, traffic.cross_entropy(rows, prototypes, dtype.itemsize, gradient=False))
    loss = on_gpu(student, teacher, logv, index, 0.05, 0.1, 0.25, student)
    assert_moved(counted, traffic.cross_entropy(rows, prototypes, dtype.itemsize))
    assert_close(loss, truth.detach(), 2e-5)
    assert_close(student, slope, 2e-5 if dtype == torch.float32 else 1.1e-3)
    assert student._base is not None
    assert student._base[:, [0, -2, -1]].isnan().all()


def test_long_rows_of_extreme_logits_and_without_a_label():
    prototypes = LONGEST_ROW + 30
    student, teacher = made_logits(4, prototypes, torch.float32) * 1e5, made_logits(4, prototypes, torch.float32, 1)
    teacher *= 1e5
    teacher[0, :10] = -math.inf
    teacher[2, 5] = math.nan
    logv, index = torch.zeros(prototypes), torch.tensor([0, 4, 2, 3])
    gradient = torch.empty(4, prototypes)
    loss = on_gpu(student, teacher, logv, index, 0.05, 0.1, 1.0, gradient)
    assert loss.isnan().tolist() == gradient.isnan().all(dim=1).tolist() == [False, True, True, False]
    sound = [0, 3]
    truth = prototype_cross_entropy_ref(student[sound].double(), teacher.double(), logv, index[sound])
    torch.testing.assert_close(loss[sound].double(), truth, rtol=1e-5, atol=1e-3)
    assert assigned_sums_triton(teacher, logv, 0.05).isnan().all()
    sums = assigned_sums_triton(teacher[sound], logv, 0.05)
    torch.testing.assert_close(sums.sum(), torch.tensor(2.0))
    assert (assigned_sums_triton(torch.empty(0, prototypes), logv, 0.05) == 0).all()
    assert on_gpu(student[:0], teacher, logv, index[:0], 0.05, 0.1, 1.0, None).shape == (0,)


def test_rows_past_two_to_the_31st_element():
    """Three rows 2^31 elements apart."""
    stride, columns = 2**31 + 64, 40
    memory = sparse(2 * stride + columns, np.float16)
    far = memory.as_strided((3, columns), (stride, 1))
    near = made_logits(3, columns, torch.float16).contiguous()
    far.copy_(near)
    for a, b in zip(column_logsumexp_triton(far, 0.05), column_logsumexp_triton(near, 0.05), strict=True):
        assert torch.equal(a, b)
    logv = torch.linspace(-1, 1, columns)
    assert torch.equal(assigned_sums_triton(far, logv, 0.05), assigned_sums_triton(near, logv, 0.05))
    index = torch.tensor([2, 0, 1])
    gradient = torch.empty_like(near)
    loss = on_gpu(near, near, logv, index, 0.05, 0.1, 1.0, gradient)
    assert torch.equal(on_gpu(far, far.clone(), logv, index, 0.05, 0.1, 1.0, far), loss)
    assert torch.equal(far, gradient)
    scale_rows_triton(far, torch.tensor([1.0, 1.0, 0.5]))
    assert torch.equal(far[2], gradient[2] * 0.5)


def test_long_rows_past_two_to_the_31st_element():
    stride, columns = 2**31 + 64, LONGEST_ROW + 3
    far = sparse(stride + columns, np.float16).as_strided((2, columns), (stride, 1))
    near = made_logits(2, columns, torch.float16).contiguous()
    far.copy_(near)
    logv, index = torch.linspace(-1, 1, columns), torch.tensor([1, 0])
    assert torch.equal(assigned_sums_triton(far, logv, 0.05), assigned_sums_triton(near, logv, 0.05))
    gradient = torch.empty_like(near)
    loss = on_gpu(near, near, logv, index, 0.05, 0.1, 1.0, gradient)
    assert torch.equal(on_gpu(far, far.clone(), logv, index, 0.05, 0.1, 1.0, far), loss)
    assert torch.equal(far, gradient)


@pytest.mark.parametrize("apart", ["images", "tokens"])
def test_tokens_past_two_to_the_31st_element(apart: str):
    far, near = 2**31 + 64, 3 * 40
    strides = (far, 40, 1) if apart == "images" else (40, far, 1)
    generator = torch.Generator().manual_seed(8)
    student, teacher = (torch.randn(2, 3, 40, generator=generator).half() for _ in range(2))
    distant = [sparse(2 * far + near, np.float16).as_strided((2, 3, 40), strides).copy_(t) for t in (student, teacher)]
    for got, expected in zip(
        nearest_patch_triton(*distant, True, []), nearest_patch_triton(student, teacher, True, []), strict=True
    ):
        assert torch.equal(got, expected)


def test_pixels_past_two_to_the_31st():
    """The last patch of the third of three images of 800 million bytes each."""
    side = 16_384
    images = sparse(3 * 3 * side**2, np.uint8).view(3, 3, side, side)
    images[2, :, -8:, -8:] = torch.arange(192).view(3, 8, 8)
    ids = torch.full((3, 1), (side // 8) ** 2 - 1)
    tokens = patch_tokens_triton(images, ids, 8, torch.float32, [0.0] * 3, [1 / 255] * 3)
    torch.testing.assert_close(tokens[2, 0], torch.arange(192.0))
    assert (tokens[:2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_error_is_within_twice_that_of_plain_torch(dtype: torch.dtype):
    """Of the same mathematics in the dtype; a unit of the result's last place is beyond anybody's reach."""

    def assert_within(got: Tensor, plain: Tensor, exact: Tensor) -> None:
        unit = torch.finfo(got.dtype).eps * exact.abs().max().item()
        allowed = 2 * (plain.double() - exact).abs().max().item() + unit
        assert (got.double() - exact).abs().max().item() <= allowed

    student, teacher = made_logits(70, 300, dtype), made_logits(70, 300, dtype, 1)
    peak, total = column_logsumexp_triton(teacher, 0.05)
    bias = -(peak + total.log())
    exact_bias = -(teacher.double() / 0.05).logsumexp(dim=0)
    assert_within(bias, -(teacher.float() / 0.05).logsumexp(dim=0), exact_bias)
    sums = assigned_sums_triton(teacher, bias, 0.05)
    plain = torch.softmax(teacher.float() / 0.05 + bias, dim=1).sum(dim=0)
    assert_within(sums, plain, torch.softmax(teacher.double() / 0.05 + bias.double(), dim=1).sum(dim=0))

    index = torch.arange(70).flip(0)
    found = []
    for kind in (dtype, torch.float64):
        leaf = student.to(kind).requires_grad_()
        wide = bias.to(torch.promote_types(kind, bias.dtype))
        loss = prototype_cross_entropy_ref(leaf, teacher.to(kind), wide, index)
        found += [loss.detach(), *torch.autograd.grad(loss.sum(), leaf)]
    gradient = torch.empty(70, 300, dtype=dtype)
    assert_within(on_gpu(student, teacher, bias, index, 0.05, 0.1, 1.0, gradient), found[0], found[2])
    assert_within(gradient, found[1], found[3])

    student, teacher = (torch.randn(2, 70, 40, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (0, 1))
    for metric in ("cosine", "l2"):
        place, similarity = nearest_patch_triton(student, teacher, metric == "cosine", [])
        exact = similarity_of(student, teacher, metric).gather(2, place.unsqueeze(2)).squeeze(2)
        with backend.use("ref"):
            assert_within(similarity, nearest_patch_similarity(student, teacher, metric)[1], exact)

    images, affine = made_bytes(3, 16, 24), (list(IMAGENET_MEAN), list(IMAGENET_STD))
    ids = torch.tensor([[5, 0], [1, 4], [2, 3]])
    truth = patch_tokens_ref(images, ids, 8, torch.float64)
    assert_within(patch_tokens_triton(images, ids, 8, dtype, *affine), patch_tokens_ref(images, ids, 8, dtype), truth)
    drawn = made_draws([(1, 0, 1, 0), (0, 1, 0, 1), (1, 0, 0, 0)], 0.5)
    truth = photometric_ref(images, *drawn, dtype=torch.float64)
    plain = photometric_ref(images, *drawn, dtype=dtype)
    assert_within(photometric_triton(images, *drawn, 128, dtype, *affine), plain, truth)


@pytest.mark.parametrize(("rows", "prototypes"), [(5, 17), (70, 300), (40, 2048), (130, 40)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_traffic_model_counts_what_the_kernels_move(
    rows: int, prototypes: int, dtype: torch.dtype, counted: dict[str, int]
):
    logits, logv, size = made_logits(rows, prototypes, dtype), torch.zeros(prototypes), dtype.itemsize
    column_logsumexp_triton(logits, 0.05)
    assert_moved(counted, traffic.column_logsumexp(rows, prototypes, size))
    assigned_sums_triton(logits, logv, 0.05)
    assert_moved(counted, traffic.assigned_sums(rows, prototypes, size))
    index = torch.arange(rows)
    on_gpu(logits, logits, logv, index, 0.05, 0.1, 1.0, None)
    assert_moved(counted, traffic.cross_entropy(rows, prototypes, size, gradient=False))
    on_gpu(logits, logits.clone(), logv, index, 0.05, 0.1, 1.0, logits)
    assert_moved(counted, traffic.cross_entropy(rows, prototypes, size))
    scale_rows_triton(logits, torch.ones(rows))
    assert_moved(counted, traffic.scale_rows(rows))


@pytest.mark.parametrize(("masked", "patches", "dim"), [(5, 7, 3), (65, 130, 40), (147, 147, 64)])
def test_the_traffic_model_counts_what_the_match_moves(
    masked: int, patches: int, dim: int, counted: dict[str, int]
):  # fmt: skip
    student, teacher = torch.randn(2, masked, dim), torch.randn(2, patches, dim)
    nearest_patch_triton(student, teacher, True, [])
    assert_moved(counted, traffic.nearest_patch(2, masked, patches, dim, 4))


@pytest.mark.parametrize("patch_size", [3, 16])
def test_the_traffic_model_counts_what_patch_tokens_move(patch_size: int, counted: dict[str, int]):
    images = torch.zeros(2, 3, 2 * patch_size, 2 * patch_size, dtype=torch.uint8)
    ids = torch.tensor([[3, 0, 1], [1, 1, 2]])
    patch_tokens_triton(images, ids, patch_size, torch.float16, list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert_moved(counted, traffic.patch_tokens(2, 3, patch_size, 2))


def test_the_traffic_model_counts_what_photometric_moves(counted: dict[str, int]):
    images = made_bytes(4, 30, 20)
    factors, choices = made_draws([(0, 0, 0, 0), (1, 0, 0, 1), (0, 1, 0, 0), (1, 0, 1, 0)], 2.0)
    photometric_triton(images, factors, choices, 128, torch.float16, list(IMAGENET_MEAN), list(IMAGENET_STD))
    model = traffic.photometric(4, 30, 20, jittered=2, blurred=1, itemsize=2)
    assert counted["stored"] == model.written
    # the drawn numbers, for each program of each kernel
    programs = 4 * (1 + 1 + 2 * 6)
    assert 0 <= counted["loaded"] - model.read - model.again <= 64 * programs
