"""One step of a group without projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank.cuda.noise import Seed

from ..rules import UpdateRule
from ..weights import apply_rule, rounding_seed, rounding_seeds, rounds
from .batching import read_steps, update_batches
from .devices import on_gpu
from .experts import experts_of
from .gradients import Checks, descent_gradient
from .plan import EVERYTHING, Given, Plan
from .processes import ALONE, Processes


def step_plain(plan: Plan, checks: Checks, given: Given = EVERYTHING) -> None:
    """Takes the step of a group without projection.

    Args:
        plan: the group.
        checks: excludes gradients that are not finite.
        given: which parameters take it.
    """
    group = plan.group
    found = [part for i in given.chosen(plan) for part in _plain_parts(plan, i)]
    gated = checks.on and all(on_gpu(part.weight) and part.processes.alone for part in found)
    kept = (
        range(len(found))
        if gated
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
        noise = _noise([chosen[position] for position in batch], plan)
        torch._foreach_add_([state["step"] for state in own], 1)
        apply_rule(
            plan.composition.rule,
            [chosen[position].grad for position in batch],
            own,
            [params[position] for position in batch],
            noise,
            _flags([chosen[position] for position in batch], plan, checks) if gated else None,
            stochastic=group.get("stochastic_rounding", False),
        )


def _flags(parts: Sequence[_PlainPart], plan: Plan, checks: Checks) -> Tensor:
    """Which gradients are finite, on their device: nothing is read."""
    owners = [plan.params[part.position] for part in parts]
    return checks.skipped.flags([p.grad for p in parts], owners, [p.name for p in parts])


def _noise(parts: Sequence[_PlainPart], plan: Plan) -> list[tuple[Seed, Seed]]:
    """Of each weight that is rounded stochastically in this step, seed and turn."""
    group = plan.group
    seed, stochastic = group.get("seed", 0), group.get("stochastic_rounding", False)
    found = [i for i, part in enumerate(parts) if rounds(part.weight, stochastic=stochastic)]
    noise: list[tuple[Seed, Seed]] = [(0, 0)] * len(parts)
    if found and group["capturable"]:
        drawn = rounding_seeds(
            [parts[i].weight for i in found],
            seed,
            [parts[i].seed_name for i in found],
            [parts[i].state["step"] for i in found],
        )
        for i, own in zip(found, drawn, strict=True):
            noise[i] = own
        return noise
    for i in found:
        part = parts[i]
        noise[i] = rounding_seed(part.weight, seed, part.seed_name, int(part.state["step"]))
    return noise


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
