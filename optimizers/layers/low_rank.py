"""Low-rank factors added to a frozen weight: W = W_f + c B A (Hu et al., LoRA, 2021).

The frozen weight is a parameter without gradient and may be omitted (`W = c B A`). Forward and
backward never make a dense product: 2 T r (m + n) flops besides the frozen layer's, and no gradient
of W_f.

With several heads (LoRA-the-Explorer, Huh et al., arXiv 2402.16728) W = W_f + (c / H) sum B_h A_h,
and in training each head is added to W_f alone, for its share of the batch.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..engine import checks
from ..engine.chunks import wide_dtype
from .base import FactoredLinear, add_product, constant, kaiming_bound, uniform
from .spread import check_whole, held_rows


class LowRankLinear(FactoredLinear):
    """y = x W_f^T + c (x A^T) B^T + b.

    Attributes:
        frozen: m x n, or None.
        lora_a: A, r x n, from U(+-1/sqrt(n)); the heads' factors stacked, H r x n.
        lora_b: B, m x r, zeros if there is a frozen weight; m x H r.
        alpha: c r.
        scaling: c = alpha / r.
        heads: H.
    """

    FACTORS: ClassVar[tuple[str, ...]] = ("lora_a", "lora_b")
    FROZEN: ClassVar[tuple[str, ...]] = ("frozen",)
    SETTINGS: ClassVar[tuple[str, ...]] = ("alpha", "heads")

    frozen: nn.Parameter | None

    def __init__(
        self,
        linear: nn.Linear,
        seed: int,
        *,
        rank: int,
        alpha: float,
        keep_frozen: bool = True,
        heads: int = 1,
    ) -> None:
        checks.number("alpha", alpha)
        checks.integer("heads", heads, low=1)
        super().__init__(linear, rank)
        m, n, r = self.out_features, self.in_features, self.rank * heads
        weight = linear.weight.detach()
        self.alpha, self.scaling, self.heads = float(alpha), alpha / self.rank, heads
        frozen = nn.Parameter(weight, requires_grad=False) if keep_frozen else None
        self.register_parameter("frozen", frozen)
        self.lora_a = nn.Parameter(uniform((r, n), kaiming_bound(n), weight, seed, 0))
        if keep_frozen:
            self.lora_b = nn.Parameter(torch.zeros(m, r, dtype=weight.dtype, device=weight.device))
        else:
            self.lora_b = nn.Parameter(uniform((m, r), kaiming_bound(r), weight, seed, 1))

    @classmethod
    def of(cls, linear: nn.Linear, seed: int, **options: Any) -> Self:
        """See `FactoredLinear.of`; options `rank`, `alpha`, `keep_frozen` and `heads`."""
        return cls(linear, seed, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m).

        Raises:
            ValueError: in training, if the batch can't be divided evenly among the heads.
        """
        if self.heads > 1 and self.training:
            return self._by_heads(x)
        projected = functional.linear(x, self.lora_a)
        scaling = self.scaling / self.heads
        if self.frozen is None:
            return functional.linear(projected * scaling, self.lora_b, self.bias)
        y = functional.linear(x, constant(self.frozen), self.bias)
        return y + functional.linear(projected * scaling, self.lora_b)

    def _by_heads(self, x: Tensor) -> Tensor:
        """Divides the batch among the heads in order."""
        count, r = self.heads, self.rank
        if x.dim() < 2 or x.shape[0] % count:
            raise ValueError(
                f"a batch of {x.shape[0] if x.dim() > 1 else 1} for {count} heads: accepted is a "
                "multiple of them"
            )
        a_hnr = self.lora_a.view(count, r, -1).mT
        b_hrm = self.lora_b.mT.view(count, r, -1)
        rows_htn = x.reshape(count, -1, x.shape[-1])
        projected_htm = ((rows_htn @ a_hnr) * self.scaling) @ b_hrm
        projected = projected_htm.reshape(*x.shape[:-1], self.out_features)
        if self.frozen is None:
            return projected if self.bias is None else projected + self.bias
        return functional.linear(x, constant(self.frozen), self.bias) + projected

    @torch.no_grad()
    def product(self) -> Tensor:
        """c B A, the mean over heads, m x n, in fp32 or fp64."""
        wide = wide_dtype(self.lora_a)
        return (self.lora_b.to(wide) @ self.lora_a.to(wide)).mul_(self.scaling / self.heads)

    @torch.no_grad()
    def merge(self, seed: int) -> None:
        """In place: W_f <- W_f + c B A with new factors, A random and B zero; W is unchanged.

        The sum is computed in fp32 and rounded stochastically if W_f is bf16: rounding to nearest
        would lose additions below W_f's precision.

        Args:
            seed: of A and the rounding.

        Raises:
            ValueError: there is no frozen weight.
        """
        if self.frozen is None:
            raise ValueError("a layer without a frozen weight has nothing to merge into")
        frozen, b, a = (held_rows(part) for part in (self.frozen, self.lora_b, self.lora_a))
        scale = self.scaling / self.heads
        add_product(frozen.local, b.at(frozen.span), a.whole(), scale, seed, frozen.span.start)
        bound = kaiming_bound(self.in_features)
        a.fill(uniform(tuple(self.lora_a.shape), bound, a.local, seed))
        b.local.zero_()

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W_f + c B A."""
        check_whole(self)
        product = self.product()
        return product if self.frozen is None else product.add_(self.frozen)

    def differentiable_weight(self) -> Tensor | None:
        """W_f + c B A; in training, several heads have a weight each."""
        if self.heads > 1 and self.training:
            return None
        product = self.lora_b @ self.lora_a * (self.scaling / self.heads)
        return product if self.frozen is None else product + constant(self.frozen)
