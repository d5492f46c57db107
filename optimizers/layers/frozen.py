"""A frozen matrix, in full precision or quantised."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank.cuda import groups, int4

from ..engine import checks

#: Formats of `FrozenMatrix`, with their group sizes; None stands for full precision.
FORMATS = {"nf4": 64, "int8": 256}


class FrozenMatrix(nn.Module):
    """Buffers that hold one m x n matrix.

    Attributes:
        format: None, "nf4" (QLoRA's four bits, arXiv 2305.14314) or "int8" (`cuda.groups`).
        shape: (m, n).
        codes: the matrix itself, or uint8 codes of it.
        scales: one a group, in the precision of the matrix; None if `format` is None.
        zeros: one a group, for "int8" only.
    """

    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None

    def __init__(self, matrix_mn: Tensor, format: str | None = None) -> None:
        checks.choice("format", format, (None, *FORMATS))
        super().__init__()
        self.format = format
        self.shape = (matrix_mn.shape[0], matrix_mn.shape[1])
        parts = self._encode(matrix_mn.detach().contiguous())
        for name, part in zip(("codes", "scales", "zeros"), parts, strict=True):
            self.register_buffer(name, part)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the matrix."""
        return (self.codes if self.scales is None else self.scales).dtype

    def parts(self) -> tuple[Tensor | None, ...]:
        """The three tensors."""
        return self.codes, self.scales, self.zeros

    @torch.no_grad()
    def assign(self, matrix_mn: Tensor) -> None:
        """In place: rounds a matrix to the nearest values of the format."""
        for mine, part in zip(self.parts(), self._encode(matrix_mn, self.dtype), strict=True):
            if mine is not None and part is not None:
                mine.copy_(part)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix, m x n; not a copy if the format is None and the dtype is its own."""
        return dense_matrix(self.parts(), self.shape, self.format, dtype)

    def _encode(
        self, matrix_mn: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor | None, ...]:
        dtype = dtype or matrix_mn.dtype
        if self.format is None:
            return matrix_mn.to(dtype), None, None
        size = FORMATS[self.format]
        if matrix_mn.device.type == "meta":
            return self._empty(matrix_mn, size, dtype)
        if self.format == "nf4":
            return tuple(int4.quantize_int4(matrix_mn, "nf4", size, dtype=dtype))
        return tuple(groups.quantize_groups(matrix_mn, 255, size, dtype=dtype))

    def _empty(self, matrix_mn: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        if self.format == "nf4":
            return tuple(int4.empty_int4(matrix_mn.numel(), "nf4", size, dtype, matrix_mn.device))
        count = groups.group_count(matrix_mn.numel(), size)
        scales = torch.empty(count, dtype=dtype, device=matrix_mn.device)
        return torch.empty_like(matrix_mn, dtype=torch.uint8), scales, torch.empty_like(scales)


def dense_matrix(
    parts: tuple[Tensor | None, ...], shape: tuple[int, int], format: str | None, dtype: torch.dtype
) -> Tensor:
    """The dequantised matrix of the parts of a `FrozenMatrix`, m x n.

    Args:
        parts: its three tensors.
        shape: (m, n).
        format: its format.
        dtype: of the result.
    """
    codes, scales, zeros = parts
    assert codes is not None
    if scales is None:
        return codes.to(dtype)
    if zeros is not None:
        return groups.dequantize_groups(codes, scales, zeros, FORMATS["int8"], dtype)
    packed = int4.Packed(codes, scales, None)
    numel = shape[0] * shape[1]
    return int4.dequantize_int4(packed, numel, "nf4", FORMATS["nf4"], dtype).view(shape)
