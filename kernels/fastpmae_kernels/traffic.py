"""How many bytes each kernel moves: what a GPU's memory must deliver at least, and so the least time it can take.

`read` and `written` are what passes through the GPU's memory; `again` is read more than once by the same kernel and
fits its cache (a bias, a tile of tokens). The tests count the loads and stores that the kernels really make.
"""

from dataclasses import dataclass

from fastpmae_kernels.backend import ceil_div
from fastpmae_kernels.long_rows import COLUMNS, LONGEST_ROW, PARTS, ROWS

BANDWIDTH = {"A100 80 GB": 2.039e12, "H100 SXM": 3.35e12}
"""Bytes a second, from NVIDIA's data sheets."""


@dataclass(frozen=True)
class Traffic:
    """Bytes."""

    read: int
    written: int
    again: int = 0

    @property
    def total(self) -> int:
        return self.read + self.written

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.read + other.read, self.written + other.written, self.again + other.again)

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(self.read * times, self.written * times, self.again * times)

    def seconds(self, device: str) -> float:
        return self.total / BANDWIDTH[device]


def column_logsumexp(rows: int, prototypes: int, itemsize: int = 2) -> Traffic:
    parts = min(64, max(ceil_div(rows, 32), 1))
    return Traffic(rows * prototypes * itemsize, parts * prototypes * 8)


def assigned_sums(rows: int, prototypes: int, itemsize: int = 2) -> Traffic:
    bias = prototypes * 4
    if prototypes > LONGEST_ROW:
        parts, blocks = min(PARTS, max(ceil_div(rows, ROWS), 1)), ceil_div(prototypes, COLUMNS)
        read = 2 * rows * prototypes * itemsize + bias + rows * 8
        again = (rows + parts - 1) * bias + (blocks - 1) * rows * 8
        return Traffic(read, rows * 8 + parts * bias, again)
    parts = min(512, max(rows, 1))
    return Traffic(rows * prototypes * itemsize + bias, parts * prototypes * 4, (parts - 1) * bias)


def cross_entropy(rows: int, prototypes: int, itemsize: int = 2, gradient: bool = True) -> Traffic:
    row = prototypes * itemsize
    bias = prototypes * 4
    passes = 2 if prototypes > LONGEST_ROW else 1
    return Traffic(passes * rows * 2 * row + rows * 8 + bias, rows * (4 + row * gradient), (passes * rows - 1) * bias)


def scale_rows(rows: int) -> Traffic:
    """Where every factor is 1, as it is where the gradient was foreseen."""
    return Traffic(rows * 4, 0)


def nearest_patch(batch: int, masked: int, patches: int, dim: int, itemsize: int = 2) -> Traffic:
    ours, theirs = (batch * count * dim * itemsize for count in (masked, patches))
    # The student's tile comes once with each tile of the teacher's, and once for its own length.
    again = ours * ceil_div(patches, 64) + theirs * (ceil_div(masked, 64) - 1)
    return Traffic(ours + theirs, batch * masked * 12, again)


def patch_tokens(batch: int, count: int, patch_size: int, itemsize: int = 2) -> Traffic:
    pixels = batch * count * 3 * patch_size**2
    return Traffic(pixels + batch * count * 8, pixels * itemsize)


def photometric(
    batch: int, height: int, width: int, jittered: int, blurred: int, itemsize: int = 1, reach: int = 11
) -> Traffic:
    """Of so many images so many jittered and blurred; a few numbers a program are left out.

    The contrast's sums read a jittered image once more. A blur reads and writes its image twice, and on the way each
    byte `2 * reach` times again.
    """
    image = 3 * height * width
    sums = batch * ceil_div(height * width, 2048) * 4
    read = (batch + jittered + 2 * blurred) * image
    written = (batch - blurred) * image * itemsize + blurred * image * (2 + itemsize) + sums
    return Traffic(read, written, 2 * blurred * image * 2 * reach)


def sinkhorn(rows: int, prototypes: int, itemsize: int = 2, iterations: int = 3) -> Traffic:
    sweeps = assigned_sums(rows, prototypes, itemsize) * (iterations - 1)
    return column_logsumexp(rows, prototypes, itemsize) + sweeps


def loss(batch: int = 768, masked: int = 147, folds: int = 3, prototypes: int = 4096, itemsize: int = 2) -> Traffic:
    """Labels of class and patch rows, both losses and both gradients, from logits in 16 bits."""
    total = Traffic(0, 0)
    for rows in (batch * masked, batch * folds):
        total += sinkhorn(rows, prototypes, itemsize) + cross_entropy(rows, prototypes, itemsize) + scale_rows(rows)
    return total


def usual_loss(batch: int = 768, masked: int = 147, folds: int = 3, prototypes: int = 4096, itemsize: int = 2) -> int:
    """Bytes of the same work written operation by operation in fp32, as DINOv2 does it, from logits in 16 bits.

    Each operation reads its operands and writes its result once; cached sums and bias vectors are left out.
    """
    widening = itemsize + 4
    there_and_back, in_only = 8, 4
    start = widening + 2 * there_and_back + in_only + there_and_back  # float(), / temperature, exp, sum, /= sum
    one_iteration = 2 * (in_only + 2 * there_and_back)  # sum, /= sum, /= count: down the columns, then along the rows
    labels = start + 3 * one_iteration + there_and_back  # and *= rows at the end
    gather = there_and_back
    forward = widening + there_and_back + 12 + in_only  # s / temperature, log_softmax, label x score, sum
    backward = there_and_back + 12 + widening  # of the product, of log_softmax, of the division
    return (labels + gather + forward + backward) * prototypes * batch * (masked + folds)
