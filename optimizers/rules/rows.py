"""Row-wise processing of a matrix, which bounds the scratch memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engine.chunks import row_chunks, wide_dtype

#: Entries per scale of 8-bit moments; chunks of a weight end at a block's end.
BLOCK = 256
#: Suffix of the key of a moment's scales.
SCALES = "_absmax"


def state_rows(state: dict[str, Any], rows: slice, grad: Tensor) -> dict[str, Any]:
    """Views of the state entries of some rows of an m x n gradient, with their 8-bit scales."""
    if rows == slice(0, len(grad)):
        return state
    columns = grad.shape[1]
    blocks = slice(rows.start * columns // BLOCK, -(-rows.stop * columns // BLOCK))
    part: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == grad.shape:
            part[key] = value[rows]
        elif key.endswith(SCALES):
            part[key] = value[blocks]
        else:
            part[key] = value
    return part


def sum_of_squares(tensor: Tensor) -> Tensor:
    """||tensor||^2 in fp32 (fp64 for fp64), 0-d; a matrix in half precision is read in chunks."""
    wide = wide_dtype(tensor)
    if tensor.dtype == wide or tensor.dim() != 2:
        norm: Tensor = torch.linalg.vector_norm(tensor, dtype=wide)
        return norm.square()
    total = torch.zeros((), dtype=wide, device=tensor.device)
    for rows in row_chunks(tensor):
        total += torch.linalg.vector_norm(tensor[rows].to(wide)).square()
    return total


def squares_along(matrix: Tensor, axis: int) -> Tensor:
    """Sums of squares along an axis (kept with length 1), in fp32 (fp64 for fp64), in chunks."""
    wide = wide_dtype(matrix)
    rows, columns = matrix.shape
    size = (1, columns) if axis == 0 else (rows, 1)
    squares = torch.zeros(size, dtype=wide, device=matrix.device)
    for span in row_chunks(matrix):
        chunk = squares if axis == 0 else squares[span]
        chunk += matrix[span].to(wide).square().sum(axis, keepdim=True)
    return squares
