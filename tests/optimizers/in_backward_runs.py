"""Training a tiny model with updates in the backward pass, and without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import tiny_model, weights
from table import TABLE, Row
from torch import Tensor, nn

from lowrank.optimizers import InBackward, LowRankOptimizer, build, update_in_backward
from lowrank.optimizers.engine.in_backward import passes


@contextmanager
def unexamined() -> Iterator[None]:
    """Without the look at all objects of the process, which takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "refuse_wrappers", lambda optimizer, **_: None)
        yield


def batch(step: int, part: int, rows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + part)
    return torch.randint(0, 32, (rows, 6), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1]).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def backward(model: nn.Module, step: int, parts: int = 1) -> None:
    for part in range(parts):
        (loss_of(model, batch(step, part)) / parts).backward()


def make(
    name: str = "galore_adamw", dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, LowRankOptimizer]:
    """A model and its optimizer, which refits every third step."""
    model = tiny_model(dtype=dtype)
    return model, build(name, model, **{"lr": 1e-2, "rank": 4, "update_proj_gap": 3, **options})


class Run:
    """A model, its optimizer under a schedule, and updates in the backward pass or not."""

    def __init__(
        self,
        row: Row,
        accumulation: int = 1,
        max_norm: float | None = None,
        norm: Any = "exact",
        *,
        on: bool = True,
        gap: int = 2,
        refit: Any = "whole",
        **options: Any,
    ) -> None:
        self.model = row.prepare(tiny_model())
        self.start = weights(self.model)
        given: dict[str, Any] = {"update_proj_gap": gap, **options}
        if "update_proj_gap" in row.options:
            given.pop("update_proj_gap")
        self.optimizer = row.build(self.model, **given)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: 1 / (s + 1))
        self.parts, self.max_norm = accumulation, max_norm
        self.norms: list[float | None] = []
        self.handle: InBackward | None = None
        if on:
            self.handle = update_in_backward(self.optimizer, accumulation, max_norm, norm, refit)

    @property
    def params(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def steps(self, steps: range) -> Run:
        for step in steps:
            backward(self.model, step, self.parts)
            self.end_step()
        return self

    def end_step(self) -> None:
        if self.max_norm is not None and self.handle is None:
            self.norms.append(float(nn.utils.clip_grad_norm_(self.params, self.max_norm)))
        self.optimizer.step()
        if self.handle is not None:
            assert all(param.grad is None for param in self.params)
            if self.max_norm is not None:
                self.norms.append(self.handle.norm)
        self.optimizer.zero_grad()
        self.scheduler.step()

    @property
    def moved(self) -> float:
        """How far any weight has moved; where it is little, comparisons say nothing."""
        pairs = zip(weights(self.model), self.start, strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)

    def states(self) -> dict[str, Any]:
        return {
            "model": {k: v.clone() for k, v in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load(self, states: dict[str, Any]) -> None:
        self.model.load_state_dict(states["model"])
        self.optimizer.load_state_dict(states["optimizer"])
        self.scheduler.load_state_dict(states["scheduler"])


def distance(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a.detach().float() - b.detach().float()).abs().max()) for a, b in pairs)


def row_of(name: str, *, int8: bool = False) -> Row:
    return next(row for row in TABLE if row.name == name and row.int8 == int8)


def unchanged(model: nn.Module) -> Callable[[], None]:
    """A check that no weight has changed since."""
    before = copy.deepcopy(model.state_dict())

    def check() -> None:
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())

    return check
