"""Cross-entropy between a teacher's pseudo label and a student's prediction over the prototypes (equations 3 and 4)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def prototype_cross_entropy_ref(
    student_logits: Float[Tensor, "rows prototypes"],
    teacher_logits: Float[Tensor, "labels prototypes"],
    logv: Float[Tensor, " prototypes"],
    index: Int[Tensor, " rows"],
    epsilon: float = 0.05,
    temperature: float = 0.1,
) -> Float[Tensor, " rows"]:
    """H(pseudo label of teacher row `index[r]`, student row r) for every row, in fp32 or better.

    Args:
        student_logits: the student's; gradients flow to these alone.
        teacher_logits: what `sinkhorn_bias_ref` was given on this rank.
        logv: its result; a label is `softmax(teacher_logits / epsilon + logv)`.
        index: the teacher row whose label student row r should predict.
        epsilon: the temperature that `logv` was computed with.
        temperature: the student's.
    """
    if student_logits.dtype != torch.float64:
        student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
    with torch.no_grad():
        label = torch.softmax(teacher_logits[index] / epsilon + logv, dim=1)
    return -(label * torch.log_softmax(student_logits / temperature, dim=1)).sum(dim=1)
