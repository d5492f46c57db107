"""Several processes on one machine, and models to train on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from forked import run as run  # for tests
from seeding import seed_generators
from support import hashed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn import functional


class Block(nn.Module):
    """Tall, wide and square matrices, vectors shorter than the number of processes, odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 12)
        self.attn = nn.ModuleDict(
            {"q": nn.Linear(12, 12, bias=False), "gate": nn.Linear(12, 5, bias=True)}
        )
        self.mlp = nn.ModuleDict({"up": nn.Linear(12, 21), "down": nn.Linear(21, 12, bias=False)})
        self.head = nn.Linear(12, 29, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        gates = torch.sin(self.attn["gate"](x) * torch.arange(1, 6)).sum(-1, keepdim=True)
        x = x + torch.tanh(self.attn["q"](x)) * gates
        x = x + self.mlp["down"](torch.tanh(self.mlp["up"](x)))
        return self.head(x)


def block(seed: int = 0) -> Block:
    seed_generators(seed)
    return Block()


@cache
def tokens(step: int, part: int, rows: int = 12, length: int = 7) -> Tensor:
    """A batch that needs no generator."""
    numbers = hashed(rows * length, 100 * step + part) + 0.5
    return (numbers * 29).long().clamp_(0, 28).view(rows, length)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    rank: int = 0,
    world: int = 1,
    *,
    clip: float | None = 1.0,
) -> None:
    """Two micro-batches a step, of which each process takes its rows."""
    for step in steps:
        for part in range(2):
            rows = tokens(step, part)
            own = rows[rank * len(rows) // world : (rank + 1) * len(rows) // world]
            if world > 1 and hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(part == 1)
            logits = model(own[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), own[:, 1:].flatten())
            (loss / 2).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def shard(model: nn.Module, mesh: DeviceMesh, *, columns: bool = False) -> nn.Module:
    """FSDP2's wrapping of a model; with `columns` matrices are spread by columns if they divide."""

    def place(param: nn.Parameter) -> Shard | None:
        by_columns = columns and param.dim() == 2 and param.shape[1] % mesh.size() == 0
        return Shard(1) if by_columns else None

    fully_shard(model, mesh=mesh, shard_placement_fn=place)
    return model


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All parameters as plain tensors."""
    return {
        name: (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()
        for name, param in model.named_parameters()
    }


def distance(made: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative distance of any parameter."""
    assert made.keys() == wanted.keys()
    # `max` may pass over NaN.
    assert all(value.isfinite().all() for value in (*made.values(), *wanted.values()))
    return max(
        float((made[name] - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12))
        for name in wanted
    )


class Recorder:
    """The collectives of a stretch of a program: (name, entries, bytes) each."""

    #: The argument that holds what a process sends: of a gather its part, else all of it.
    SENT: ClassVar = {
        "all_reduce": 0,
        "broadcast": 0,
        "reduce_scatter_tensor": 1,
        "reduce_scatter_single": 1,
        "all_gather_into_tensor": 1,
        "all_gather_single": 1,
    }

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        kept = {name: getattr(dist, name) for name in self.SENT if hasattr(dist, name)}
        for name, call in kept.items():
            setattr(dist, name, self._recorded(name, call))
        try:
            yield
        finally:
            for name, call in kept.items():
                setattr(dist, name, call)

    def _recorded(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*arguments: Any, **keywords: Any) -> Any:
            sent = arguments[self.SENT[name]]
            self.calls.append((name, sent.numel(), sent.numel() * sent.element_size()))
            return call(*arguments, **keywords)

        return recorded
