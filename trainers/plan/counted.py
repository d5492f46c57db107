"""What an optimizer's steps on a whole model ask of a GPU, from its own code on fake tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank.optimizers import FactoredAdamW, LowRankOptimizer, build
from lowrank.optimizers.engine.devices import assuming_memory

from .driverless import driverless
from .fakes import faking
from .launches import LaunchCounter, Launches, settle
from .ledger import Ledger
from .network import place


@dataclass(frozen=True)
class Steps:
    """What steps ask of a GPU.

    Attributes:
        usual: of one between refreshes.
        refreshing: of one that refits all bases; None where all steps are the same.
        gap: steps from one refresh to the next; None as well.
    """

    usual: Launches
    refreshing: Launches | None
    gap: int | None


def count_steps(
    method: str,
    model: nn.Module,
    *,
    memory: int | None = None,
    options: Mapping[str, Any] | None = None,
    refreshing: bool = True,
) -> Steps:
    """Counts steps of a method on a model of meta tensors, which becomes one of fakes of a GPU.

    Args:
        method: a name that `build` accepts.
        model: on "meta"; it is of no use afterwards.
        memory: bytes of the GPU, by which scratch is bounded; None for one of 16 GiB or less.
        options: of `build`.
        refreshing: count a step with a refresh, too.

    Raises:
        ValueError: as `build`, or the method replaces layers, which need real backward passes.
    """
    device = torch.device("cuda")
    with faking(FakeTensorMode()), assuming_memory(memory or 0), Ledger() as ledger:
        place(model, device)
        with driverless(device), torch.random.fork_rng(devices=[]):
            optimizer = build(method, model, **(options or {}))
            if isinstance(optimizer, FactoredAdamW):
                raise ValueError(
                    f"optimizer={method!r} replaces layers, whose steps need what real backward "
                    "passes hand over: times are modelled of methods that don't"
                )
            settle(optimizer, ledger)
            _differentiate(optimizer)
            optimizer.step()  # makes what all later steps use
            settle(optimizer, ledger)
            usual = _counted(optimizer)
            gaps = [group.get("update_proj_gap") for group in optimizer.param_groups]
            gap = max((own for own in gaps if isinstance(own, int)), default=None)
            if gap is None or not refreshing:
                return Steps(usual, None, None)
            settle(optimizer, ledger, refreshing=True)
            found = _counted(optimizer)
    return Steps(usual, found, gap) if found.work != usual.work else Steps(usual, None, None)


def _counted(optimizer: LowRankOptimizer) -> Launches:
    """What the next step asks of a GPU."""
    with LaunchCounter((0, 0), 0) as counter:  # no matrix is told apart
        optimizer.step()
    found: Launches = counter.found
    return found


def _differentiate(optimizer: LowRankOptimizer) -> None:
    """Gives all parameters gradients."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.empty(param.shape, dtype=param.dtype, device=param.device)
