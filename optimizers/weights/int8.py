"""Weights in eight bits (Q-GaLore, arXiv 2407.08296, section 3.4; formulas in `cuda.groups`).

Memory: m n bytes, and for each group two numbers of the apparent dtype. Each step gives a changed
group its own new range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .quantized import QuantizedWeight


class Int8Weight(QuantizedWeight):
    """A matrix in eight bits; see `quantized`.

    Attributes:
        codes: uint8, of the matrix's shape, contiguous.
        scales: one a group, in the apparent dtype.
        zeros: one a group, in the apparent dtype.
        group_size: see `QuantizedWeight`.
    """

    BITS = 8

    zeros: Tensor

    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        group_size: int,
        requires_grad: bool = False,
    ) -> Int8Weight:
        """Wraps the tensors, without copies.

        Raises:
            ValueError: they don't fit together.
        """
        return cls.of_parts((codes, scales, zeros), codes.shape, group_size, requires_grad)

    def __reduce_ex__(self, protocol: object) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        arguments = (self.group_size, self.requires_grad, isinstance(self, nn.Parameter))
        return rebuild_int8_weight, (*self.parts(), *arguments)


def rebuild_int8_weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    requires_grad: bool,
    is_parameter: bool,
) -> Int8Weight:
    """Restores a weight from a pickle or copy."""
    made = Int8Weight(codes, scales, zeros, group_size, requires_grad)
    return nn.Parameter(made, requires_grad) if is_parameter else made  # type: ignore[return-value]


torch.serialization.add_safe_globals([rebuild_int8_weight])
