"""LLaMA's matrices at three sizes, gradients with a decaying spectrum, and how much is measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

MODES = 256  # leading directions of a synthetic gradient


@dataclass(frozen=True)
class Model:
    """A model's matrices.

    Attributes:
        name: as elsewhere.
        hidden: width.
        inner: width of the MLP.
        layers: how many.
        heads: of attention.
        vocabulary: entries.
        rank: of the projection.
    """

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    rank: int

    def projected(self) -> list[tuple[int, int]]:
        """(m, n) of each projected matrix."""
        h, i = self.hidden, self.inner
        return [(h, h)] * 4 * self.layers + [(i, h), (i, h), (h, i)] * self.layers

    def shapes(self) -> Counter[tuple[int, int]]:
        """How many there are of each shape."""
        return Counter(self.projected())

    def parameters(self) -> int:
        """How many numbers are trained."""
        projected = sum(m * n for m, n in self.projected())
        return projected + 2 * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden


MODELS = {
    "60m": Model("60m", 512, 1376, 8, 8, 32000, 128),
    "1b": Model("1b", 2048, 5461, 24, 32, 32000, 512),
    "7b": Model("7b", 4096, 11008, 32, 32, 32000, 1024),
}


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        models: by name.
        copy_numel: bf16 entries that a copy moves.
        gemm_side: of the matrix products.
        kernel_numel: entries of the kernels that move bytes, a multiple of 2^15.
        draws: inputs on which each kernel meets its reference.
        samples: timed calls of a measurement.
        sequence: tokens of a training step.
    """

    models: dict[str, Model]
    copy_numel: int
    gemm_side: int
    kernel_numel: int
    draws: int
    samples: int
    sequence: int


def _shrunk(hidden: int, inner: int, layers: int, rank: int) -> dict[str, Model]:
    return {
        name: replace(
            model, hidden=hidden, inner=inner, layers=layers, heads=4, vocabulary=128, rank=rank
        )
        for name, model in MODELS.items()
    }


#: "full" fills a card; the others have the same structure at sizes for a CPU.
SIZES = {
    "full": Size(MODELS, 1 << 28, 8192, 1 << 27, 40, 20, 1024),
    "small": Size(_shrunk(96, 160, 2, 16), 1 << 20, 256, 1 << 17, 5, 5, 64),
    "tiny": Size(_shrunk(32, 48, 1, 4), 1 << 14, 32, 1 << 15, 1, 1, 8),
}


class Matrices(nn.Module):
    """The parameters of a model under LLaMA's names, without a forward pass."""

    def __init__(self, model: Model, *, ends: bool = True, copies: int | None = None) -> None:
        """Makes the parameters on torch's current default device, in its default type.

        Args:
            model: shapes.
            ends: with embedding, head and norms.
            copies: at most so many matrices of each shape, instead of all.
        """
        super().__init__()
        blocks: list[nn.Module] = []
        seen: Counter[tuple[int, int]] = Counter()
        for _ in range(model.layers):
            block = nn.ModuleDict({"self_attn": nn.ModuleDict(), "mlp": nn.ModuleDict()})
            h, i = model.hidden, model.inner
            for part, name, shape in (
                *(("self_attn", f"{letter}_proj", (h, h)) for letter in "qkvo"),
                *(("mlp", f"{name}_proj", (i, h)) for name in ("gate", "up")),
                ("mlp", "down_proj", (h, i)),
            ):
                seen[shape] += 1
                if copies is None or seen[shape] <= copies:
                    group = block[part]
                    assert isinstance(group, nn.ModuleDict)
                    group[name] = nn.Linear(shape[1], shape[0], bias=False)
            blocks.append(block)
        self.layers = nn.ModuleList(blocks)
        if ends:
            self.embed_tokens = nn.Embedding(model.vocabulary, model.hidden)
            self.lm_head = nn.Linear(model.hidden, model.vocabulary, bias=False)
            self.norms = nn.ParameterList(
                nn.Parameter(torch.ones(model.hidden)) for _ in range(2 * model.layers + 1)
            )

    def projected(self) -> list[nn.Parameter]:
        """Weights of attention and MLP."""
        return list(self.layers.parameters())


def made(
    model: Model, device: torch.device | str, *, ends: bool = True, copies: int | None = None
) -> Matrices:
    """bf16 parameters on a device, without gradients; see `Matrices`."""
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Matrices(model, ends=ends, copies=copies)
    finally:
        torch.set_default_dtype(former)


def fill(matrices: Matrices, seed: int = 0) -> None:
    """Gives every parameter a gradient.

    An optimizer may replace parameters when it is built, so gradients come after it: a step would
    pass over parameters without one.
    """
    projected = {id(weight) for weight in matrices.projected()}
    for offset, weight in enumerate(matrices.parameters()):
        if id(weight) in projected:
            shape = (weight.shape[0], weight.shape[1])
            weight.grad = gradient(shape, seed + offset, weight)
        else:
            weight.grad = torch.randn_like(weight) * 1e-3


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
