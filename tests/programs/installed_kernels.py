"""What the kernels alone compute: `installed_kernels.py` prints the version and a row of labels."""

import torch

import fastpmae_kernels

if __name__ == "__main__":
    print(fastpmae_kernels.__version__, fastpmae_kernels.sinkhorn(torch.zeros(4, 2), 0.05, 3)[0].tolist())
