"""Memory of an optimizer: its state, and what its steps and refreshes need, from fake steps."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lowrank.optimizers import build, state_bytes_by_category

from .ledger import Ledger

Bytes = Counter[str]


@dataclass(frozen=True)
class Update:
    """What an optimizer takes beside weights and gradients.

    Attributes:
        state: bytes by category, as `state_bytes_by_category` names them.
        step: scratch of a step between refreshes.
        refresh: scratch of a step that fits all bases or runs all events of layers.
    """

    state: dict[str, int]
    step: int
    refresh: int


def simulate(
    name: str, model: nn.Module, options: dict[str, Any], *, granularity: int
) -> Update:
    """Builds an optimizer for a model of fake tensors and takes steps with it.

    Call it under `FakeTensorMode`. The model is left without gradients.

    Raises:
        ValueError: as `build`.
    """
    ledger = Ledger(granularity, "scratch")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), ledger:
        warnings.simplefilter("ignore")
        optimizer = build(name, model, **options)
        state = state_bytes_by_category(optimizer)
        for param in model.parameters():
            if param.requires_grad:
                param.grad = torch.empty(param.shape, dtype=param.dtype, device=param.device)
        try:
            first = _step(optimizer, ledger, 0)
            later = _step(optimizer, ledger, 1)
            again = _step(optimizer, ledger, _next_refresh(optimizer))
        finally:
            for param in model.parameters():
                param.grad = None
    return Update(state, later, max(first, later, again))


def _step(optimizer: Optimizer, ledger: Ledger, steps_done: int) -> int:
    """Bytes that a step adds at its peak, after so many steps."""
    for state in optimizer.state.values():
        count = state.get("step")
        if count is not None:
            ledger.know(count, float(steps_done))
    ledger.restart()
    before = ledger.now.total
    optimizer.step()
    return ledger.peak.total - before


def _next_refresh(optimizer: Optimizer) -> int:
    """Steps after which all matrices are due."""
    gaps = [group.get("update_proj_gap") for group in optimizer.param_groups]
    return max((gap for gap in gaps if isinstance(gap, int)), default=1)
