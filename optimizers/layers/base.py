"""The layer seam: a linear layer whose weight is a product (and sum) of trained parts.

A factored layer takes the place of an `nn.Linear`. It says which matrix it stands for
(`effective_weight`), so that any of them can be merged into a plain layer, compared or exported.
What happens to it on a schedule (merges, switches, resampling) is the optimizer's; a layer only
knows how to carry it out.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lowrank.cuda.noise import mix, stochastic_bfloat16

from ..engine.chunks import row_chunks, wide_dtype


class FactoredLinear(nn.Module):
    """y = x W^T + b with a weight W (m x n) made of parts.

    Attributes:
        in_features: n.
        out_features: m.
        rank: r of the trained factors, at most min(m, n).
        bias: (m,) or None, trained plainly.
    """

    #: Trained parts, by the names of their parameters.
    FACTORS: ClassVar[tuple[str, ...]]

    in_features: int
    out_features: int
    rank: int
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank = min(rank, linear.in_features, linear.out_features)
        self.bias = linear.bias
        self.train(linear.training)

    @classmethod
    @abstractmethod
    def of(cls, linear: nn.Linear, seed: int, **options: Any) -> Self:
        """A layer in the place of `linear`.

        Args:
            linear: the layer, whose bias is taken over and whose weight is read.
            seed: of everything random about this layer.
            **options: the method's own.
        """

    @abstractmethod
    def effective_weight(self) -> Tensor:
        """W as a new m x n tensor without gradient, in fp32 (fp64 where the parts are)."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parts."""
        part: Tensor = getattr(self, self.FACTORS[0])
        return part.dtype

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain layer with the same function; the bias is shared."""
        weight = self.effective_weight().to(self.dtype)
        m, n = self.out_features, self.in_features
        linear = nn.Linear(n, m, bias=False, device="meta", dtype=self.dtype)
        linear.weight = nn.Parameter(weight)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


def uniform(shape: tuple[int, ...], bound: float, like: Tensor, *seed: int) -> Tensor:
    """U(-bound, bound), equal on every device and process for equal seeds.

    Args:
        shape: of the result.
        bound: largest magnitude.
        like: gives dtype and device.
        *seed: integers that are mixed into one seed.
    """
    if like.device.type == "meta":
        return torch.empty(shape, dtype=like.dtype, device="meta")
    generator = torch.Generator().manual_seed(mix(*seed))
    drawn = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
    return drawn.to(device=like.device, dtype=like.dtype)


def kaiming_bound(fan_in: int) -> float:
    """The bound of `kaiming_uniform_(a=sqrt(5))`: 1 / sqrt(fan_in)."""
    return 1.0 / math.sqrt(fan_in)


@torch.no_grad()
def add_product(
    weight_mn: Tensor, left_mk: Tensor, right_kn: Tensor, scale: float, seed: int
) -> None:
    """In place: weight <- weight + scale * left right, summed in fp32 (fp64) in chunks of rows.

    A bf16 weight is rounded stochastically: to the nearest, small products would be lost each time.

    Args:
        weight_mn: m x n.
        left_mk: m x k.
        right_kn: k x n.
        scale: factor on the product.
        seed: of the rounding.
    """
    wide, n = wide_dtype(weight_mn), weight_mn.shape[1]
    right_kn = right_kn.to(wide)
    for span in row_chunks(weight_mn):
        part = weight_mn[span]
        total = part.to(wide).addmm(left_mk[span].to(wide), right_kn, alpha=scale)
        if part.dtype == torch.bfloat16:
            total = stochastic_bfloat16(total, seed, span.start * n)
        part.copy_(total)
