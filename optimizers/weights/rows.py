"""The weight seam: rows of a weight as plain tensors that a step may change in place."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..projectors import RowRange


def editable_rows(weight: Tensor, rows: RowRange) -> Iterator[tuple[Tensor, RowRange]]:
    """Yields chunks of a weight's rows; what is done to them in place is in the weight afterwards.

    Args:
        weight: the parameter.
        rows: which rows of the whole matrix it holds.

    Yields:
        A plain tensor of some rows, and which rows of the whole matrix these are.
    """
    yield weight, rows
