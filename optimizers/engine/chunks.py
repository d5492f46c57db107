"""Work in pieces: which rows to take at once, and in which precision to sum."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor

#: Entries of a pass over a matrix on a CPU: copies of a piece stay in its cache.
CACHE_ELEMENTS = 1 << 18
#: Entries of a product with a piece on a CPU: fewer would not fill a GEMM.
PRODUCT_ELEMENTS = 1 << 22
#: Entries of either on a GPU: copies in fp32 take 128 MiB, and launches next to no time.
DEVICE_ELEMENTS = 1 << 25


def wide_dtype(like: Tensor | torch.dtype) -> torch.dtype:
    """The precision of sums, norms and decompositions: fp64 stays, all else is fp32."""
    dtype = like.dtype if isinstance(like, Tensor) else like
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_chunks(tensor: Tensor, *, product: bool = False, block: int = 1) -> Iterator[slice]:
    """Yields spans of a tensor's rows (entries of its first axis) to work on one after another.

    Args:
        tensor: of at least one dimension; only its shape and device are read. Its transpose gives
            spans of columns.
        product: the pieces go into matrix products, so larger ones pay on a CPU.
        block: entries that belong together (those of a quantiser's scale): each piece but the last
            ends where a block does.

    Yields:
        Slices with both ends given, in order, of at most the bound's entries if one row, or the
        fewest that end with a block, are not more.
    """
    if tensor.device.type != "cpu":
        wanted = DEVICE_ELEMENTS
    else:
        wanted = PRODUCT_ELEMENTS if product else CACHE_ELEMENTS
    rows = tensor.shape[0]
    width = max(1, tensor.numel() // max(1, rows))
    multiple = block // gcd(block, width)
    step = max(1, wanted // (width * multiple)) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
