"""`F.linear` on an INT8 weight: the layer's dense weight exists only while it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lowrank.cuda import groups

if TYPE_CHECKING:
    from .int8 import Int8Weight


class _Int8Linear(torch.autograd.Function):
    """y = x W^T + b. Saves x and the weight's parts; dequantises W again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        # The parts themselves, so that autograd detects a weight that changed in between.
        ctx.save_for_backward(x, *weight.parts())
        ctx.group_size, ctx.weight_dtype = weight.group_size, weight.dtype
        return functional.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, scales, zeros = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            dense_mn = groups.dequantize_groups(codes, scales, zeros, ctx.group_size, x.dtype)
            grad_x = grad_y @ dense_mn
            del dense_mn
        if ctx.needs_input_grad[1]:
            grad_weight = grad_y.flatten(0, -2).mT @ x.flatten(0, -2)
            grad_weight = grad_weight.to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y.flatten(0, -2).sum(0)
        return grad_x, grad_weight, grad_bias


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
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
        flat: Tensor = _Int8Linear.apply(x.unsqueeze(0), weight, bias)  # type: ignore[no-untyped-call]
        return flat.squeeze(0)
    y: Tensor = _Int8Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y
