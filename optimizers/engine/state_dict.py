"""Loading state without torch's cast policy, which would change its dtypes.

`Optimizer.load_state_dict` casts every tensor but `step` to the parameter's dtype: uint8 codes
become bf16 and fp32 bases lose bits. Here each tensor keeps the dtype it was saved with and only
moves to its parameter's device, after the whole file was checked against the parameters.

A group whose options were changed since the last step has an additional key in the file,
`STATE_OPTIONS`: the changed options as they were when the state was made. Loading removes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lowrank.cuda.noise import mix, signed_seed

from ..projectors.random import SEED
from ..rules.precision import HALF
from .composition import Composition
from .experts import on_host
from .parameters import check_names, unique_names
from .plan import Snapshot
from .seeds import seed_names
from .sharding import is_dtensor
from .state import count_difference, difference, template

Group = dict[str, Any]

STATE_OPTIONS = "options_of_state"


def saved_pairs(
    groups: list[Group], state_dict: Mapping[str, Any]
) -> Iterator[tuple[Any, Tensor, Group]]:
    """Yields (saved id, parameter, saved group) of each parameter, in order."""
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        for key, param in zip(saved["params"], group["params"], strict=True):
            yield key, param, saved


def check(
    groups: list[Group],
    state_dict: Mapping[str, Any],
    compose: Callable[[Group], Composition],
) -> None:
    """Raises `ValueError` if the saved state doesn't fit, before anything is changed.

    Args:
        groups: the optimizer's groups.
        state_dict: the state to load.
        compose: returns a saved group's composition, or raises `ValueError`.
    """
    saved_groups = checked_groups(groups, state_dict)
    compositions = [compose(options_of_state(group)) for group in saved_groups]
    for group in saved_groups:
        if STATE_OPTIONS in group:
            compose({key: value for key, value in group.items() if key != STATE_OPTIONS})
    state, called = state_dict["state"], iter(unique_names(groups))
    known = {key for saved in saved_groups for key in saved["params"]}
    unknown = [key for key in state if key not in known]
    if unknown:
        raise ValueError(
            f"the saved state has entries for {unknown[:3]}, which are in no group: accepted are "
            "those of its groups' params"
        )
    for group, saved, composition in zip(groups, saved_groups, compositions, strict=True):
        for key, param in zip(saved["params"], group["params"], strict=True):
            name = next(called)
            expected = template(param, composition) if param.numel() else {}
            found = difference(state.get(key, {}), expected)
            if found is None and expected:
                found = count_difference(state[key])
            if found is not None:
                raise ValueError(f"the saved state of {name} {found}")


def upgrade(
    groups: list[Group],
    state_dict: dict[str, Any],
    compose: Callable[[Group], Composition],
) -> dict[str, Any]:
    """Casts the moments of a state that version 0.1.0 saved to their present precision.

    In that version, whose groups have no `moments_dtype`, moments had the weights' precision;
    half-precision ones are cast to fp32. Under `capturable` it kept no numbers that random bases
    are drawn from: they get new ones. Arguments are as in `check`, which reports mismatches.
    """
    old = [g for g in state_dict.get("param_groups", ()) if "moments_dtype" not in g]
    if not old:
        return state_dict
    state = dict(state_dict["state"])
    saved_groups = checked_groups(groups, state_dict)
    for group, saved, called in zip(groups, saved_groups, seed_names(groups), strict=True):
        if "moments_dtype" in saved:
            continue
        composition = compose(options_of_state(saved))
        for key, param, name in zip(saved["params"], group["params"], called, strict=True):
            if not isinstance(state.get(key), Mapping):
                continue
            if param.dtype in HALF:
                state[key] = _in_precision(state[key], template(param, composition))
            if saved.get("capturable") and param.numel():
                state[key] = _with_seeds(state[key], template(param, composition), name)
    return {**state_dict, "state": state}


def _with_seeds(
    state: Mapping[str, Any], expected: Mapping[str, Any], name: str
) -> Mapping[str, Any]:
    lacking = [key for key in expected if key.endswith(SEED) and key not in state]
    drawn = {key: torch.tensor(signed_seed(mix(0, name, key))) for key in lacking}
    return {**state, **drawn}


def _in_precision(state: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(state)
    for key in made.keys() & expected.keys():
        value = made[key]
        moment = key.removeprefix("basis_").startswith(("exp_avg", "momentum_buffer"))
        if moment and isinstance(value, Tensor) and value.dtype in HALF:
            made[key] = value.to(expected[key].dtype)
    return made


def previous_options(group: Group, snapshot: Snapshot) -> dict[str, tuple[Any, ...]]:
    """Values of the changed options when a group's state was made."""
    options = snapshot.options
    return {
        key: (options[key],) if key in options else () for key in sorted(snapshot.changed(group))
    }


def options_of_state(saved: Group) -> Group:
    """A saved group with the options that its state was made with."""
    previous: Mapping[str, Any] = saved.get(STATE_OPTIONS) or {}
    made = {key: value for key, value in saved.items() if key not in (STATE_OPTIONS, *previous)}
    # An empty tuple stands for an option that the group did not have.
    return made | {key: value[0] for key, value in previous.items() if value}


def checked_groups(groups: Sequence[Group], state_dict: Mapping[str, Any]) -> list[Group]:
    """The saved groups.

    Raises:
        ValueError: they are not as many and as large as the groups, or have the same parameters in
            another order.
    """
    for key, kind in (("state", Mapping), ("param_groups", list)):
        if not isinstance(state_dict.get(key), kind):
            raise ValueError(f"the saved state has no {key}: accepted is what state_dict() gave")
    saved_groups: list[Group] = state_dict["param_groups"]
    for saved in saved_groups:
        if not isinstance(saved, Mapping) or not isinstance(saved.get("params"), list | tuple):
            raise ValueError("a saved group has no params: accepted is what state_dict() gave")
        check_names(saved)
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        alike = sum(sizes) == sum(saved_sizes)
        raise ValueError(
            f"the saved state has parameter groups of {saved_sizes} parameters; "
            f"accepted are {sizes}, this optimizer's"
            + ("; build sorts by patterns, embedding_lr, head_lr and plain_rule" if alike else "")
        )
    own, before = unique_names(groups), unique_names(saved_groups)
    # Other names alone may be those of a wrapped or compiled model.
    if own != before and sorted(own) == sorted(before):
        number = next(i for i, name in enumerate(own) if name != before[i])
        raise ValueError(
            f"the saved state has {before[number]} where this optimizer has {own[number]}, and "
            "states go by position: accepted are the same parameters in the same order"
        )
    return saved_groups


def restore_dtypes(
    groups: list[Group], state: Mapping[Tensor, dict[str, Any]], state_dict: Mapping[str, Any]
) -> None:
    """Replaces loaded tensors by copies with their saved dtype, on the parameter's device."""
    capturable = {
        id(param): bool(group.get("capturable"))
        for group in groups
        for param in chain(group["params"])
    }
    for key, param, _ in saved_pairs(groups, state_dict):
        for entry, value in state_dict["state"].get(key, {}).items():
            if isinstance(value, Tensor):
                host = on_host(entry, value, capturable=capturable[id(param)])
                device = torch.device("cpu") if host else param.device
                if is_dtensor(value):
                    state[param][entry] = value.detach().to(device, copy=True)
                    continue
                copy = torch.empty(value.shape, dtype=value.dtype, device=device)
                state[param][entry] = copy.copy_(value.detach())
