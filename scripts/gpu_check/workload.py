"""LLaMA's matrices at three sizes, and gradients with a decaying spectrum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MODES = 256  # leading directions of a synthetic gradient


@dataclass(frozen=True)
class Model:
    """A model's matrices.

    Attributes:
        name: as elsewhere.
        hidden: width.
        inner: width of the MLP.
        layers: how many.
        vocabulary: entries.
        rank: of the projection.
    """

    name: str
    hidden: int
    inner: int
    layers: int
    vocabulary: int
    rank: int

    def projected(self) -> list[tuple[int, int]]:
        """(m, n) of each projected matrix."""
        h, i = self.hidden, self.inner
        return [(h, h)] * 4 * self.layers + [(i, h), (i, h), (h, i)] * self.layers

    def shapes(self) -> Counter[tuple[int, int]]:
        """How many there are of each shape."""
        return Counter(self.projected())

    def plain(self) -> list[tuple[int, ...]]:
        """Shapes of embedding, head and norms."""
        ends = [(self.vocabulary, self.hidden)] * 2
        return [*ends, *[(self.hidden,)] * (2 * self.layers + 1)]


MODELS = {
    "60m": Model("60m", 512, 1376, 8, 32000, 128),
    "1b": Model("1b", 2048, 5461, 24, 32000, 512),
    "7b": Model("7b", 4096, 11008, 32, 32000, 1024),
}
#: The same structure at a size that a CPU steps through in no time.
TOYS = {name: Model(name, 32, 48, 2, 64, 8) for name in MODELS}


def gradient(shape: tuple[int, int], seed: int, like: Tensor) -> Tensor:
    """A gradient with singular values near i^-0.8 for the first directions, and noise below.

    Args:
        shape: (m, n).
        seed: another one makes another matrix with other directions.
        like: gives type and device.
    """
    generator = torch.Generator(like.device).manual_seed(seed)
    modes = min(MODES, *shape)
    m, n = shape

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=like.device)

    left, right = normal(m, modes) / m**0.5, normal(modes, n) / n**0.5
    left *= torch.arange(1, modes + 1, device=like.device, dtype=torch.float32) ** -0.8
    made: Tensor = left.to(like.dtype) @ right.to(like.dtype)
    return made.add_(normal(m, n).to(like.dtype), alpha=0.02 / (m + n) ** 0.5)


def gradients(model: Model, like: Tensor) -> Iterator[Tensor]:
    """One for each projected matrix."""
    for seed, shape in enumerate(model.projected()):
        yield gradient(shape, seed, like)
