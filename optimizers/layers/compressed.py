"""Linear layers that keep a random projection of their input for the backward pass, not the input.

Shamshoum et al., "CompAct: Compressed Activations for Memory-Efficient LLM Training" (arXiv
2410.15352). For y = x W^T with x of T x n the backward pass needs x for the weight's gradient
alone. Here it is projected in the forward pass,

    z = x Q,   Q: n x r with entries N(0, 1/r),   dW = (dy^T z) Q^T

and T r numbers are kept instead of T n. E[Q Q^T] = I, so that dW is the gradient on average. It has
rank r and its rows are in the space of Q's columns. Q is drawn anew, from (seed, the layer's name,
step // gap), each time it is used. Gradients of x and of the bias are exact.

Differences from the paper: dW is expanded to m x n, so that any optimizer takes it; one that
projects on the right finds the space of Q itself. Layers that share their input each keep a
projection of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lowrank import cuda

from ..engine import checks
from ..engine.chunks import wide_dtype
from ..engine.seeds import draw_seed
from ..param_groups import projected_layers
from ..targets import Patterns
from ..weights import QuantizedWeight
from .autocast import compute_dtype


@dataclass
class Compression:
    """What the compressed layers of a model draw from; made by `compress_activations`.

    Attributes:
        rank: r, clamped to a layer's width.
        gap: steps between draws.
        seed: of all draws.
        step: number of optimizer steps done, which the training loop sets before each forward
            pass.
        layers: the layers.
    """

    rank: int
    gap: int
    seed: int
    step: int = 0
    layers: list[CompressedLinear] = field(default_factory=list)

    def remove(self) -> None:
        """Makes the layers plain ones again."""
        for layer in self.layers:
            layer.__class__ = nn.Linear  # type: ignore[assignment]
            del layer.compression
            del layer.seed_name
        self.layers.clear()


class CompressedLinear(nn.Linear):
    """An `nn.Linear` whose input is compressed for the backward pass, see the module.

    Attributes:
        compression: shared by the layers of a model.
        seed_name: the layer's name.
    """

    compression: Compression
    seed_name: str

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)
        own = self.compression
        seed = draw_seed(own.seed, self.seed_name, own.step // own.gap, "activations")
        rank = min(own.rank, self.in_features)
        dtype = compute_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        rows = x.reshape(-1, self.in_features).to(dtype)
        y: Tensor = _Compressed.apply(rows, self.weight, bias, seed, rank)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], self.out_features)


class _Compressed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, seed: int, rank: int
    ) -> Tensor:
        parts: Sequence[Tensor] = (weight,)
        ctx.layout, dense = None, weight
        if isinstance(weight, QuantizedWeight):
            parts, ctx.layout = weight.parts(), weight.storage_format()
            dense = weight.dequantize(x.dtype)
        ctx.draw, ctx.weight_dtype = (x.shape[1], rank, seed), weight.dtype
        ctx.save_for_backward(x @ _matrix(ctx.draw, x), *parts)
        return functional.linear(x, dense.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        z, *parts = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            dense = parts[0] if ctx.layout is None else ctx.layout.dense(parts, z.dtype)
            grad_x = grad_y @ dense.to(z.dtype)
            del dense
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_y.mT @ z) @ _matrix(ctx.draw, z).mT
            grad_weight = grad_weight.to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y.sum(0)
        return grad_x, grad_weight, grad_bias, None, None


def _matrix(draw: tuple[int, int, int], like: Tensor) -> Tensor:
    """Q, n x r, in the precision of `like`."""
    width, rank, seed = draw
    drawn = cuda.gaussian((width, rank), seed, wide_dtype(like), like.device)
    return drawn.mul_(rank**-0.5).to(like.dtype)


def compress_activations(
    model: nn.Module,
    rank: int,
    *,
    gap: int = 50,
    seed: int = 0,
    patterns: Patterns = None,
) -> Compression:
    """In place: compresses what layers that `param_groups` projects keep for the backward pass.

    Parameters and state dicts are unchanged. The loop sets `step` before each forward pass.

    Args:
        model: the model.
        rank: r, columns that remain of each input; an n/4 to n/8 in the paper.
        gap: steps between draws of the projections.
        seed: of the draws; processes that train together need the same.
        patterns: as in `param_groups`.

    Returns:
        A handle with `step` and `remove()`.

    Raises:
        ValueError: an option is out of range, no layer matches, or one is of another class.
    """
    checks.integer("rank", rank, low=1)
    checks.integer("gap", gap, low=1)
    checks.integer("seed", seed, low=0)
    chosen = projected_layers(model, patterns)
    names = {module: name for name, module in model.named_modules()}
    for layer in chosen:
        if type(layer) is not nn.Linear:
            raise ValueError(
                f"{names[layer]} is a {type(layer).__name__}: accepted are plain nn.Linear, whose "
                "input is not compressed yet"
            )
    made = Compression(rank, gap, seed)
    for layer in chosen:
        layer.__class__ = CompressedLinear
        assert isinstance(layer, CompressedLinear)
        layer.compression, layer.seed_name = made, names[layer]
        made.layers.append(layer)
    return made
