"""What GPUs can do, from their makers' data sheets, and how they are joined in the usual machines.

Rates are dense (no 2:4 sparsity), with sums in fp32; bandwidths of links are one way, half of what data sheets add up.
"""

from dataclasses import dataclass

from fastpmae_loaders.errors import UserError

USABLE = 0.92
"""Share of the memory that a plan fills (an assumption): the rest is CUDA's own context, cuBLAS's workspace and what
the caching allocator cannot reuse."""


@dataclass(frozen=True)
class Gpu:
    """One GPU and its place in a machine."""

    words: str
    bf16: float
    """FLOP/s of products in bf16."""
    fp32: float
    """FLOP/s in fp32 without tensor cores."""
    gib: float
    """Memory, GiB."""
    bandwidth: float
    """Bytes/s of that memory."""
    link: float
    """Bytes/s from one GPU to the others of its machine, one way."""
    nvlink: bool
    """Whether that link is NVLink (or Infinity Fabric), else PCIe."""
    per_node: int
    """GPUs in the usual machine."""
    network: float
    """Bytes/s that this machine sends to others, one way."""
    cores: int
    """CPU cores of that machine."""
    source: str

    def peak(self, precision: str) -> float:
        """FLOP/s of products with `--precision`; "auto" is bf16 on a GPU."""
        return self.fp32 if precision == "fp32" else self.bf16

    @property
    def usable(self) -> float:
        """Bytes that a step may fill."""
        return USABLE * self.gib * 2**30


_GBIT = 1e9 / 8

GPUS = {
    "a100-40": Gpu("A100 SXM 40 GB", 312e12, 19.5e12, 40, 1.555e12, 300e9, True, 8, 8 * 200 * _GBIT, 128,
                   "NVIDIA A100 data sheet; machine: DGX A100 data sheet"),
    "a100-80": Gpu("A100 SXM 80 GB", 312e12, 19.5e12, 80, 2.039e12, 300e9, True, 8, 8 * 200 * _GBIT, 128,
                   "NVIDIA A100 data sheet; machine: DGX A100 data sheet"),
    "h100": Gpu("H100 SXM 80 GB", 989.4e12, 66.9e12, 80, 3.35e12, 450e9, True, 8, 8 * 400 * _GBIT, 112,
                "NVIDIA H100 data sheet; machine: DGX H100 data sheet"),
    "h100-pcie": Gpu("H100 PCIe 80 GB", 756e12, 51.2e12, 80, 2.0e12, 64e9, False, 8, 2 * 200 * _GBIT, 64,
                     "NVIDIA H100 PCIe product brief; machine: an assumption"),
    "h200": Gpu("H200 SXM 141 GB", 989.4e12, 66.9e12, 141, 4.8e12, 450e9, True, 8, 8 * 400 * _GBIT, 112,
                "NVIDIA H200 data sheet; machine: DGX H200 data sheet"),
    "b200": Gpu("B200 SXM 180 GB", 2250e12, 75e12, 180, 8.0e12, 900e9, True, 8, 8 * 400 * _GBIT, 112,
                "NVIDIA DGX B200 data sheet, an eighth of the machine"),
    "l40s": Gpu("L40S 48 GB", 362.05e12, 91.6e12, 48, 0.864e12, 32e9, False, 8, 2 * 200 * _GBIT, 64,
                "NVIDIA L40S data sheet; machine: an assumption"),
    "l4": Gpu("L4 24 GB", 121e12, 30.3e12, 24, 0.300e12, 32e9, False, 8, 100 * _GBIT, 64,
              "NVIDIA L4 data sheet; machine: an assumption"),
    "a10": Gpu("A10 24 GB", 125e12, 31.2e12, 24, 0.600e12, 32e9, False, 4, 100 * _GBIT, 48,
               "NVIDIA A10 data sheet; machine: an assumption"),
    "rtx3090": Gpu("GeForce RTX 3090 24 GB", 71e12, 35.6e12, 24, 0.936e12, 32e9, False, 4, 10 * _GBIT, 32,
                   "NVIDIA GA102 white paper; machine: an assumption"),
    "rtx4090": Gpu("GeForce RTX 4090 24 GB", 165.2e12, 82.6e12, 24, 1.008e12, 32e9, False, 4, 10 * _GBIT, 32,
                   "NVIDIA Ada white paper; machine: an assumption"),
    "rtx5090": Gpu("GeForce RTX 5090 32 GB", 209.5e12, 104.8e12, 32, 1.792e12, 64e9, False, 4, 10 * _GBIT, 32,
                   "NVIDIA RTX Blackwell white paper; machine: an assumption"),
    "mi300x": Gpu("AMD MI300X 192 GB", 1307.4e12, 163.4e12, 192, 5.3e12, 448e9, True, 8, 8 * 400 * _GBIT, 112,
                  "AMD Instinct MI300X data sheet; machine: an assumption"),
}  # fmt: skip


DEVICES = {
    "A100-SXM4-40GB": "a100-40",
    "A100-PCIE-40GB": "a100-40",
    "A100-SXM4-80GB": "a100-80",
    "A100 80GB PCIe": "a100-80",
    "H100 80GB HBM3": "h100",
    "H100 PCIe": "h100-pcie",
    "H200": "h200",
    "B200": "b200",
    "L40S": "l40s",
    "L4": "l4",
    "A10": "a10",
    "GeForce RTX 3090": "rtx3090",
    "GeForce RTX 4090": "rtx4090",
    "GeForce RTX 5090": "rtx5090",
    "Instinct MI300X": "mi300x",
}
"""What drivers call the GPUs, behind their makers' names. A part of one (MIG) and kin such as A10G are not here."""


def gpu_of_device(name: str) -> Gpu | None:
    """The GPU that a driver calls `name`, such as "NVIDIA H100 80GB HBM3"; None where nothing is known of it."""
    known = DEVICES.get(name.removeprefix("NVIDIA ").removeprefix("AMD "))
    return None if known is None else GPUS[known]


def gpu_named(name: str) -> Gpu:
    """The GPU called `name`, in capitals or not. Raises UserError with the names there are."""
    known = GPUS.get(name.lower().replace("_", "-"))
    if known is None:
        raise UserError(f"--gpu {name}: nothing is known of it; choose one of {', '.join(GPUS)}")
    return known
