"""One step of a group without projection."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..rules import UpdateRule
from ..weights import QuantizedWeight, apply_rule
from .batching import read_steps, update_batches
from .devices import on_gpu
from .experts import experts_of
from .gradients import Checks, descent_gradient
from .plan import EVERYTHING, Given, Plan
from .processes import ALONE, Processes
from .sharding import part_of


def step_plain(plan: Plan, checks: Checks, given: Given = EVERYTHING) -> None:
    """Takes the step of a group without projection.

    Args:
        plan: the group.
        checks: excludes gradients that are not finite.
        given: which parameters take it.
    """
    group = plan.group
    found = [part for i in given.chosen(plan) for part in _plain_parts(plan, i)]
    gated = checks.on and _may_gate(found, plan)
    flagged = checks.on and not checks.decided and not gated and _knows_flags(found, plan)
    kept = (
        range(len(found))
        if gated or flagged
        else checks.usable(
            [part.grad for part in found],
            [plan.params[part.position] for part in found],
            [part.name for part in found],
            [part.processes for part in found],
        )
    )
    chosen = [found[position] for position in kept]
    params, states = [part.weight for part in chosen], [part.state for part in chosen]
    # Captured steps are not grouped by step count, which would have to be read back.
    steps = [0] * len(states) if group["capturable"] else read_steps(states)
    sizes = _plain_sizes(chosen, plan.composition.rule)
    spread = [part.processes for part in chosen]
    for batch in update_batches(params, states, steps, sizes, group, spread):
        own = [states[position] for position in batch]
        torch._foreach_add_([state["step"] for state in own], 1)
        if gated or flagged:
            apply = _apply_gated if gated else _apply_flagged
            apply(plan.composition.rule, [chosen[position] for position in batch], plan, checks)
            continue
        apply_rule(
            plan.composition.rule,
            [chosen[position].grad for position in batch],
            own,
            [params[position] for position in batch],
            group.get("seed", 0),
            [chosen[position].seed_name for position in batch],
            stochastic=group.get("stochastic_rounding", False),
        )


@dataclass
class _PlainPart:
    """What is here of a parameter that isn't projected, or of one of its experts."""

    position: int
    weight: Tensor
    grad: Tensor
    state: dict[str, Any]
    name: str | None
    seed_name: str
    processes: Processes
    entries: int


def _may_gate(parts: Sequence[_PlainPart], plan: Plan) -> bool:
    """Whether gradients that aren't finite are left out on the device, so that nothing is read."""
    return (
        plan.composition.rule.GATES
        and not plan.group.get("stochastic_rounding", False)
        and all(
            on_gpu(part.weight)
            and part.processes.alone
            and part_of(part.state) is None
            and not isinstance(part.weight, QuantizedWeight)
            for part in parts
        )
    )


def _apply_gated(rule: UpdateRule, parts: Sequence[_PlainPart], plan: Plan, checks: Checks) -> None:
    owners = [plan.params[part.position] for part in parts]

    def gate(grads_b: Tensor, positions: Sequence[int]) -> Tensor:
        named = [parts[i].name for i in positions]
        return checks.skipped.gate(grads_b, [owners[i] for i in positions], named)

    rule.apply_gated(
        [part.grad for part in parts],
        [part.state for part in parts],
        [part.weight for part in parts],
        gate,
    )


def _knows_flags(parts: Sequence[_PlainPart], plan: Plan) -> bool:
    """Whether flags on the device can leave out gradients, so that none is read."""
    stochastic = plan.group.get("stochastic_rounding", False)
    if not parts or stochastic or not all(part.processes.alone for part in parts):
        return False
    if any(isinstance(part.weight, QuantizedWeight) for part in parts):
        return False
    kinds = defaultdict(list)
    for part in parts:
        kinds[part.weight.dtype, part.weight.device].append(part)
    rule = plan.composition.rule
    return all(
        rule.knows_flags(
            [part.grad for part in own],
            [part.state for part in own],
            [part.weight for part in own],
        )
        for own in kinds.values()
    )


def _apply_flagged(
    rule: UpdateRule, parts: Sequence[_PlainPart], plan: Plan, checks: Checks
) -> None:
    grads = [part.grad for part in parts]
    owners = [plan.params[part.position] for part in parts]
    good_b = checks.skipped.flags(grads, owners, [part.name for part in parts])
    rule.apply_flagged(
        grads, [part.state for part in parts], [part.weight for part in parts], good_b
    )


def _plain_sizes(chosen: Sequence[_PlainPart], rule: UpdateRule) -> list[int]:
    """Bytes that each of several parameters takes of the scratch of its batch."""
    bounded: dict[torch.dtype, bool] = {}
    sizes = []
    for part in chosen:
        weight = part.weight
        if on_gpu(weight) and weight.dtype not in bounded:
            bounded[weight.dtype] = rule.bounds_scratch(weight, part.state)
        free = on_gpu(weight) and bounded[weight.dtype]
        sizes.append(0 if free else part.entries * max(4, weight.element_size()))
    return sizes


def _plain_parts(plan: Plan, position: int) -> list[_PlainPart]:
    param, shard = plan.params[position], plan.shards[position]
    grad = descent_gradient(param, plan.group)
    if grad is None:
        return []
    if plan.by_expert(position):
        return [
            _PlainPart(
                *(position, own.weight, own.grad, own.state, own.name, own.seed_name),
                *(ALONE, own.weight.numel()),
            )
            for own in experts_of(plan, position, grad)
        ]
    return [
        _PlainPart(
            *(position, shard.local(param.detach()), shard.as_rows(grad)),
            plan.local_state(position),
            *(plan.names[position], plan.seed_names[position]),
            *(shard.rows.processes, param.numel()),
        )
    ]
