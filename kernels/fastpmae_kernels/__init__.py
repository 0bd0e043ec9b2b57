"""Pseudo labels and the loss that uses them, one file an operation.

Each file holds `<op>_ref`, the plain and obvious form that every faster form is held to.
"""

from fastpmae_kernels.match import nearest_patch_ref
from fastpmae_kernels.prototype_loss import prototype_cross_entropy_ref
from fastpmae_kernels.sinkhorn import sinkhorn_bias_ref, sinkhorn_ref

__all__ = ["nearest_patch_ref", "prototype_cross_entropy_ref", "sinkhorn_bias_ref", "sinkhorn_ref"]
