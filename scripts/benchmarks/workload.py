"""What is optimized: the projected matrices of a LLaMA and gradients with a decaying spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: (count, m, n) of the attention and MLP matrices of llama_60m.
LLAMA_60M = ((32, 512, 512), (16, 1376, 512), (8, 512, 1376))


@dataclass(frozen=True)
class Workload:
    """Matrices and how they are projected.

    Attributes:
        shapes: (count, m, n) of each kind of matrix.
        rank: of the projection.
        seed: of weights and gradients.
    """

    shapes: Sequence[tuple[int, int, int]] = LLAMA_60M
    rank: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        smallest = min(min(m, n) for _, m, n in self.shapes)
        if not 1 <= self.rank <= smallest:
            raise ValueError(f"rank is {self.rank}; it must be from 1 to {smallest}")

    def sizes(self) -> list[tuple[int, int]]:
        """(m, n) of each matrix, the kinds mixed as in a model."""
        left = [[count, m, n] for count, m, n in self.shapes]
        parts = min(count for count, _, _ in self.shapes)
        sizes = []
        for part in range(parts):
            for kind in left:
                take = kind[0] // (parts - part)
                sizes += [(kind[1], kind[2])] * take
                kind[0] -= take
        return sizes

    def parameters(self) -> list[nn.Parameter]:
        """New fp32 weights, the same at each call."""
        generator = torch.Generator().manual_seed(self.seed)
        return [
            nn.Parameter(torch.randn(m, n, generator=generator) * 0.02) for m, n in self.sizes()
        ]

    def gradients(self, batches: int) -> list[list[Tensor]]:
        """Gradients of several batches: a common part and a smaller one of each batch's own.

        Both have singular values i^-1.2, which keeps 97 % of the energy in 8 directions and 99.9 %
        in 128, as gradients of a LLaMA in training do (early ones are steeper still), and a batch's
        own part has an eighth of the energy: another batch's basis keeps about 88 %.
        """
        generator = torch.Generator().manual_seed(self.seed + 1)
        common = [self._decaying(m, n, generator) for m, n in self.sizes()]
        return [[self._with_own(signal, generator) for signal in common] for _ in range(batches)]

    def _decaying(self, m: int, n: int, generator: torch.Generator) -> Tensor:
        inner = min(m, n)
        values = torch.arange(1, inner + 1).pow(-1.2)
        # Random factors are nearly orthogonal; exactness does not matter here.
        left = torch.randn(m, inner, generator=generator) / m**0.5
        right = torch.randn(inner, n, generator=generator) / n**0.5
        product: Tensor = (left * values) @ right
        return product.div_(torch.linalg.vector_norm(product))

    def _with_own(self, signal: Tensor, generator: torch.Generator) -> Tensor:
        m, n = signal.shape
        return self._decaying(m, n, generator).mul_(0.125**0.5).add_(signal).mul_(0.1)


def give(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Makes `gradients` the parameters' gradients, without copying."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
