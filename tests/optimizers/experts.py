"""Models that store their experts as one parameter, and the same with a parameter for each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from support import hashed
from table import TABLE, Row
from torch import Tensor, nn

from lowrank.optimizers import LowRankOptimizer, build

EXPERTS = 3
#: Projecting methods of whole weights.
ROWS = tuple(row for row in TABLE if row.projects and not row.factored and not row.int8)


class Moe(nn.Module):
    """Wide and tall experts, an attention matrix, a router, a norm and an embedding."""

    def __init__(self, experts: int = EXPERTS, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.attn = nn.ModuleDict({"q": nn.Linear(12, 12, bias=False)})
        self.mlp = nn.Module()
        self.mlp.gate = nn.Linear(12, experts, bias=False)
        self.mlp.up = nn.Parameter(torch.empty(experts, 20, 12))
        self.mlp.down = nn.Parameter(torch.empty(experts, 12, 20))
        self.norm = nn.LayerNorm(12)
        self.to(dtype)
        for index, param in enumerate(self.parameters()):
            values = hashed(param.numel(), 77 + index).view(param.shape)
            param.data.copy_(values)


def gradient(shape: Sequence[int], index: int, step: int) -> Tensor:
    """Experts get ever other gradients; one has no token at steps 0, 1, 5 and 6."""
    count = torch.Size(shape).numel()
    values = 1e-2 * (hashed(count, 50 * index + 1) + 0.6 * hashed(count, 50 * index + step + 2))
    made = values.view(tuple(shape))
    if len(shape) == 3 and step in (0, 1, 5, 6):
        made[step % len(made)] = 0.0
    return made


def set_gradients(model: nn.Module, step: int) -> None:
    for index, param in enumerate(model.parameters()):
        param.grad = gradient(param.shape, index, step).to(param)


def options_of(row: Row, **options: Any) -> dict[str, Any]:
    """Rank 4, a refresh every 3 steps."""
    made = {"lr": 1e-2, "rank": 4, "update_proj_gap": 3, **row.options, **options}
    return made | ({"weight_bits": None} if row.name.startswith("qgalore") else {})


def stacked(row: Row, model: nn.Module, **options: Any) -> LowRankOptimizer:
    return build(row.name, model, **options_of(row, **options))


class Separate:
    """An optimizer of the same model in which each expert is a parameter of its own."""

    def __init__(self, optimizer: LowRankOptimizer, model: nn.Module) -> None:
        """Before the first step of `optimizer`, whose groups and weights are copied."""
        self.parts: dict[str, list[nn.Parameter]] = {}
        own = {name: param.detach().clone() for name, param in model.named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            made: list[nn.Parameter] = []
            names: list[str] = []
            for name in group["param_names"]:
                weight = own[name]
                pieces = list(weight) if weight.dim() == 3 else [weight]
                self.parts[name] = [nn.Parameter(piece.clone()) for piece in pieces]
                made += self.parts[name]
                several = weight.dim() == 3
                names += [f"{name}.{i}" if several else name for i in range(len(pieces))]
            groups.append({**copy.copy(group), "params": made, "param_names": names})
        self.optimizer = type(optimizer)(groups)

    def set_gradients(self, model: nn.Module) -> None:
        """Those of the model, expert by expert."""
        for name, param in model.named_parameters():
            assert param.grad is not None
            pieces = list(param.grad) if param.dim() == 3 else [param.grad]
            for part, piece in zip(self.parts[name], pieces, strict=True):
                part.grad = piece.clone()

    def weights(self) -> dict[str, Tensor]:
        return {
            name: torch.stack([p.detach() for p in parts]) if len(parts) > 1 else parts[0].detach()
            for name, parts in self.parts.items()
        }

    def assert_equal(self, optimizer: LowRankOptimizer, model: nn.Module) -> None:
        """Weights and states are the same to the bit."""
        made = self.weights()
        for name, param in model.named_parameters():
            assert torch.equal(param, made[name]), name
            if param.dim() != 3:
                continue
            state = optimizer.state[param]
            for i, part in enumerate(self.parts[name]):
                for key, value in self.optimizer.state[part].items():
                    mine = state[key]
                    if isinstance(value, Tensor):
                        assert torch.equal(mine[i], value), (name, i, key)
                    else:
                        assert int(mine[i] if isinstance(mine, Tensor) else mine) == value, key
