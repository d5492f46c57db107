"""DLRT's layer: W = U S V^T with orthonormal U and V, of which S is trained between basis updates.

Schotthöfer et al., "Low-rank lottery tickets: finding efficient low-rank neural networks via matrix
differential equations" (arXiv 2205.13571). U is m x w, S w x w and V n x w; with G the gradient of
W, of which nothing of its size is ever made, a backward pass gives

    dS = U^T G V,    dU = G V    (of K = U S in the paper's K-step),    dV = G^T U    (L-step)

so that "gradients" of U and V are not the chain rule's: they are what a basis update needs. That
truncates S to a rank k <= r, and makes room for new directions, W unchanged up to the truncation:

    S = P D Q^T,   k least with ||D_{>k}|| <= tolerance ||D||
    U' <- first w columns of orth[U P_k | G V Q],   V' <- the same of [V Q_k | G^T U P]
    S' <- (U'^T U P_k) D_k (V'^T V Q_k)^T

Memory: w (m + n) + w^2 entries, w = 2 r at most. Per token a forward pass saves n + w entries.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..engine.chunks import wide_dtype
from .autocast import compute_dtype, on_rows
from .base import FactoredLinear
from .spread import check_whole, held_rows


class _Galerkin(torch.autograd.Function):
    """y = x V S^T U^T + b; saves x, x V and the parts."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, core: Tensor, left: Tensor, right: Tensor, bias: Tensor | None
    ) -> Tensor:
        z = x @ right.to(x.dtype)
        y = (z @ core.to(x.dtype).mT) @ left.to(x.dtype).mT
        ctx.save_for_backward(x, z, core, left, right)
        return y if bias is None else y.add_(bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, z, *parts = ctx.saved_tensors
        core, left, right = (part.to(x.dtype) for part in parts)
        need_x, need_core, need_left, need_right, need_bias = ctx.needs_input_grad
        h = grad_y @ left
        return (
            (h @ core) @ right.mT if need_x else None,
            (h.mT @ z).to(parts[0].dtype) if need_core else None,
            (grad_y.mT @ z).to(parts[1].dtype) if need_left else None,
            (x.mT @ h).to(parts[2].dtype) if need_right else None,
            grad_y.sum(0) if need_bias else None,
        )


class GalerkinLinear(FactoredLinear):
    """y = x V S^T U^T + b.

    Attributes:
        core: S, w x w.
        left: U, m x w, columns orthonormal.
        right: V, n x w, columns orthonormal.
        kept: buffer, rank of W after the last basis update, at most `rank`; between updates W's
            rank is up to w.
    """

    FACTORS: ClassVar[tuple[str, ...]] = ("core", "left", "right")

    kept: Tensor

    def __init__(self, linear: nn.Linear, *, rank: int = 128) -> None:
        super().__init__(linear, rank)
        weight = linear.weight.detach()
        width = min(2 * self.rank, self.in_features, self.out_features)
        u, s, vh = torch.linalg.svd(weight.to(wide_dtype(weight)), full_matrices=False)
        values = torch.where(torch.arange(width, device=s.device) < self.rank, s[:width], 0.0)
        self.core = nn.Parameter(torch.diag(values).to(weight.dtype))
        self.left = nn.Parameter(u[:, :width].to(weight.dtype).contiguous())
        self.right = nn.Parameter(vh[:width].mT.to(weight.dtype).contiguous())
        self.register_buffer("kept", torch.tensor(self.rank, device=weight.device))

    @classmethod
    def of(cls, linear: nn.Linear, seed: int, **options: Any) -> Self:
        """See `FactoredLinear.of`; option `rank`. Nothing here is random."""
        return cls(linear, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        parts = (self.core, self.left, self.right, self.bias)
        dtype = compute_dtype(x)
        return on_rows(x, lambda rows: _Galerkin.apply(rows.to(dtype), *parts))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """U S V^T."""
        check_whole(self)
        wide = wide_dtype(self.core)
        return self.left.to(wide) @ self.core.to(wide) @ self.right.to(wide).mT

    @torch.no_grad()
    def update_bases(
        self, grad_left_mw: Tensor, grad_right_nw: Tensor, tolerance: float
    ) -> float | None:
        """In place: truncates S and renews U and V, see the module.

        Where rows are spread over processes, each gathers U, V and S and takes its rows.

        Args:
            grad_left_mw: G V, whole.
            grad_right_nw: G^T U, whole.
            tolerance: largest relative change of W by the truncation, unless `rank` is the bound.

        Returns:
            ||W' - W|| / ||W||; None where a part isn't finite, and the layer is unchanged.
        """
        wide = wide_dtype(self.core)
        held = [held_rows(part) for part in (self.core, self.left, self.right)]
        core, left, right = (part.whole().to(wide) for part in held)
        grads = [grad.to(wide) for grad in (grad_left_mw, grad_right_nw)]
        if not all(bool(part.isfinite().all()) for part in (core, left, right, *grads)):
            return None
        p, d, qh = torch.linalg.svd(core)
        tails = d.square().flip(0).cumsum(0).flip(0).sqrt()  # of the values from each one on
        kept = min(max(int((tails > tolerance * tails[0]).sum()), 1), self.rank)
        change = float(tails[kept] / tails[0]) if kept < len(d) and tails[0] > 0 else 0.0
        spans = left @ p, right @ qh.mT
        pairs = zip(spans, (grads[0] @ qh.mT, grads[1] @ p), strict=True)
        bases = [_renewed(span[:, :kept], fresh, len(d)) for span, fresh in pairs]
        inner = [new.mT @ span[:, :kept] for new, span in zip(bases, spans, strict=True)]
        for part, value in zip(held, ((inner[0] * d[:kept]) @ inner[1].mT, *bases), strict=True):
            part.fill(value)
        self.kept.fill_(kept)
        return change


def _renewed(kept_mk: Tensor, fresh_mw: Tensor, width: int) -> Tensor:
    """An orthonormal basis of `width` columns that spans the kept ones, then fresh directions."""
    # Unit columns, so that small gradients count as directions too.
    fresh = fresh_mw / fresh_mw.norm(dim=0).clamp(min=torch.finfo(fresh_mw.dtype).tiny)
    basis: Tensor = torch.linalg.qr(torch.cat([kept_mk, fresh], 1)).Q
    return basis[:, :width]
