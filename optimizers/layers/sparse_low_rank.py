"""SLTrain's layer: W = c B A + S, with S on a fixed random support (arXiv 2406.02214).

No dense weight is stored: forward and backward each make a temporary W, and the backward pass makes
the dense gradient D, from which the parts' gradients are

    D = dY^T X:   dB = c D A^T,   dA = c B^T D,   dv = D on the support

Memory per m x n matrix: r (m + n) + d m n entries, of which nnz = floor(d m n) are values of S. The
support takes nothing (`support="seeded"`) or 4 bytes a value ("stored").
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank.cuda.noise import mix
from lowrank.cuda.noise import uniform as uniform_noise

from ..engine import checks
from ..engine.chunks import wide_dtype
from .autocast import compute_dtype, on_rows
from .base import FactoredLinear, kaiming_bound, uniform
from .spread import check_whole

SUPPORTS = ("seeded", "stored")
INITS = ("official", "model")


def seeded_support(total: int, count: int, seed: int, device: torch.device) -> Tensor:
    """One position drawn uniformly from each of `count` equal parts of [0, total).

    Distinct and sorted, made without synchronisation, and the same on every device.

    Returns:
        (count,) int64.
    """
    edges = torch.arange(count + 1, dtype=torch.int64, device=device).mul_(total)
    edges = edges.div_(count, rounding_mode="floor")
    share = uniform_noise(count, seed, device=device).double()
    widths = edges.diff()
    return share.mul_(widths).to(torch.int64).add_(edges[:-1])


def stored_support(total: int, count: int, seed: int) -> Tensor:
    """`count` of `total` positions, uniform without replacement, sorted: (count,) int32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:count].sort().values.to(torch.int32)


def dense_weight(b_mr: Tensor, a_rn: Tensor, values: Tensor, support: Tensor, c: float) -> Tensor:
    """c B A + S, m x n, in the precision of B."""
    weight = b_mr @ (a_rn * c)
    weight.view(-1).scatter_add_(0, support, values)
    return weight


class _SparseLowRank(torch.autograd.Function):
    """y = x (c B A + S)^T + b; saves x and the parts."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        b_mr: Tensor,
        a_rn: Tensor,
        values: Tensor,
        bias: Tensor | None,
        layer: SparseLowRankLinear,
    ) -> Tensor:
        ctx.save_for_backward(x, b_mr, a_rn, values)
        ctx.layer = layer
        dtype = x.dtype
        low_b, low_a, low_values = b_mr.to(dtype), a_rn.to(dtype), values.to(dtype)
        weight = dense_weight(low_b, low_a, low_values, layer.support(), layer.scaling)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, b_mr, a_rn, values = ctx.saved_tensors
        need_x, need_b, need_a, need_values, need_bias, _ = ctx.needs_input_grad
        layer: SparseLowRankLinear = ctx.layer
        c, dtype, support = layer.scaling, x.dtype, layer.support()
        low_b, low_a = b_mr.to(dtype), a_rn.to(dtype)
        grad_x = grad_b = grad_a = grad_values = grad_bias = None
        if need_x:
            grad_x = grad_y @ dense_weight(low_b, low_a, values.to(dtype), support, c)
        if need_b or need_a or need_values:
            dense_mn = grad_y.mT @ x
            if need_b:
                grad_b = (dense_mn @ low_a.mT).mul_(c).to(b_mr.dtype)
            if need_a:
                grad_a = (low_b.mT @ dense_mn).mul_(c).to(a_rn.dtype)
            if need_values:
                grad_values = dense_mn.view(-1)[support].to(values.dtype)
        if need_bias:
            grad_bias = grad_y.sum(0)
        return grad_x, grad_b, grad_a, grad_values, grad_bias, None


class SparseLowRankLinear(FactoredLinear):
    """y = x (c B A + S)^T + b.

    Attributes:
        lora_a: A, r x n.
        lora_b: B, m x r, zeros at first.
        sparse_values: (nnz,), S on its support in order.
        alpha: c r.
        scaling: c = alpha / r.
        density: d.
        support_seed: 0-d int64 buffer of a seeded support, saved in the state dict.
        sparse_index: (nnz,) int32 buffer, flat positions of a stored support.
    """

    FACTORS: ClassVar[tuple[str, ...]] = ("lora_a", "lora_b", "sparse_values")
    SETTINGS: ClassVar[tuple[str, ...]] = ("alpha",)

    support_seed: Tensor | None
    sparse_index: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        seed: int,
        *,
        rank: int,
        alpha: float = 32.0,
        density: float = 0.03,
        support: str = "seeded",
        init: str = "official",
    ) -> None:
        checks.number("alpha", alpha)
        checks.number("density", density, low=0.0, high=1.0, low_open=True)
        checks.choice("support", support, SUPPORTS)
        checks.choice("init", init, INITS)
        super().__init__(linear, rank)
        m, n, r = self.out_features, self.in_features, self.rank
        weight = linear.weight.detach()
        count = int(density * m * n)
        if count < 1:
            raise ValueError(
                f"density={density!r} of a {m} x {n} matrix is no entry: accepted is at least "
                f"{1 / (m * n):.3g}"
            )
        if support == "stored" and m * n >= 2**31:
            raise ValueError(f"support='stored' of {m} x {n}: accepted are fewer than 2^31 entries")
        self.alpha, self.scaling, self.density = float(alpha), alpha / r, density
        bound = kaiming_bound(n)
        if init == "model" and not weight.is_meta:
            # nnz values of this size give W the root mean square that the model's own had.
            rms = float(weight.to(wide_dtype(weight)).square().mean().sqrt())
            bound = math.sqrt(3.0 * m * n / count) * rms
        self.lora_a = nn.Parameter(uniform((r, n), kaiming_bound(n), weight, seed, 0))
        self.lora_b = nn.Parameter(torch.zeros(m, r, dtype=weight.dtype, device=weight.device))
        self.sparse_values = nn.Parameter(uniform((count,), bound, weight, seed, 1))
        own = mix(seed, 2) >> 1  # 63 bits
        self._seed = own
        seeded = support == "seeded"
        place = weight.device
        self.register_buffer("support_seed", torch.tensor(own, device=place) if seeded else None)
        index = None
        if not seeded:
            index = torch.empty(count, dtype=torch.int32, device=place)
            if not weight.is_meta:
                index.copy_(stored_support(m * n, count, own))
        self.register_buffer("sparse_index", index)

    @classmethod
    def of(cls, linear: nn.Linear, seed: int, **options: Any) -> Self:
        """See `FactoredLinear.of`.

        Options: `rank`, `alpha`, `density`; `support` ("seeded" or "stored"); `init`: "official"
        (values from U(+-1/sqrt(n)), whatever the model's own weights were) or "model" (values as
        large as the model's own initial root mean square asks for).

        Raises:
            ValueError: an option is out of range.
        """
        return cls(linear, seed, **options)

    def support(self) -> Tensor:
        """(nnz,) int64: flat positions of the values."""
        if self.sparse_index is not None:
            return self.sparse_index.long()
        total = self.out_features * self.in_features
        return seeded_support(total, len(self.sparse_values), self._seed, self.sparse_values.device)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.support_seed is not None and not self.support_seed.is_meta:
            # Read once here, so that no step synchronises.
            self._seed = int(self.support_seed)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        parts = (self.lora_b, self.lora_a, self.sparse_values, self.bias, self)
        dtype = compute_dtype(x)
        return on_rows(x, lambda rows: _SparseLowRank.apply(rows.to(dtype), *parts))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """C B A + S."""
        check_whole(self)
        wide = wide_dtype(self.lora_a)
        b, a, values = (
            getattr(self, name).to(wide) for name in ("lora_b", "lora_a", "sparse_values")
        )
        return dense_weight(b, a, values, self.support(), self.scaling)

    def differentiable_weight(self) -> Tensor:
        """C B A + S."""
        parts = (self.lora_b, self.lora_a, self.sparse_values)
        return dense_weight(*parts, self.support(), self.scaling)
