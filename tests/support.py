"""Small pieces shared by tests of several packages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from seeding import seed_generators
from torch import Tensor, nn

from lowrank.optimizers.layers import FactoredLinear, QuantizedLowRankLinear

ROOT = Path(__file__).resolve().parent.parent
#: Real English text in C4's layout, where a checkout has it beside it.
ENGLISH = ROOT.parent / "shared" / "data" / "en"


@contextmanager
def capturing() -> Iterator[None]:
    """A graph is captured, as far as an optimizer finds out."""
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
    ):
        yield


def equal(first: Any, second: Any) -> bool:
    """Whether trees of dicts, lists, tensors and numbers are equal, NaN for NaN."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return (
            first.shape == second.shape
            and first.dtype == second.dtype
            and bool(((first == second) | ((first != first) & (second != second))).all())
        )
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and bool(first == second)


def hashed(count: int, stream: int) -> Tensor:
    """Numbers in [-0.5, 0.5) that need no generator: fp64, the same on every machine."""
    x = torch.sin(12.9898 * torch.arange(1, count + 1, dtype=torch.float64) + 78.233 * stream)
    x = x * 43758.5453
    return x - torch.floor(x) - 0.5


def matrix(m: int, n: int, stream: int) -> Tensor:
    """An m x n fp64 matrix of hashed numbers."""
    return hashed(m * n, stream).reshape(m, n)


class TinyBlock(nn.Module):
    """Attention- and MLP-like layers, a norm, an embedding and a head, under LLaMA's names."""

    def __init__(self, hidden: int = 16, inner: int = 24, vocabulary: int = 32) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, hidden)
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(hidden, hidden, bias=False)})
        self.mlp = nn.ModuleDict(
            {"up_proj": nn.Linear(hidden, inner), "down_proj": nn.Linear(inner, hidden, bias=False)}
        )
        self.norm = nn.LayerNorm(hidden)
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        x = x + self.self_attn["q_proj"](x)
        x = x + self.mlp["down_proj"](torch.relu(self.mlp["up_proj"](x)))
        return self.lm_head(self.norm(x))


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyBlock:
    seed_generators(seed)
    return TinyBlock().to(dtype)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """All parameters but the frozen matrices of factored layers."""
    frozen = [
        getattr(module, name)
        for module in model.modules()
        if isinstance(module, FactoredLinear)
        for name in module.FROZEN
    ]
    return [param for param in model.parameters() if all(param is not other for other in frozen)]


def set_gradients(model: nn.Module, step: int, scale: float = 1e-2) -> None:
    """Deterministic gradients that differ from step to step."""
    for index, param in enumerate(trained(model)):
        values = hashed(param.numel(), 1000 * index + 1) + 0.6 * hashed(
            param.numel(), 1000 * index + step + 2
        )
        param.grad = (scale * values).reshape(param.shape).to(param)
    for index, module in enumerate(model.modules()):
        if isinstance(module, QuantizedLowRankLinear) and module._probe is not None:
            values = hashed(module._probe.numel(), 1000 * index + step + 500)
            module._probe.grad = (scale * values).reshape(module._probe.shape).to(module._probe)


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in trained(model)]
