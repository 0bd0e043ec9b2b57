"""Every Triton kernel in Triton's interpreter, against float64. Run by `test_triton.py` in a process of its own."""

import math

import pytest
import torch

from fastpmae_kernels.match import nearest_patch_ref, nearest_patch_triton
from fastpmae_kernels.patch_tokens import IMAGENET_MEAN, IMAGENET_STD, patch_tokens_ref, patch_tokens_triton
from fastpmae_kernels.photometric import photometric_ref
from fastpmae_kernels.photometric_gpu import photometric_triton
from fastpmae_kernels.prototype_loss import on_gpu, prototype_cross_entropy_ref, scale_rows_triton
from fastpmae_kernels.sinkhorn import assigned_sums_triton, column_logsumexp_triton
from tests.kernels.interpreting import DTYPES, assert_close, made_bytes, made_draws, made_logits, similarity_of

# Interpreted, a masked lane's inf - inf makes numpy warn.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = [
    pytest.param(1, 1, id="one number"),
    pytest.param(1, 4096, id="one row"),
    pytest.param(37, 1, id="one prototype"),
    pytest.param(5, 17, id="tiny and odd"),
    pytest.param(70, 300, id="no multiple of any tile"),
    pytest.param(40, 2048, id="whole tiles"),
    pytest.param(600, 33, id="more rows than parts"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "prototypes"), SHAPES)
def test_column_logsumexp(rows: int, prototypes: int, dtype: torch.dtype):
    logits = made_logits(rows, prototypes, dtype)
    peak, total = column_logsumexp_triton(logits, 0.05)
    assert_close(peak + total.log(), (logits.double() / 0.05).logsumexp(dim=0), 1e-5)
    assert_close(peak, (logits.double() / 0.05).amax(dim=0), 1e-5)


def test_column_logsumexp_of_extreme_logits():
    logits = made_logits(50, 20, torch.float32) * 1e30
    logits[:, 3] = -math.inf
    logits[7, 5] = math.nan
    peak, total = column_logsumexp_triton(logits, 0.05)
    assert peak[3] == -math.inf
    assert total[3] == 0
    assert math.isnan((peak + total.log())[5])
    rest = [j for j in range(20) if j not in (3, 5)]
    torch.testing.assert_close((peak + total.log())[rest], (logits / 0.05).logsumexp(dim=0)[rest])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "prototypes"), SHAPES)
def test_assigned_sums(rows: int, prototypes: int, dtype: torch.dtype):
    logits = made_logits(rows, prototypes, dtype)
    logv = torch.randn(prototypes, generator=torch.Generator().manual_seed(1)) * 10
    expected = torch.softmax(logits.double() / 0.05 + logv.double(), dim=1).sum(dim=0)
    sums = assigned_sums_triton(logits, logv, 0.05)
    assert_close(sums / rows, expected / rows, 1e-5)


def test_no_rows_at_all():
    logits = torch.empty(0, 20)
    peak, total = column_logsumexp_triton(logits, 0.05)
    assert (peak == -math.inf).all()
    assert (total == 0).all()
    assert (assigned_sums_triton(logits, torch.zeros(20), 0.05) == 0).all()
    assert on_gpu(logits, logits, torch.zeros(20), torch.zeros(0, dtype=torch.int64), 0.05, 0.1, 1.0, None).numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "prototypes"), SHAPES[:-1])
@pytest.mark.parametrize("where", ["nowhere", "beside", "over"])
def test_cross_entropy(rows: int, prototypes: int, dtype: torch.dtype, where: str):
    generator = torch.Generator().manual_seed(2)
    student, teacher = made_logits(rows, prototypes, dtype), made_logits(rows + 3, prototypes, dtype, 1)
    logv = torch.randn(prototypes, generator=generator)
    index = torch.randint(rows + 3, (rows,), generator=generator)
    exact = student.double().requires_grad_()
    expected = prototype_cross_entropy_ref(exact, teacher.double(), logv.double(), index)
    (slope,) = torch.autograd.grad(0.25 * expected.sum(), exact)

    surroundings = student.new_empty(0) if where != "over" else student._base
    gradient = {"nowhere": None, "beside": torch.empty(rows, prototypes, dtype=dtype), "over": student}[where]
    loss = on_gpu(student, teacher, logv, index, 0.05, 0.1, 0.25, gradient)
    assert_close(loss, expected.detach(), 2e-5)
    if gradient is not None:
        # a 16-bit gradient rounds at most once
        assert_close(gradient, slope, 2e-5 if dtype == torch.float32 else 1.1e-3)
    if where == "over":
        assert surroundings is not None
        outside = surroundings.clone()
        outside[1:-1, 1:-2] = math.nan
        assert outside.isnan().all()


def test_a_row_without_a_label_is_nan():
    student = made_logits(4, 20, torch.float32)
    gradient = torch.zeros(4, 20)
    index = torch.tensor([0, 4, -1, 3])
    loss = on_gpu(student, student, torch.zeros(20), index, 0.05, 0.1, 1.0, gradient)
    assert loss.isnan().tolist() == [False, True, True, False]
    assert gradient.isnan().all(dim=1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 17, 300, 5000])
def test_scale_rows(dtype: torch.dtype, columns: int):
    rows = made_logits(3, columns, dtype)
    expected = rows.double() * torch.tensor([[1.0], [0.5], [-3.0]])
    scale_rows_triton(rows, torch.tensor([1.0, 0.5, -3.0]))
    assert_close(rows, expected, 1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "masked", "patches", "dim"),
    [(1, 1, 1, 1), (2, 5, 7, 3), (2, 147, 147, 192), (3, 65, 64, 40), (1, 130, 200, 33)],
)
def test_nearest_patch(batch: int, masked: int, patches: int, dim: int, dtype: torch.dtype, metric: str):
    generator = torch.Generator().manual_seed(3)
    student, teacher = (
        torch.randn(batch, count, dim, generator=generator).to(dtype) for count in (masked, patches)
    )  # fmt: skip
    index, similarity = nearest_patch_triton(student, teacher, metric == "cosine", [])
    exact = similarity_of(student, teacher, metric)
    chosen = exact.gather(2, index.unsqueeze(2)).squeeze(2)
    # the chosen patch is the nearest, or as near as rounding can tell
    assert_close(chosen, exact.amax(dim=2), 1e-5)
    assert_close(similarity, chosen, 3e-5)


def test_nearest_patch_within_folds_and_of_equals_the_lowest():
    student = torch.randn(2, 147, 48, generator=torch.Generator().manual_seed(4))
    teacher = torch.randn(2, 147, 48, generator=torch.Generator().manual_seed(5))
    folds = [50, 49, 48]
    index, _ = nearest_patch_triton(student, teacher, True, folds)
    assert torch.equal(index, nearest_patch_ref(student.double(), teacher.double(), "cosine", "fold", folds))
    teacher[:, 10] = teacher[:, 90] = teacher[:, 140] = student[:, 20]
    index, similarity = nearest_patch_triton(student, teacher, True, [])
    assert (index[:, 20] == 10).all()
    torch.testing.assert_close(similarity[:, 20], torch.ones(2))


@pytest.mark.parametrize("patch_size", [1, 3, 8, 14, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patch_tokens(patch_size: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(6)
    images = torch.randint(256, (2, 3, 3 * patch_size, 2 * patch_size), generator=generator, dtype=torch.uint8)
    ids = torch.tensor([[5, 0, 0, 3], [1, 4, 2, 5]])
    got = patch_tokens_triton(images, ids, patch_size, dtype, list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert_close(
        got, patch_tokens_ref(images, ids, patch_size, torch.float64), 2e-6 if dtype == torch.float32 else 1e-3
    )
    lost = patch_tokens_triton(images, ids + 1, patch_size, dtype, list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert lost.isnan().all(dim=2).tolist() == (ids == 5).tolist()


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 9), (12, 11), (13, 140), (50, 41)], ids=lambda number: str(number)
)
def test_photometric(height: int, width: int):
    images = made_bytes(3, height, width)
    factors, choices = made_draws([(1, 0, 0, 1), (1, 1, 1, 0), (1, 0, 1, 1)], 0.3)
    got = photometric_triton(images, factors, choices, 100, torch.uint8, list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert torch.equal(got, photometric_ref(images, factors, choices, 100))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_photometric_normalised(dtype: torch.dtype):
    images = made_bytes(4, 13, 12).transpose(2, 3)
    factors, choices = made_draws([(0, 0, 0, 0), (1, 0, 0, 1), (0, 1, 0, 0), (0, 0, 1, 1)], 0.3)
    got = photometric_triton(images, factors, choices, 100, dtype, list(IMAGENET_MEAN), list(IMAGENET_STD))
    exact = photometric_ref(images, factors, choices, 100, torch.float64)
    assert_close(got, exact, 2e-6 if dtype == torch.float32 else 1e-3)


def test_photometric_of_no_images():
    factors, choices = made_draws([], 1.0)
    given = made_bytes(0, 8, 8), factors.view(0, 5), choices.view(0, 9)
    assert photometric_triton(*given, 128, torch.uint8, [0.0] * 3, [1.0] * 3).shape == (0, 3, 8, 8)
