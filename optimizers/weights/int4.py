"""Weights in four bits; formulas and how they are trained in `cuda.int4_update`.

Memory: m n / 2 bytes, and for each group a number of the apparent dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .quantized import QuantizedWeight


class Int4Weight(QuantizedWeight):
    """A matrix in four bits; see `quantized`.

    Attributes:
        codes: uint8 (ceil(m n / 2),), two codes a byte.
        scales: one a group, in the apparent dtype.
        group_size: see `QuantizedWeight`; an even number.
    """

    BITS = 4

    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        scales: Tensor,
        shape: Sequence[int],
        group_size: int,
        requires_grad: bool = False,
    ) -> Int4Weight:
        """Wraps the tensors, without copies.

        Raises:
            ValueError: they don't fit together.
        """
        return cls.of_parts((codes, scales), shape, group_size, requires_grad)

    def __reduce_ex__(self, protocol: object) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        arguments = (self.group_size, self.requires_grad, isinstance(self, nn.Parameter))
        return rebuild_int4_weight, (*self.parts(), tuple(self.shape), *arguments)


def rebuild_int4_weight(
    codes: Tensor,
    scales: Tensor,
    shape: Sequence[int],
    group_size: int,
    requires_grad: bool,
    is_parameter: bool,
) -> Int4Weight:
    """Restores a weight from a pickle or copy."""
    made = Int4Weight(codes, scales, shape, group_size, requires_grad)
    return nn.Parameter(made, requires_grad) if is_parameter else made  # type: ignore[return-value]


torch.serialization.add_safe_globals([rebuild_int4_weight])
