"""What processes decide together before a step: one reduction for each group of processes.

No process may skip a gradient that is not finite alone, and none may go on with other options than
the others: each says which of the gradients that it shares are finite in its part (4 bytes each),
and a checksum of its options (`equal_options`), and the smallest answers count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from .equal_options import EqualOptions, unequal
from .gradients import finite, may_read
from .options import Group
from .plan import Given, Plan
from .processes import Processes
from .sharding import local_part


def decide(
    plans: Sequence[Plan], givens: Sequence[Given], groups: Sequence[Group], options: EqualOptions
) -> dict[int, bool]:
    """Whether gradients of which processes have parts are finite on all; compares options.

    Args:
        plans: the optimizer's groups.
        givens: what of each takes a step.
        groups: the same groups, for messages.
        options: compares them.

    Returns:
        By parameter id. Not here are gradients that aren't checked, those that are whole on this
        process, and projected ones in float16, whose projections may overflow: these are decided
        by batch.

    Raises:
        ValueError: on all processes, if their options differ.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return {}
    due = options.count_step()
    options.compare_copies(plans, groups, due=due)
    decided: dict[int, bool] = {}
    for processes, shared in _shared(plans, givens).items():
        if not (shared or due):
            continue
        number = options.number(plans)
        sound = finite([tensor for _, tensor in shared], lambda position: None)
        device = shared[0][1].device if shared else _device(plans)
        low, high, *flags = processes.smallest([number, -number, *map(int, sound)], device)
        if low != -high:
            raise unequal(groups, processes.group)
        decided.update(
            (id(param), bool(flag)) for (param, _), flag in zip(shared, flags, strict=True)
        )
    return decided


def checked_together(dtype: torch.dtype, *, projected: bool) -> bool:
    """Whether a gradient's decision is made before the step, rather than by batch."""
    return not (projected and dtype == torch.float16)


def _shared(
    plans: Sequence[Plan], givens: Sequence[Given]
) -> dict[Processes, list[tuple[Tensor, Tensor]]]:
    """For each group of processes the parameters to decide on, and what is checked of each."""
    found: dict[Processes, list[tuple[Tensor, Tensor]]] = {}
    for plan, given in zip(plans, givens, strict=True):
        checked = plan.group["skip_nonfinite"] and may_read(plan.group)
        projected = plan.core.projection is not None
        for i in given.chosen(plan):
            param, processes = plan.params[i], plan.shards[i].rows.processes
            if processes.alone or plan.by_expert(i):
                continue
            shared = found.setdefault(processes, [])
            gradient = given.projected.get(i, param.grad)
            if not checked or gradient is None or not param.numel():
                continue
            if checked_together(param.dtype, projected=projected):
                shared.append((param, local_part(gradient)))
    return found


def _device(plans: Sequence[Plan]) -> torch.device:
    device: torch.device = next(local_part(p).device for plan in plans for p in plan.params)
    return device
