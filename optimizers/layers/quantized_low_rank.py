"""A quantised weight and one trained factor on a basis of its gradient (LoQT, arXiv 2405.16528).

    W = W_q + c P B   (m <= n, P: m x r, B: r x n)   or   W = W_q + c B P^T   (m > n, P: n x r)

with P the leading singular vectors of a gradient of W. W_q and P are quantised and frozen; only B
is trained, so gradients and moments are as small as GaLore's and the weight takes half a byte an
entry. The optimizer schedules the merges and the new P (`loqt`). W_q and P are buffers, which
FSDP2 leaves whole on each process: groups of codes with a common scale don't end where rows do.

The gradient of W itself is computed only after `watch(True)`: the backward pass accumulates it in
`weight_gradient`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..engine import checks
from ..engine.chunks import wide_dtype
from .autocast import compute_dtype, on_rows
from .base import FactoredLinear
from .frozen import FrozenMatrix, dense_matrix
from .spread import check_whole, held_rows

_Parts = tuple[Tensor | None, ...]


class _LoQT(torch.autograd.Function):
    """Saves x (only x P on the right), B and the quantised parts; dequantises W twice."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factor: Tensor,
        bias: Tensor | None,
        probe: Tensor | None,
        base: _Parts,
        basis: _Parts,
        sizes: tuple[int, int, int, float],
        formats: tuple[str | None, str | None],
    ) -> Tensor:
        m, n, r, scale = sizes
        left = m <= n
        ctx.sizes, ctx.formats, ctx.dtype = sizes, formats, x.dtype
        ctx.watched = probe is not None
        weight = dense_matrix(base, (m, n), formats[0], x.dtype)
        p = dense_matrix(basis, (min(m, n), r), formats[1], x.dtype)
        b = factor.to(x.dtype)
        y = x @ weight.mT if bias is None else torch.addmm(bias.to(x.dtype), x, weight.mT)
        projected = x @ (b.mT if left else p)
        y.addmm_(projected, (p if left else b).mT, alpha=scale)
        kept_x = x if left or ctx.watched else None
        ctx.save_for_backward(kept_x, None if left else projected, factor, *base, *basis)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, projected, factor, *parts = ctx.saved_tensors
        m, n, r, scale = ctx.sizes
        left = m <= n
        grad_y = grad_y.to(ctx.dtype)
        p = dense_matrix(tuple(parts[3:]), (min(m, n), r), ctx.formats[1], ctx.dtype)
        b = factor.to(ctx.dtype)
        grad_x = grad_factor = grad_bias = grad_weight = None
        projected_grad = grad_y @ (p if left else b)
        if ctx.needs_input_grad[0]:
            weight = dense_matrix(tuple(parts[:3]), (m, n), ctx.formats[0], ctx.dtype)
            grad_x = grad_y @ weight
            del weight
            grad_x.addmm_(projected_grad, b if left else p.mT, alpha=scale)
        if ctx.needs_input_grad[1]:
            product = projected_grad.mT @ x if left else grad_y.mT @ projected
            grad_factor = product.mul_(scale).to(factor.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y.sum(0)
        if ctx.watched:
            grad_weight = (grad_y.mT @ x).to(factor.dtype)
        return grad_x, grad_factor, grad_bias, grad_weight, None, None, None, None


class QuantizedLowRankLinear(FactoredLinear):
    """y = x W^T + b with W as above.

    Attributes:
        factor: B, r x n where m <= n, else m x r; zeros at first.
        base: W_q.
        basis: P, min(m, n) x r; zeros at first.
        scale: c.
    """

    FACTORS: ClassVar[tuple[str, ...]] = ("factor",)
    SETTINGS: ClassVar[tuple[str, ...]] = ("scale",)
    LEAVES_MORE: ClassVar[bool] = True

    def __init__(
        self,
        linear: nn.Linear,
        seed: int,
        *,
        rank: int = 128,
        scale: float = 0.5,
        weight_format: str | None = "nf4",
        basis_format: str | None = "nf4",
    ) -> None:
        checks.number("scale", scale, low=0.0, low_open=True)
        super().__init__(linear, rank)
        self.scale = float(scale)
        weight = linear.weight.detach()
        m, n = self.out_features, self.in_features
        self.base = FrozenMatrix(weight, weight_format)
        self.basis = FrozenMatrix(weight.new_zeros(min(m, n), self.rank), basis_format)
        shape = (self.rank, n) if m <= n else (m, self.rank)
        self.factor = nn.Parameter(weight.new_zeros(shape))
        self._probe: Tensor | None = None

    @classmethod
    def of(cls, linear: nn.Linear, seed: int, **options: Any) -> Self:
        """See `FactoredLinear.of`.

        Options: `rank`, `scale`, `weight_format` and `basis_format` (None, "nf4" or "int8").
        Nothing here is random.
        """
        return cls(linear, seed, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        dtype = compute_dtype(x)
        probe = self._probe if torch.is_grad_enabled() else None
        parts = (self.factor, self.bias, probe, self.base.parts(), self.basis.parts())
        sizes = (self.out_features, self.in_features, self.rank, self.scale)
        formats = (self.base.format, self.basis.format)
        return on_rows(x, lambda rows: _LoQT.apply(rows.to(dtype), *parts, sizes, formats))  # type: ignore[no-untyped-call]

    # The gradient of W

    def watch(self, on: bool) -> None:
        """Whether backward passes accumulate `weight_gradient`, from the next forward pass on."""
        if not on:
            self._probe = None
        elif self._probe is None:
            # A leaf of W's shape without its memory, whose gradient autograd accumulates.
            empty = torch.zeros((), dtype=self.base.dtype, device=self.base.codes.device)
            self._probe = empty.expand(self.out_features, self.in_features).requires_grad_()

    @property
    def weight_gradient(self) -> Tensor | None:
        """m x n, or None if nothing was accumulated."""
        return None if self._probe is None else self._probe.grad

    # What the optimizer schedules

    @torch.no_grad()
    def renew(self, basis: Tensor, iterations: int) -> float:
        """In place: merges the product into W_q and sets a new basis.

        With W_q <- Q(W) and B = 0 the rounding error of Q would be lost; its part in the basis is
        kept by alternating W_q <- Q(W - c P B) and B <- P^+ (W - W_q) / c (section 3.3).

        Args:
            basis: P, min(m, n) x r.
            iterations: of the alternation; 0 leaves B zero.

        Returns:
            ||W' - W|| / ||W||, the change of the effective weight by quantisation.
        """
        wide = wide_dtype(self.factor)
        held = held_rows(self.factor)
        factor = held.whole()
        weight = self._weight(factor)
        self.basis.assign(basis.to(wide))
        factor = torch.zeros_like(factor)
        self.base.assign(weight)
        left = self.out_features <= self.in_features
        p = self.basis.dense(wide)
        inverse = torch.linalg.pinv(p.mT @ p, hermitian=True) @ p.mT / self.scale
        for _ in range(iterations if self.base.format else 0):
            error = weight - self.base.dense(wide)
            factor.copy_(inverse @ error if left else error @ inverse.mT)
            self.base.assign(weight - self._product(factor))
        held.fill(factor)
        norm = weight.norm()
        change = (self._weight(factor) - weight).norm() / torch.where(norm > 0, norm, 1)
        return float(change)

    @torch.no_grad()
    def product(self) -> Tensor:
        """c P B or c B P^T, m x n, in fp32 or fp64."""
        return self._product(self.factor)

    def _product(self, factor: Tensor) -> Tensor:
        wide = wide_dtype(factor)
        p, b = self.basis.dense(wide), factor.to(wide)
        return (p @ b if self.out_features <= self.in_features else b @ p.mT).mul_(self.scale)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W_q + c P B, or W_q + c B P^T."""
        check_whole(self)
        return self._weight(self.factor)

    def _weight(self, factor: Tensor) -> Tensor:
        return self._product(factor).add_(self.base.dense(wide_dtype(factor)))
