"""One of several ranks with uneven rows, each of which has what one process computes of all rows.

`python -m tests.programs.sinkhorn_ranks RANK RANKS MEETING`: a file that is not there yet is where they meet.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from fastpmae_kernels import (
    label_bias,
    sinkhorn_bias,
    sinkhorn_bias_from_features,
    sinkhorn_bias_ref,
    sinkhorn_biases,
)


def compare(rank: int, size: int) -> None:
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(0)
    features, prototypes = (torch.nn.functional.normalize(torch.randn(n, 16, generator=generator)) for n in (300, 50))
    some = [features @ prototypes.T, torch.rand(90, 20, generator=generator) * 1e4]
    # uneven shares; the last rank has no row of the second matrix at all
    cuts = [{2: [0, 77, 300], 3: [0, 77, 78, 300]}[size], {2: [0, 90, 90], 3: [0, 13, 90, 90]}[size]]
    own = [matrix[cut[rank] : cut[rank + 1]] for matrix, cut in zip(some, cuts, strict=True)]
    for got, whole in zip(sinkhorn_biases(own, group=group), some, strict=True):
        torch.testing.assert_close(got, sinkhorn_bias(whole), rtol=1e-5, atol=2e-5)
        everyones = [torch.empty_like(got) for _ in range(size)]
        dist.all_gather(everyones, got)
        assert all(torch.equal(got, other) for other in everyones)
    for part, whole in zip(own, some, strict=True):
        torch.testing.assert_close(sinkhorn_bias_ref(part, group=group), sinkhorn_bias_ref(whole), rtol=1e-5, atol=2e-5)
    part = features[cuts[0][rank] : cuts[0][rank + 1]]
    got = sinkhorn_bias_from_features(part, prototypes, group=group, prototypes_chunk=40)
    torch.testing.assert_close(got, sinkhorn_bias(some[0]), rtol=1e-5, atol=2e-5)
    center, alone = torch.zeros(50), torch.zeros(50)
    label_bias(own[0], "center", group=group, center=center)
    label_bias(some[0], "center", center=alone)
    torch.testing.assert_close(center, alone)


if __name__ == "__main__":
    rank, size, meeting = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    compare(rank, size)
    dist.destroy_process_group()
    # A thread of gloo's that has still to let go of a tensor aborts an interpreter that ends as usual.
    os._exit(0)
