"""Pseudo labels, the loss that uses them, and the pixels before them, one file an operation.

Each file holds `<op>_ref`, the plain and obvious form that every faster form is held to; the Triton kernel for GPUs;
and the public function, which picks by the tensors' device. The fast form for the CPU is the file of the same name in
`cpu/`. `backend.use("ref")` makes all of them take the plain form.
"""

from importlib.metadata import PackageNotFoundError, version

import fastpmae_kernels.photometric_gpu  # noqa: F401  registers the operator's GPU form
from fastpmae_kernels import backend
from fastpmae_kernels.match import nearest_patch, nearest_patch_ref, nearest_patch_similarity
from fastpmae_kernels.patch_tokens import patch_tokens, patch_tokens_ref
from fastpmae_kernels.photometric import photometric, photometric_ref
from fastpmae_kernels.prototype_features import (
    prototype_cross_entropy_from_features,
    prototype_cross_entropy_of_product,
    sinkhorn_bias_from_features,
)
from fastpmae_kernels.prototype_loss import prototype_cross_entropy, prototype_cross_entropy_ref
from fastpmae_kernels.sinkhorn import (
    label_bias,
    sinkhorn,
    sinkhorn_bias,
    sinkhorn_bias_ref,
    sinkhorn_biases,
    sinkhorn_ref,
)

try:
    __version__ = version("fastpmae-kernels")
except PackageNotFoundError:  # a checkout that is on the path and not installed
    __version__ = "0+unknown"

__all__ = [
    "backend",
    "label_bias",
    "nearest_patch",
    "nearest_patch_ref",
    "nearest_patch_similarity",
    "patch_tokens",
    "patch_tokens_ref",
    "photometric",
    "photometric_ref",
    "prototype_cross_entropy",
    "prototype_cross_entropy_from_features",
    "prototype_cross_entropy_of_product",
    "prototype_cross_entropy_ref",
    "sinkhorn",
    "sinkhorn_bias",
    "sinkhorn_bias_from_features",
    "sinkhorn_bias_ref",
    "sinkhorn_biases",
    "sinkhorn_ref",
]
