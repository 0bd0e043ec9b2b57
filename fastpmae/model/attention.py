"""The one place that decides which attention runs: torch's own, or xformers' where a user asks for it on a GPU."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastpmae_loaders.errors import UserError

SequenceLengths = tuple[tuple[int, int], ...]
"""The sequences packed into one row of tokens: (sequences, tokens of each) for each group of equal length."""
Packed = Callable[[Tensor, Tensor, Tensor, SequenceLengths | None], Tensor]

_xformers: Packed | None = None


def attention(
    query: Float[Tensor, "batch queries heads dim"],
    key: Float[Tensor, "batch tokens heads dim"],
    value: Float[Tensor, "batch tokens heads dim"],
    sequence_lengths: SequenceLengths | None = None,
) -> Float[Tensor, "batch queries heads dim"]:
    """Softmax attention among the tokens of each row, or of each packed sequence: then without any mask in memory.

    Args:
        sequence_lengths: of the sequences packed into a batch of one row; they do not see each other. Equal to
            attention under a block-diagonal mask.
    """
    if _xformers is not None:
        return _xformers(query, key, value, sequence_lengths)
    if sequence_lengths is None:
        return _dense(query, key, value)
    mixed, start = [], 0
    for count, length in sequence_lengths:
        stop = start + count * length
        stacked = (each[0, start:stop].unflatten(0, (count, length)) for each in (query, key, value))
        mixed.append(_dense(*stacked).flatten(0, 1))
        start = stop
    return torch.cat(mixed).unsqueeze(0)


def is_torchs() -> bool:
    """Whether `attention` is torch's own."""
    return _xformers is None


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


@contextlib.contextmanager
def use(setting: Literal["auto", "sdpa", "xformers"], device: torch.device, ops: Any = None) -> Iterator[None]:
    """Within the block attention is the one of `--attention`; auto is SDPA.

    Args:
        ops: stands in for the module `xformers.ops`, in a test.

    Raises:
        UserError: for xformers where it is not installed, not built for this torch, or where there is no GPU.
    """
    global _xformers
    before = _xformers
    _xformers = None
    if setting == "xformers":
        _xformers = _through(_working_ops(device) if ops is None else ops)
    try:
        yield
    finally:
        _xformers = before


def _working_ops(device: torch.device) -> Any:
    if device.type != "cuda":
        raise UserError("--attention xformers: it computes on GPUs alone; choose --attention sdpa")
    try:
        import xformers.ops as ops  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError):
        raise UserError(
            "--attention xformers: the package is not installed; pip install 'fastpmae[xformers]', or choose "
            "--attention sdpa"
        ) from None
    try:
        few = torch.zeros(1, 8, 1, 64, dtype=torch.float16, device=device)
        ops.memory_efficient_attention(few, few, few)
    except (NotImplementedError, RuntimeError):
        raise UserError(
            f"--attention xformers: this build of it does not fit torch {torch.__version__}; install one that does, or "
            "choose --attention sdpa"
        ) from None
    return ops


def _through(ops: Any) -> Packed:
    """xformers' operator, which torch.compile goes round."""

    @functools.cache
    def mask(sequence_lengths: SequenceLengths, device: torch.device) -> Any:
        lengths = [length for count, length in sequence_lengths for _ in range(count)]
        return ops.fmha.BlockDiagonalMask.from_seqlens(lengths, device=device)

    def attend(query: Tensor, key: Tensor, value: Tensor, sequence_lengths: SequenceLengths | None) -> Tensor:
        bias = None if sequence_lengths is None else mask(sequence_lengths, query.device)
        return ops.memory_efficient_attention(query, key, value, attn_bias=bias)

    return torch.compiler.disable(attend)  # pyright: ignore[reportReturnType]
