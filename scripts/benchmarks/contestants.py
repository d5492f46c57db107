"""What is timed: each contestant takes one step on its own copy of the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.optimizers import GaLoreAdamW, LowRankOptimizer, RefreshEvent

from .workload import Workload, give

GALORE_TORCH = "galore_torch"
FIRA = "fira"
#: Small enough that the weights stay what they are over any number of steps.
_LEARNING_RATE = 1e-6
_NEVER = 1_000_000_000


@dataclass(frozen=True)
class Contestant:
    """One thing to time.

    Attributes:
        name: key in the results.
        label: row in the table.
        parameters: its own weights, which take the gradients.
        step: one optimizer step.
        energy: mean share of the gradients' energy that the bases capture right after a step that
            refreshed them; None where there are none. It takes a step of its own, not timed.
    """

    name: str
    label: str
    parameters: list[nn.Parameter]
    step: Callable[[], Any]
    energy: Callable[[], float] | None = None

    def take(self, gradients: Sequence[Tensor]) -> None:
        """Uses these gradients from the next step on."""
        give(self.parameters, gradients)


def fused_adamw(work: Workload) -> Contestant:
    """torch's fused AdamW, with full-size moments."""
    parameters = work.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, fused=True)
    return Contestant("adamw_fused", "torch AdamW, fused", parameters, optimizer.step)


def ours(
    work: Workload,
    name: str,
    label: str,
    *,
    optimizer_class: type[LowRankOptimizer] = GaLoreAdamW,
    gap: int = _NEVER,
    **options: Any,
) -> Contestant:
    """One of our optimizers, GaLoreAdamW unless another is given; `gap` steps between refreshes."""
    parameters = work.parameters()
    group = {"params": parameters, "rank": work.rank, "update_proj_gap": gap, "scale": 0.25}
    optimizer = optimizer_class([group], lr=_LEARNING_RATE, **options)

    def energy() -> float:
        events: list[RefreshEvent] = []
        handle = optimizer.register_refresh_hook(events.append)
        optimizer.step()
        handle.remove()
        if len(events) != len(parameters):
            raise RuntimeError(f"{len(events)} of {len(parameters)} matrices were refreshed")
        return sum(event.captured_energy for event in events) / len(events)

    return Contestant(name, label, parameters, optimizer.step, energy)


def galore_torch(work: Workload, *, gap: int = _NEVER) -> Contestant | None:
    """The official GaLoreAdamW (full SVD), or None where the package is missing."""
    # Importing it imports bitsandbytes, which logs what it lacks on a CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from galore_torch import GaLoreAdamW as Official
    except ModuleNotFoundError:
        return None
    parameters = work.parameters()
    group = {"params": parameters, "rank": work.rank, "update_proj_gap": gap, "scale": 0.25}
    optimizer = Official(
        [group | {"proj_type": "std"}], lr=_LEARNING_RATE, no_deprecation_warning=True
    )

    def energy() -> float:
        optimizer.step()
        shares = []
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None
            projector = optimizer.state[parameter]["projector"]
            # Step 1 of a gap of 2 or more is never a refresh: this only projects.
            low = projector.project(gradient, 1)
            shares.append(float(low.square().sum() / gradient.square().sum()))
        return sum(shares) / len(shares)

    return Contestant(GALORE_TORCH, "galore-torch", parameters, optimizer.step, energy)


def fira_package(work: Workload) -> Contestant | None:
    """The official FiraAdamW, or None where the package is missing."""
    try:
        from fira import FiraAdamW as Official
    except ModuleNotFoundError:
        return None
    parameters = work.parameters()
    group = {"params": parameters, "rank": work.rank, "update_proj_gap": _NEVER, "alpha": 0.25}
    optimizer = Official(
        [group | {"proj_type": "std"}], lr=_LEARNING_RATE, no_deprecation_warning=True
    )
    return Contestant(FIRA, "fira", parameters, optimizer.step)


def gemm_floor(work: Workload) -> Contestant:
    """Only the two GEMMs per matrix that no GaLore step can leave out, with nothing allocated."""
    parameters = work.parameters()
    generator = torch.Generator().manual_seed(work.seed)
    plan = []
    for parameter in parameters:
        m, n = parameter.shape
        tall = m >= n
        basis_dr = torch.linalg.qr(torch.randn(min(m, n), work.rank, generator=generator)).Q
        low = torch.empty((m, work.rank) if tall else (work.rank, n))
        plan.append((parameter, basis_dr, low, tall))

    @torch.no_grad()
    def step() -> None:
        for weight_mn, basis_dr, low, tall in plan:
            grad_mn = weight_mn.grad
            assert grad_mn is not None
            if tall:
                torch.mm(grad_mn, basis_dr, out=low)
                weight_mn.addmm_(low, basis_dr.mT, alpha=-_LEARNING_RATE)
            else:
                torch.mm(basis_dr.mT, grad_mn, out=low)
                weight_mn.addmm_(basis_dr, low, alpha=-_LEARNING_RATE)

    return Contestant("gemm_floor", "GEMM floor", parameters, step)
