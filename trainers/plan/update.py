"""Memory of an optimizer: its state, and what its steps and refreshes need, from fake steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowrank.optimizers import FactoredAdamW, LowRankOptimizer
from lowrank.optimizers.engine.scratch import watching_batches

from .deeper import Depths, PartRecorder, Step, deeper
from .ledger import Ledger


@dataclass(frozen=True)
class Update:
    """What an optimizer takes beside weights and ordinary gradients.

    Attributes:
        step: scratch of a step between refreshes.
        refresh: scratch of a step that fits all bases or runs the events of all layers.
        left: bytes that the backward pass before such a step leaves beside parameters' gradients,
            as those of quantised weights; they grow with the depth.
    """

    step: int
    refresh: int
    left: int = 0

    @staticmethod
    def of(steps: Sequence[Step], peaks: Sequence[int] | None = None) -> Update:
        """What simulated steps take, or these with other peaks."""
        peaks = [step.peak for step in steps] if peaks is None else peaks
        usual = [peak for step, peak in zip(steps, peaks, strict=True) if not step.renews]
        left = max((step.left for step in steps if step.renews), default=0)
        return Update(max(0, *usual, 0), max(0, *peaks), left)

    @staticmethod
    def deeper(first: Sequence[Step], second: Sequence[Step], depths: Depths) -> Update | None:
        """Of a deeper model, from steps of two shallow ones; None where it isn't certain."""
        peaks = [deeper(few, many, depths) for few, many in zip(first, second, strict=True)]
        known = [peak for peak in peaks if peak is not None]
        return Update.of(second, known) if len(known) == len(peaks) else None


def simulate(
    optimizer: LowRankOptimizer,
    model: nn.Module,
    differentiate: Callable[[], None],
    *,
    granularity: int,
    beside: bool = False,
    usual: bool = True,
    renewing: bool = True,
) -> list[Step]:
    """Takes steps with an optimizer of fake tensors, as the trainer would.

    Call it under `FakeTensorMode`. The model is left without gradients, and numbers of the state as
    they were, so that another simulation finds the same refreshes due.

    Args:
        optimizer: which has taken no steps but these.
        model: its model.
        differentiate: leaves gradients.
        granularity: bytes to which the allocator rounds up.
        beside: whether all that a backward pass has left, such as gradients of quantised weights,
            is counted elsewhere; else it is scratch, but for parameters' own gradients.
        usual: whether a step is wanted in which nothing is due.
        renewing: whether one is wanted, after the first, in which everything is.

    Returns:
        The first step, in which everything is due, and those that are wanted.
    """
    happened: list[Any] = []  # the trainer's hooks measure the new bases, which takes memory too
    handles = [optimizer.register_refresh_hook(happened.append)]
    if isinstance(optimizer, FactoredAdamW):
        handles.append(optimizer.register_event_hook(happened.append))
    ledger = Ledger(granularity, "scratch")
    ledger.hold([*model.parameters(), *model.buffers()], "weights")
    ledger.hold(
        (
            value
            for entries in optimizer.state.values()
            for value in entries.values()
            if isinstance(value, torch.Tensor)
        ),
        "state",
    )
    numbers = [
        (entries, {name: v for name, v in entries.items() if not isinstance(v, torch.Tensor)})
        for entries in optimizer.state.values()
    ]
    steps: list[Step] = []
    parts = PartRecorder(ledger)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), ledger:
        warnings.simplefilter("ignore")
        try:
            later = (*((1,) * usual), *(_next_refresh(optimizer) if renewing else ()))
            for steps_done in (0, *later):
                if len(steps) == 2 and steps_done == 1 and not any(own.renews for own in steps):
                    break  # once more what the second was
                for entries in optimizer.state.values():
                    ledger.know(entries["step"], float(steps_done))
                before = ledger.now.total
                differentiate()
                if beside:
                    before = ledger.now.total
                else:
                    before += sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
                extra = max(0, ledger.now.total - before)
                happened.clear()
                parts.start()
                with watching_batches(parts):
                    optimizer.step()
                left = extra if happened else 0
                steps.append(Step(parts.finish(before + left), bool(happened), left))
                optimizer.zero_grad()
        finally:
            for param in model.parameters():
                param.grad = None
            for entries, former in numbers:
                entries.update(former)
            for handle in handles:
                handle.remove()
    return steps


def _next_refresh(optimizer: LowRankOptimizer) -> tuple[int, ...]:
    """Steps after which all matrices are due; empty where nothing ever is."""
    gaps = [group.get("update_proj_gap") for group in optimizer.param_groups]
    known = [gap for gap in gaps if isinstance(gap, int)]
    return (max(known),) if known else (1,) if isinstance(optimizer, FactoredAdamW) else ()


def empty_gradients(
    model: nn.Module, params: Sequence[nn.Parameter] | None, *, replace: bool
) -> None:
    """Gives trained parameters gradients without computing them.

    Args:
        model: whose.
        params: these alone, the others have none; None for all.
        replace: gradients were computed: only those that should not be there are removed.
    """
    wanted = {id(param) for param in (model.parameters() if params is None else params)}
    for param in model.parameters():
        if id(param) not in wanted:
            param.grad = None
        elif param.requires_grad and not replace:
            param.grad = torch.empty(param.shape, dtype=param.dtype, device=param.device)
