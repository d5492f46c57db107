"""SwitchLoRA's layer: factors whose vectors are switched with candidates (arXiv 2406.06564).

W = W_f + c B A with c = 1 / r. Vectors are the rows of A and the columns of B. Each side has
N = min(m, n) candidates of which r are in use; a switch adds the difference to W_f, so that W is
unchanged.

Memory per m x n matrix: m n entries frozen, r (m + n) trained, N (m + n) candidates (on the CPU
with `offload`).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..engine import checks
from ..engine.chunks import wide_dtype
from .base import FactoredLinear, add_product, constant, uniform
from .spread import check_whole, held_rows

_GAIN = math.sqrt(1 / 3)  # of leaky_relu with slope sqrt(5)


class SwitchedLinear(FactoredLinear):
    """y = x W_f^T + c (x A^T) B^T + b.

    Attributes:
        frozen: W_f, m x n.
        rows_a: A, r x n.
        rows_b: B^T, r x m.
        candidates_a: N x n, a buffer unless offloaded; outdated at the positions in use. FSDP2
            leaves buffers whole on each process.
        candidates_b: N x m, likewise.
        selected: (2, r) int64 on the CPU, no buffer: which candidate each row of A and of B is.
        offload: candidates stay on the CPU when the layer is moved.
    """

    FACTORS: ClassVar[tuple[str, ...]] = ("rows_a", "rows_b")
    FROZEN: ClassVar[tuple[str, ...]] = ("frozen",)

    frozen: nn.Parameter
    candidates_a: Tensor
    candidates_b: Tensor
    selected: Tensor

    def __init__(self, linear: nn.Linear, seed: int, *, rank: int, offload: bool = False) -> None:
        checks.choice("offload", offload, (True, False))
        super().__init__(linear, rank)
        if self.rank < 2:
            raise ValueError(f"rank={self.rank}: accepted for SwitchLoRA is at least 2")
        m, n, r, count = self.out_features, self.in_features, self.rank, min(linear.weight.shape)
        weight = linear.weight.detach()
        self.scaling = 1.0 / r
        self.offload = offload
        std_a = (math.sqrt(m) * r / n**1.5) ** 0.25 * math.sqrt(_GAIN)
        std_b = (r / math.sqrt(m * n)) ** 0.25 * math.sqrt(_GAIN)
        candidates_a = uniform((count, n), math.sqrt(3) * std_a, weight, seed, 0)
        candidates_b = uniform((count, m), math.sqrt(3) * std_b, weight, seed, 1)
        chosen = torch.arange(count - r, count, device="cpu")
        # The switched windows of A and B are shifted by r / 2.
        self.selected = torch.stack([chosen, chosen.roll(r // 2)])
        self.rows_a = nn.Parameter(candidates_a[-r:].clone())
        self.rows_b = nn.Parameter(candidates_b[-r:].roll(r // 2, 0).clone())
        frozen = weight.clone()
        if not weight.is_meta:
            add_product(frozen, self.rows_b.detach().mT, self.rows_a.detach(), -self.scaling, seed)
        self.frozen = nn.Parameter(frozen, requires_grad=False)
        for name, candidates in (("candidates_a", candidates_a), ("candidates_b", candidates_b)):
            if offload:
                setattr(self, name, candidates if weight.is_meta else candidates.cpu())
            else:
                self.register_buffer(name, candidates)

    @classmethod
    def of(cls, linear: nn.Linear, seed: int, **options: Any) -> Self:
        """See `FactoredLinear.of`; options `rank` and `offload`."""
        return cls(linear, seed, **options)

    def host_tensors(self) -> tuple[str, ...]:
        """See `FactoredLinear.host_tensors`."""
        return ("selected", "candidates_a", "candidates_b") if self.offload else ("selected",)

    @property
    def spare(self) -> int:
        """Candidates of a side that are not in use."""
        return len(self.candidates_a) - self.rank

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        projected = functional.linear(x, self.rows_a) * self.scaling
        return functional.linear(x, constant(self.frozen), self.bias) + projected @ self.rows_b

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W_f + c B A."""
        check_whole(self)
        wide = wide_dtype(self.rows_a)
        product = self.rows_b.to(wide).mT @ self.rows_a.to(wide)
        return product.mul_(self.scaling).add_(self.frozen)

    def differentiable_weight(self) -> Tensor:
        """W_f + c B A."""
        return self.rows_b.mT @ self.rows_a * self.scaling + constant(self.frozen)

    @torch.no_grad()
    def switch(self, side: int, first: int, count: int, seed: int) -> Tensor:
        """In place: exchanges rows first, first + 1, ... (mod r) for candidates; W is unchanged.

        Args:
            side: 0 for A, 1 for B.
            first: the first row.
            count: how many rows, at most min(r, N - r).
            seed: of the rounding of a bf16 W_f.

        Returns:
            (count,) positions of the rows.
        """
        r = self.rank
        frozen, *both = (held_rows(part) for part in (self.frozen, self.rows_a, self.rows_b))
        rows, other = both[side], both[1 - side]
        candidates = self.candidates_a if side == 0 else self.candidates_b
        selected = self.selected[side]
        start = int(selected[first - 1]) + 1
        places = torch.tensor([(first + i) % r for i in range(count)])
        fresh = torch.tensor([(start + i) % len(candidates) for i in range(count)])
        at = places.to(rows.local.device)
        old = rows.pick(at)
        new = candidates[fresh.to(candidates.device)].to(at.device)
        change, beside = old.to(wide_dtype(old)) - new, other.pick(at)
        left_km, right_kn = (beside, change) if side == 0 else (change, beside)
        left_mk = left_km[:, frozen.rows].mT
        add_product(frozen.local, left_mk, right_kn, self.scaling, seed, frozen.span.start)
        # The factors may have been cast since the candidates were made.
        candidates[selected[places].to(candidates.device)] = old.to(candidates)
        rows.put(at, new.to(old.dtype))
        selected[places] = fresh
        return at
