"""`F.linear` and `F.embedding` on a quantised weight: no dense copy of it outlives them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

if TYPE_CHECKING:
    from .quantized import QuantizedWeight


class _Linear(torch.autograd.Function):
    """y = x W^T + b. Saves x and the weight's parts; dequantises W again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        # The parts themselves, so that autograd detects a weight that changed in between.
        ctx.save_for_backward(x, *weight.parts())
        ctx.layout, ctx.weight_dtype = weight.storage_format(), weight.dtype
        return functional.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, *parts = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            dense_mn = ctx.layout.dense(parts, x.dtype)
            grad_x = grad_y @ dense_mn
            del dense_mn
        if ctx.needs_input_grad[1]:
            grad_weight = grad_y.flatten(0, -2).mT @ x.flatten(0, -2)
            grad_weight = grad_weight.to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y.flatten(0, -2).sum(0)
        return grad_x, grad_weight, grad_bias


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """`F.linear`, in the precision of `x`, or of autocast if enabled.

    Args:
        x: (..., n).
        weight: m x n.
        bias: (m,) or None.

    Returns:
        (..., m); the weight's gradient will be dense and in its apparent dtype.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    x = x.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if x.dim() == 1:
        flat: Tensor = _Linear.apply(x.unsqueeze(0), weight, bias)  # type: ignore[no-untyped-call]
        return flat.squeeze(0)
    y: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _Embedding(torch.autograd.Function):
    """Rows of W; only those that are asked for are dequantised."""

    @staticmethod
    def forward(
        ctx: Any, indices: Tensor, weight: QuantizedWeight, padding: int, by_frequency: bool
    ) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.sizes = weight.shape[0], padding, by_frequency
        return weight.rows_at(indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        own = torch.ops.aten.embedding_dense_backward(grad.contiguous(), indices, *ctx.sizes)
        return None, own, None, None


def quantized_embedding(
    indices: Tensor,
    weight: QuantizedWeight,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`F.embedding`; the weight's gradient is dense and in its apparent dtype.

    Args:
        indices: integers below V.
        weight: V x n.
        padding_idx: a row without gradient.
        max_norm: not supported.
        norm_type: of `max_norm`.
        scale_grad_by_freq: as in `F.embedding`.
        sparse: not supported.

    Returns:
        (..., n).

    Raises:
        ValueError: `max_norm`, which would change rows in the forward pass, or `sparse` is given.
    """
    if max_norm is not None or sparse:
        said = f"max_norm={max_norm!r}" if max_norm is not None else "sparse=True"
        raise ValueError(
            f"{said} with an embedding in {weight.BITS} bits: accepted are max_norm=None and "
            "sparse=False, or a dense embedding"
        )
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    found: Tensor = _Embedding.apply(indices, weight, padding, scale_grad_by_freq)  # type: ignore[no-untyped-call]
    return found
