"""Chunked passes over a matrix: how many rows at a time, and in which precision to sum."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor

from .devices import on_gpu

#: Entries of a chunk on a CPU: copies of it stay in the cache.
CACHE_ELEMENTS = 1 << 18
#: Entries of a chunk that enters a matrix product on a CPU: fewer would not fill a GEMM.
PRODUCT_ELEMENTS = 1 << 22
#: Entries of a chunk on a GPU: fp32 copies take 128 MiB, and launch overhead is negligible.
DEVICE_ELEMENTS = 1 << 25
#: The same where each entry is on its own: half of it fills a GPU as well.
ENTRY_ELEMENTS = 1 << 24


def wide_dtype(like: Tensor | torch.dtype) -> torch.dtype:
    """The precision of sums, norms and decompositions: fp64 for fp64, else fp32."""
    dtype = like.dtype if isinstance(like, Tensor) else like
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_chunks(
    tensor: Tensor, *, product: bool = False, block: int = 1, entries: bool = False
) -> Iterator[slice]:
    """Yields consecutive slices of a tensor's rows (its first axis).

    Args:
        tensor: at least 1-d; only its shape and device are read. Its transpose gives slices of
            columns.
        product: the chunks enter matrix products, for which larger ones are faster on a CPU.
        block: entries that share a quantisation scale: each chunk but the last ends at the end of
            a block.
        entries: nothing is summed or multiplied in a chunk, so that its size changes no number and
            a smaller one is as fast on a GPU.

    Yields:
        Slices with explicit start and stop, in order. A chunk exceeds the bound on its entries only
        if a single row (or the fewest rows that end with a block) does.
    """
    if on_gpu(tensor) or tensor.is_meta:
        wanted = ENTRY_ELEMENTS if entries else DEVICE_ELEMENTS
    else:
        wanted = PRODUCT_ELEMENTS if product else CACHE_ELEMENTS
    rows = tensor.shape[0]
    width = max(1, tensor.numel() // max(1, rows))
    multiple = block // gcd(block, width)
    step = max(1, wanted // (width * multiple)) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
