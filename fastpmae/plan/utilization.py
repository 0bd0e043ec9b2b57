"""How much of what its GPUs can do a run reaches: model FLOPs utilisation, as PaLM's authors count it."""

import torch

from fastpmae.config import Config
from fastpmae.distributed.ranks import Ranks
from fastpmae.plan.costs import flops_of_an_image
from fastpmae.plan.gpus import gpu_of_device


def images_at_peak(config: Config, ranks: Ranks) -> float | None:
    """Images a second at which every rank's GPU would compute as fast as its data sheet says: utilisation 1.

    The method's products alone are counted: what is computed again to save memory is no gain. None on a CPU, and on a
    GPU of which nothing is known.
    """
    if ranks.device.type != "cuda":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name(ranks.device))
    return None if gpu is None else rate_at_peak(config, gpu.peak(config.efficiency.precision), ranks.size)


def rate_at_peak(config: Config, flops_per_second: float, gpus: int) -> float:
    """Images a second of so many GPUs."""
    plain = config.using(prototypes_chunk=0, activation_checkpointing=0, teacher_precision="auto", shard=False)
    return gpus * flops_per_second / flops_of_an_image(plain)
