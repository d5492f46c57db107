"""Checks of a parameter's state against the state that its composition would make."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from . import experts
from .composition import Composition
from .sharding import local_part

State = Mapping[str, Any]

#: Smallest value of integer entries, if it is not 0.
_LEAST = {"refreshed_at": -1, "gap": 1}
_LARGEST = 1 << 63


def template(param: Tensor, composition: Composition) -> dict[str, Any]:
    """A parameter's expected state, on the meta device."""
    made: dict[str, Any] = composition.init_state(param.detach().to("meta"), capturable=False)
    return made


def difference(state: Any, expected: State) -> str | None:
    """How a state differs from a template in entries, shapes, dtypes or integers, or None."""
    if not isinstance(state, Mapping):
        return f"is a {type(state).__name__}; accepted is a dict with {sorted(expected)}"
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected)
    if missing or unknown:
        return f"lacks {missing} and has unknown {unknown}; accepted are exactly {sorted(expected)}"
    for entry, wanted in expected.items():
        check = _tensor_difference if isinstance(wanted, Tensor) else _integer_difference
        found = check(entry, state[entry], wanted)
        if found is not None:
            return found
    return None


def _tensor_difference(entry: str, value: Any, wanted: Tensor) -> str | None:
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        return f"has {entry} as a {kind}; accepted is a tensor of shape {tuple(wanted.shape)}"
    if tuple(value.shape) != tuple(wanted.shape):
        return f"has {entry} of shape {tuple(value.shape)}; accepted is {tuple(wanted.shape)}"
    if value.dtype != wanted.dtype:
        return f"has {entry} of dtype {value.dtype}; accepted is {wanted.dtype}"
    placements = [
        str(getattr(tensor, "placements", "a plain tensor")) for tensor in (value, wanted)
    ]
    if placements[0] != placements[1]:
        return f"has {entry} placed as {placements[0]}; accepted is {placements[1]}"
    return None


def _integer_difference(entry: str, value: Any, wanted: int) -> str | None:
    if type(value) is not int:
        return f"has {entry}={value!r}; accepted is an integer"
    if experts.is_shared(entry):
        return None if value == wanted else f"has {entry}={value}; accepted is {wanted}"
    low = _LEAST.get(entry, 0)
    if not low <= value < _LARGEST:
        return f"has {entry}={value}; accepted is an integer of at least {low}"
    return None


def count_difference(state: State) -> str | None:
    """What is wrong with the step count of a loaded state, or None; reads it back."""
    if state["step"].is_meta:
        return None
    if state["step"].dim():
        found = (_expert_difference(own) for own in _expert_counts(state))
        return next((said for said in found if said is not None), None)
    count = float(state["step"])
    if not (math.isfinite(count) and count >= 0 and count == int(count)):
        return f"has step={count}; accepted is a whole number of at least 0"
    refreshed = state.get("refreshed_at", -1)
    if refreshed > count:
        return f"has refreshed_at={refreshed} after {count:.0f} steps; accepted is at most that"
    return None


def _expert_difference(own: State) -> str | None:
    for entry in own.keys() - {"step"}:
        found = _integer_difference(entry, own[entry], own[entry])
        if found is not None:
            return found
    return count_difference(own)


def _expert_counts(state: State) -> Iterator[State]:
    """Step count and integers of each expert that is here."""
    counts = {
        key: local_part(value)
        for key, value in state.items()
        if key == "step" or experts.is_counter(key, value)
    }
    for numbers in zip(*(value.tolist() for value in counts.values()), strict=True):
        own = dict(zip(counts, numbers, strict=True))
        yield {**own, "step": torch.tensor(own["step"])}


def untouched(state: State) -> bool:
    """Whether a state has taken no step, so that it may be replaced."""
    step = state.get("step") if isinstance(state, Mapping) else None
    if not isinstance(step, Tensor) or step.dim() > 1:
        return False
    return step.is_meta or not bool(local_part(step).any())


def misplaced(state: State, param: Tensor, *, capturable: bool) -> bool:
    """Whether any tensor of a state is on the wrong device."""
    return any(
        isinstance(value, Tensor) and value.device != _device(entry, value, param, capturable)
        for entry, value in state.items()
    )


def place(state: dict[str, Any], param: Tensor, *, capturable: bool) -> None:
    """In place: moves tensors of a state to the right devices."""
    for entry, value in state.items():
        if isinstance(value, Tensor):
            state[entry] = value.to(_device(entry, value, param, capturable))


def _device(entry: str, value: Tensor, param: Tensor, capturable: bool) -> torch.device:
    """The parameter's device; the host for the step count unless `capturable`."""
    host = experts.on_host(entry, value, capturable=capturable) and not param.is_meta
    return torch.device("cpu") if host else param.device
