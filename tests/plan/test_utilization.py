"""Model FLOPs utilisation: which GPUs are known, and what is counted."""

import pytest
import torch

from fastpmae import Config
from fastpmae.distributed.ranks import Ranks
from fastpmae.plan.costs import flops_of_an_image
from fastpmae.plan.gpus import DEVICES, GPUS, gpu_of_device
from fastpmae.plan.utilization import images_at_peak
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10G", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
    ],
)
def test_a_driver_names_a_gpu(name: str, gpu: str | None):
    assert gpu_of_device(name) == (None if gpu is None else GPUS[gpu])


def test_every_gpu_has_a_name_of_its_driver():
    assert set(DEVICES.values()) == set(GPUS)


@pytest.mark.slow
def test_a_cpu_has_no_utilisation_and_a_gpu_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch):
    config: Config = tiny_config("paper").using(precision="bf16", activation_checkpointing=1, prototypes_chunk=7)
    assert images_at_peak(config, Ranks(0, 1, 1, torch.device("cpu"), None)) is None
    here = Ranks(0, 4, 4, torch.device("cuda", 0), None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    plain = config.using(activation_checkpointing=0, prototypes_chunk=0)
    assert images_at_peak(config, here) == pytest.approx(4 * 989.4e12 / flops_of_an_image(plain))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H300")
    assert images_at_peak(config, here) is None
