"""Experts that a model stores as one parameter: E matrices in a tensor of E x m x n.

Where a group is projected, or its rule updates matrices only, each of the E is a matrix of its own:
it trains as a parameter of m x n would. Weights, gradients and state are views along the first
axis; nothing is copied. In `optimizer.state` every tensor of one matrix's state has a leading axis
of E, the step count too (an update of one expert may be skipped). What differs between experts
among the integers (`refreshed_at`: an expert without tokens is refitted once it has some) is an
int64 tensor of E entries, on the host beside a plain parameter; others ("side") are one integer.

Of a DTensor that is spread along the first axis each process has whole experts: its state is spread
alike, and a step communicates nothing. Seeds are the experts' own, by their place among all E.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .geometry import RowRange
from .processes import chunk_range
from .sharding import Shard, is_dtensor, local_part, shard_of

if TYPE_CHECKING:
    from .composition import Composition
    from .plan import Plan

State = dict[str, Any]

#: Dimensions of a parameter that holds experts.
DIMENSIONS = 3
#: Bytes of an integer that each expert has for itself.
COUNTER_BYTES = 8
#: Smallest m and n: kernels of one-dimensional convolutions, also E x m x n, are shorter.
SMALLEST_SIDE = 8


def matrix_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one matrix of a parameter: without the axis of experts, if it has one."""
    shape = tuple(shape)
    return shape[1:] if len(shape) == DIMENSIONS else shape


def expert_name(name: str, expert: int) -> str:
    """The name of one expert's matrix, in messages and seeds."""
    return f"{name}.{expert}"


def is_shared(entry: str) -> bool:
    """Whether an integer of a state is the same for matrices of one shape."""
    return entry == "side" or entry.endswith(("_rows", "_columns"))


def is_counter(entry: str, value: Any) -> bool:
    """Whether an entry of a state holds an integer for each expert."""
    return (
        isinstance(value, Tensor)
        and value.dtype == torch.int64
        and value.dim() == 1
        and not entry.endswith("_seed")
    )


class ExpertState(dict[str, Any]):
    """One expert's state during a step: views of tensors, and integers that are written through."""

    def __init__(self, entries: State, expert: int, counters: Mapping[str, Tensor]) -> None:
        """Takes the entries, and the tensors that hold the integers, at place `expert`."""
        super().__init__(entries)
        self._expert, self._counters = expert, counters

    def __setitem__(self, key: str, value: Any) -> None:
        """Sets an integer here and in the optimizer's state; tensors are written in place.

        Raises:
            TypeError: the entry isn't an expert's own integer.
        """
        if key not in self._counters:
            raise TypeError(f"state[{key!r}] of an expert is set: accepted is a change in place")
        super().__setitem__(key, value)
        self._counters[key][self._expert] = value


def expert_states(state: State, steps: Tensor | None = None) -> list[ExpertState]:
    """The states of the experts that are here.

    Args:
        state: a parameter's, in `optimizer.state`.
        steps: step counts to use instead of those in it, see `Plan.host_steps`.
    """
    local = {key: local_part(value) for key, value in state.items()}
    if steps is not None:
        local["step"] = steps
    count = len(local["step"])
    counters = {key: value for key, value in local.items() if is_counter(key, value)}
    columns: dict[str, Sequence[Any]] = {}
    for key, value in local.items():
        if key in counters:
            columns[key] = value.tolist()
        else:
            columns[key] = value.unbind(0) if isinstance(value, Tensor) else [value] * count
    return [
        ExpertState({key: column[i] for key, column in columns.items()}, i, counters)
        for i in range(count)
    ]


def init_state(composition: Composition, param: Tensor, *, capturable: bool) -> State:
    """A new parameter's state: that of one matrix, E times.

    Args:
        composition: of the parameter's group.
        param: E x m x n.
        capturable: whether step counts lie on the parameter's device.
    """
    shard, local = shard_of(param), local_part(param.detach())
    like = torch.empty(matrix_shape(local.shape), dtype=local.dtype, device=local.device)
    one = composition.init_state(like, capturable=capturable)
    made: State = {}
    for key, value in one.items():
        if isinstance(value, Tensor):
            stacked = value.expand(len(local), *value.shape).clone()
        elif is_shared(key):
            made[key] = value
            continue
        else:
            device = local.device if local.is_meta else torch.device("cpu")
            stacked = torch.full((len(local),), value, dtype=torch.int64, device=device)
        made[key] = _distributed(stacked, shard, local.device)
    return made


def _distributed(local: Tensor, shard: Shard, device: torch.device) -> Tensor:
    """A state entry of a DTensor's experts, on the mesh's device; of a plain tensor itself."""
    if shard.plain:
        return local
    return shard.distribute(local.to(device), 0, (shard.shape[0], *local.shape[1:]))


def state_bytes(
    composition: Composition, shape: Sequence[int], itemsize: int, world: int = 1
) -> int:
    """Bytes of a parameter's state by formula, on the first of `world` processes."""
    rows, columns = matrix_shape(shape)
    like = torch.empty(rows, columns, device="meta")
    one = composition.init_state(like, capturable=False)
    own = [key for key, value in one.items() if isinstance(value, int) and not is_shared(key)]
    each = composition.state_bytes((rows, columns), itemsize) + COUNTER_BYTES * len(own)
    return len(chunk_range(shape[0], world, 0)) * each


def on_host(entry: str, value: Tensor, *, capturable: bool) -> bool:
    """Whether an entry of a state lies on the host: step counts and experts' integers."""
    if is_dtensor(value):
        return False
    return (entry == "step" and not capturable) or is_counter(entry, value)


def copied_to_host(steps: Tensor, *, capturable: bool) -> bool:
    """Whether step counts are copied to the host for a step: a DTensor's lie on its device."""
    return steps.device.type not in ("cpu", "meta") and not capturable


def experts_here(param: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The place among all E, and the weight, of each expert that is here."""
    start = shard_of(param).rows.start
    return enumerate(local_part(param.detach()).unbind(0), start)


@dataclass
class Expert:
    """One expert during a step.

    Attributes:
        expert: its place among all E.
        weight: m x n.
        grad: its descent gradient.
        state: its state.
        rows: all rows.
        name: its name in messages, if the parameter has one.
        seed_name: the name that seeds its random numbers.
    """

    expert: int
    weight: Tensor
    grad: Tensor
    state: State
    rows: RowRange
    name: str | None
    seed_name: str


def experts_of(plan: Plan, position: int, grad: Tensor) -> list[Expert]:
    """The experts of a parameter that are here; `grad` is this process's part of its gradient."""
    name, seed_name = plan.names[position], plan.seed_names[position]
    parts = zip(
        experts_here(plan.params[position]),
        grad.unbind(0),
        expert_states(plan.states[position], plan.host_steps(position)),
        strict=True,
    )
    return [
        Expert(
            *(place, weight_mn, grad_mn, state, RowRange.whole(len(weight_mn))),
            None if name is None else expert_name(name, place),
            expert_name(seed_name, place),
        )
        for (place, weight_mn), grad_mn, state in parts
    ]


def by_place(param: Tensor, entry: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The place among all E, and the view of a state's entry, of each expert that is here."""
    return enumerate(local_part(entry).unbind(0), shard_of(param).rows.start)
