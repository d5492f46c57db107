"""Plain low-rank factors beside a frozen weight: W = W_f + c B A (Hu et al., LoRA, 2021).

The frozen weight is a buffer and may be left out (`W = c B A`). Forward and backward never make a
dense product: 2 T r (m + n) flops beside the frozen layer's, and no gradient of W_f.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import FactoredLinear, add_product, kaiming_bound, uniform, wide_dtype


class LowRankLinear(FactoredLinear):
    """y = x W_f^T + c (x A^T) B^T + b.

    Attributes:
        frozen: m x n buffer, or None.
        lora_a: A, r x n, from U(+-1/sqrt(n)).
        lora_b: B, m x r, zeros beside a frozen weight.
        scaling: c = alpha / r.
    """

    FACTORS: ClassVar[tuple[str, ...]] = ("lora_a", "lora_b")

    frozen: Tensor | None

    def __init__(
        self, linear: nn.Linear, seed: int, *, rank: int, alpha: float, keep_frozen: bool = True
    ) -> None:
        super().__init__(linear, rank)
        m, n, r = self.out_features, self.in_features, self.rank
        weight = linear.weight.detach()
        self.scaling = alpha / r
        self.register_buffer("frozen", weight if keep_frozen else None)
        self.lora_a = nn.Parameter(uniform((r, n), kaiming_bound(n), weight, seed, 0))
        if keep_frozen:
            self.lora_b = nn.Parameter(torch.zeros(m, r, dtype=weight.dtype, device=weight.device))
        else:
            self.lora_b = nn.Parameter(uniform((m, r), kaiming_bound(r), weight, seed, 1))

    @classmethod
    def of(cls, linear: nn.Linear, seed: int, **options: Any) -> Self:
        """See `FactoredLinear.of`; options `rank`, `alpha` and `keep_frozen`."""
        return cls(linear, seed, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        low = functional.linear(x, self.lora_a)
        if self.frozen is None:
            return functional.linear(low * self.scaling, self.lora_b, self.bias)
        y = functional.linear(x, self.frozen, self.bias)
        return y + functional.linear(low * self.scaling, self.lora_b)

    @torch.no_grad()
    def product(self) -> Tensor:
        """c B A, m x n, in fp32 or fp64."""
        wide = wide_dtype(self.lora_a)
        return (self.lora_b.to(wide) @ self.lora_a.to(wide)).mul_(self.scaling)

    @torch.no_grad()
    def merge(self, seed: int) -> None:
        """In place: W_f <- W_f + c B A with new factors, A random and B zero; W stays.

        The sum is made in fp32 and rounded stochastically where W_f is bf16: to the nearest, what
        a merge adds below W_f's precision would be lost each time.

        Args:
            seed: of A and the rounding.

        Raises:
            ValueError: there is no frozen weight.
        """
        if self.frozen is None:
            raise ValueError("a layer without a frozen weight has nothing to merge into")
        add_product(self.frozen, self.lora_b, self.lora_a, self.scaling, seed)
        bound = kaiming_bound(self.in_features)
        self.lora_a.copy_(uniform(tuple(self.lora_a.shape), bound, self.lora_a, seed))
        self.lora_b.zero_()

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W_f + c B A."""
        product = self.product()
        return product if self.frozen is None else product.add_(self.frozen)
