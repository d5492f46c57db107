"""SST's layer: W = U diag(s) V^T, of which s and a few singular vectors are trained.

Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks"
(arXiv 2405.15481). There are k = min(m, n) triples; the first r are active. With H = dY U and
Z = X V the gradients are

    dX = (H o s) V^T,   ds_i = sum_t H_ti Z_ti,   du_i = dY^T z_i,   dv_i = X^T h_i   (active i)

The gradients of u and v omit the chain rule's factor s_i (the "enhanced" gradient), so that
directions of small singular values are trained; `enhanced=False` includes it. No temporary has W's
size, and frozen vectors have no gradient. `spectral_linear` is the function alone, for layers of
other geometries.

Memory per m x n matrix: k (m + n + 1) entries, of which r (m + n) + k are trained. Per token, a
forward pass saves n + k entries (x and Z) for the backward pass.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..engine import checks
from ..engine.chunks import wide_dtype
from .autocast import compute_dtype, on_rows
from .base import FactoredLinear, constant
from .spread import HeldRows, check_whole, held_rows

SAMPLING = ("mixed", "singular", "uniform")


class _Spectral(torch.autograd.Function):
    """y = ((x V) o s) U^T + b; saves x, x V and the parts."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        s: Tensor,
        left: Tensor,
        right: Tensor,
        frozen_left: Tensor,
        frozen_right: Tensor,
        bias: Tensor | None,
        enhanced: bool,
    ) -> Tensor:
        dtype, r = x.dtype, left.shape[1]
        values = s.to(dtype)
        active_z, frozen_z = x @ right.to(dtype), x @ frozen_right.to(dtype)
        y = (active_z * values[:r]) @ left.to(dtype).mT
        if len(values) > r:
            y.addmm_(frozen_z * values[r:], frozen_left.to(dtype).mT)
        ctx.save_for_backward(x, active_z, frozen_z, s, left, right, frozen_left, frozen_right)
        ctx.enhanced = enhanced
        return y if bias is None else y.add_(bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, active_z, frozen_z, s, *vectors = ctx.saved_tensors
        left, right, frozen_left, frozen_right = (part.to(x.dtype) for part in vectors)
        need_x, need_s, need_left, need_right, _, _, need_bias, _ = ctx.needs_input_grad
        values, r = s.to(x.dtype), left.shape[1]
        grad_x = grad_s = grad_left = grad_right = grad_bias = None
        if need_x or need_s or need_right:
            active_h = grad_y @ left
        if need_x or need_s:
            frozen_h = grad_y @ frozen_left
        if need_x:
            grad_x = ((active_h * values[:r]) @ right.mT).addmm_(
                frozen_h * values[r:], frozen_right.mT
            )
        if need_s:
            pairs = ((active_h, active_z), (frozen_h, frozen_z))
            grad_s = torch.cat([(h * z).sum(0, dtype=wide_dtype(x)) for h, z in pairs]).to(s.dtype)
        if need_left:
            grad_left = grad_y.mT @ active_z
        if need_right:
            grad_right = x.mT @ active_h
        if not ctx.enhanced:
            for grad in (grad_left, grad_right):
                if grad is not None:
                    grad.mul_(values[:r])
        if grad_left is not None:
            grad_left = grad_left.to(vectors[0].dtype)
        if grad_right is not None:
            grad_right = grad_right.to(vectors[1].dtype)
        if need_bias:
            grad_bias = grad_y.sum(0)
        return grad_x, grad_s, grad_left, grad_right, None, None, grad_bias, None


def spectral_linear(
    x: Tensor,
    s: Tensor,
    left: Tensor,
    right: Tensor,
    frozen_left: Tensor,
    frozen_right: Tensor,
    bias: Tensor | None = None,
    enhanced: bool = True,
) -> Tensor:
    """x W^T + b with W = U diag(s) V^T, in the precision of `x` or of autocast.

    Args:
        x: (..., n).
        s: (k,), those of the active vectors first.
        left: m x r, active columns of U.
        right: n x r, active columns of V.
        frozen_left: m x (k - r).
        frozen_right: n x (k - r).
        bias: (m,) or None.
        enhanced: gradients of the active vectors without the factor s.

    Returns:
        (..., m).
    """
    dtype = compute_dtype(x)
    parts = (s, left, right, frozen_left, frozen_right, bias, enhanced)
    return on_rows(x, lambda rows: _Spectral.apply(rows.to(dtype), *parts))  # type: ignore[no-untyped-call]


def sample(s: Tensor, count: int, generator: torch.Generator, how: str) -> Tensor:
    """Draws positions without replacement.

    Args:
        s: (k,) singular values, at least 0.
        count: number of positions.
        generator: on the CPU.
        how: probabilities "uniform" (1 / k), "singular" (s / sum s) or "mixed", the mean of both.

    Returns:
        (count,) int64 on the CPU, ascending.

    Raises:
        ValueError: `how` is unknown.
    """
    checks.choice("how", how, SAMPLING)
    values = s.detach().double().cpu().clamp(min=0)
    even = torch.full_like(values, 1 / len(values))
    total = values.sum()
    by_value = values / total if bool(total.isfinite() & (total > 0)) else even
    share = {"mixed": 0.5, "singular": 1.0, "uniform": 0.0}[how]
    # A small uniform part, so that enough positions have a nonzero probability.
    odds = share * by_value + (1 - share) * even + 1e-12 * even
    return torch.multinomial(odds, count, generator=generator).sort().values


class SpectralLinear(FactoredLinear):
    """y = ((x V) o s) U^T + b.

    Attributes:
        singular_values: s, (k,), those of the active vectors first.
        left: m x r, active columns of U.
        right: n x r, active columns of V.
        frozen_left: m x (k - r), without gradient.
        frozen_right: n x (k - r), without gradient.
        enhanced: see the module.
    """

    FACTORS: ClassVar[tuple[str, ...]] = ("singular_values", "left", "right")
    FROZEN: ClassVar[tuple[str, ...]] = ("frozen_left", "frozen_right")

    frozen_left: Tensor
    frozen_right: Tensor

    def __init__(
        self, linear: nn.Linear, seed: int, *, rank: int = 128, enhanced: bool = True
    ) -> None:
        checks.choice("enhanced", enhanced, (True, False))
        super().__init__(linear, rank)
        self.enhanced = enhanced
        weight, r = linear.weight.detach(), self.rank
        u, s, vh = torch.linalg.svd(weight.to(wide_dtype(weight)), full_matrices=False)
        parts = [part.to(weight.dtype) for part in (s, u, vh.mT)]
        self.singular_values = nn.Parameter(parts[0].contiguous())
        self.left = nn.Parameter(parts[1][:, :r].contiguous())
        self.right = nn.Parameter(parts[2][:, :r].contiguous())
        for name, vectors in zip(self.FROZEN, parts[1:], strict=True):
            # A copy: one column counts as contiguous whatever its stride, which DeepSpeed reads.
            rest = vectors[:, r:].clone(memory_format=torch.contiguous_format)
            if rest.numel():
                self.register_parameter(name, nn.Parameter(rest, requires_grad=False))
            else:  # DTensors can't be gathered without entries
                self.register_buffer(name, rest)

    @classmethod
    def of(cls, linear: nn.Linear, seed: int, **options: Any) -> Self:
        """See `FactoredLinear.of`; options `rank` and `enhanced`. Nothing here is random."""
        return cls(linear, seed, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        return spectral_linear(
            x,
            self.singular_values,
            self.left,
            self.right,
            constant(self.frozen_left),
            constant(self.frozen_right),
            self.bias,
            self.enhanced,
        )

    def _vectors(self) -> list[list[HeldRows]]:
        """The rows here of active and frozen vectors, as far as there are any, of U and of V."""
        pairs = ((self.left, self.frozen_left), (self.right, self.frozen_right))
        return [[held_rows(part) for part in pair if part.numel()] for pair in pairs]

    @property
    def _widths(self) -> list[int]:
        """Numbers of active and of frozen triples."""
        return [self.rank, len(self.singular_values) - self.rank]

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """U diag(s) V^T."""
        check_whole(self)
        return self._whole_weight()

    def _whole_weight(self) -> Tensor:
        """`effective_weight`, with one gather of each part if rows are spread."""
        wide = wide_dtype(self.left)
        u, v = (torch.cat([part.whole() for part in pair], 1).to(wide) for pair in self._vectors())
        return (u * held_rows(self.singular_values).whole().to(wide)) @ v.mT

    def differentiable_weight(self) -> Tensor | None:
        """U diag(s) V^T; its gradients are not the enhanced ones."""
        if self.enhanced:
            return None
        u = torch.cat([self.left, constant(self.frozen_left)], 1)
        v = torch.cat([self.right, constant(self.frozen_right)], 1)
        return (u * self.singular_values) @ v.mT

    @torch.no_grad()
    def clamp_singular_values(self) -> None:
        """In place: s <- max(s, 0), which changes W."""
        held_rows(self.singular_values).local.clamp_(min=0)

    @torch.no_grad()
    def renormalize(self) -> None:
        """In place: active vectors to unit length, which changes W.

        Vectors of length 0, and of length 1 up to rounding, are unchanged.
        """
        for vectors in (self.left, self.right):
            held = held_rows(vectors)
            norms = held.local.to(wide_dtype(vectors)).norm(dim=0)
            if not held.processes.alone:
                norms = held.processes.sum(norms.square()).sqrt()
            away = (norms > 0) & ((norms - 1).abs() > 4 * torch.finfo(vectors.dtype).eps)
            held.local.copy_(held.local / torch.where(away, norms, 1))

    @torch.no_grad()
    def resample(self, selected: Tensor) -> Tensor:
        """In place: changes the active vectors; W is unchanged.

        Args:
            selected: (r,) distinct positions among the k triples.

        Returns:
            (k,) int64: the positions that the triples had before; old state [order] is new state.

        Raises:
            ValueError: `selected` isn't r distinct positions; the layer is unchanged then.
        """
        k, selected = len(self.singular_values), selected.cpu()
        distinct = set(selected.tolist())
        if not len(selected) == len(distinct) == self.rank or not distinct <= set(range(k)):
            raise ValueError(
                f"selected={selected.tolist()}: accepted are {self.rank} distinct positions "
                f"below {k}"
            )
        rest = torch.ones(k, dtype=torch.bool).index_fill_(0, selected, False)
        order = torch.cat([selected, rest.nonzero().flatten()]).to(self.left.device)
        for parts in self._vectors():
            span = parts[-1].span  # of what stays in place: ZeRO may cut the active ones elsewhere
            vectors = torch.cat([part.at(span) for part in parts], 1)[:, order]
            for part, columns in zip(parts, torch.split(vectors, self._widths, 1), strict=False):
                part.take(span, columns)
        values = held_rows(self.singular_values)
        values.fill(values.whole()[order])
        return order

    @torch.no_grad()
    def redecompose(self) -> bool:
        """In place: a new SVD of W, values descending, so that vectors are orthogonal again.

        U and V together are not smaller than W, so under FSDP2 every process gathers them, as a
        forward pass does, and decomposes W itself.

        Returns:
            False where W isn't finite or the SVD failed; the layer is unchanged then.
        """
        weight = self._whole_weight()
        if not bool(weight.isfinite().all()):
            return False
        try:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        except RuntimeError:  # LinAlgError is one
            return False
        for whole, parts in zip((u, vh.mT), self._vectors(), strict=True):
            for part, columns in zip(parts, torch.split(whole, self._widths, 1), strict=False):
                part.fill(columns)
        held_rows(self.singular_values).fill(s)
        return True
