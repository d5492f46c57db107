"""Loading state without torch's cast policy, which would change its dtypes.

`Optimizer.load_state_dict` casts every tensor but `step` to the parameter's dtype: uint8 codes
become bf16 and fp32 bases lose bits. Here each tensor keeps the dtype it was saved with and only
moves to its parameter's device, after the whole file was checked against the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]


def saved_pairs(
    groups: list[Group], state_dict: Mapping[str, Any]
) -> Iterator[tuple[Any, Tensor, Group, str]]:
    """Yields (saved id, parameter, saved group, label) of each parameter, in order."""
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        names = group.get("param_names") or [
            f"parameter of shape {tuple(p.shape)}" for p in group["params"]
        ]
        for key, param, name in zip(saved["params"], group["params"], names, strict=True):
            yield key, param, saved, name


def check(
    groups: list[Group],
    state_dict: Mapping[str, Any],
    template: Callable[[Tensor, Group], dict[str, Any]],
) -> None:
    """Raises `ValueError` if the saved state doesn't fit, before anything is changed.

    Args:
        groups: the optimizer's groups.
        state_dict: what is to be loaded.
        template: makes the state that a (meta) parameter has under a saved group's options.
    """
    saved_groups = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"the saved state has parameter groups of {saved_sizes} parameters; "
            f"accepted are {sizes}, this optimizer's"
        )
    for key, param, saved_group, name in saved_pairs(groups, state_dict):
        expected = template(param.to("meta"), saved_group) if param.numel() else {}
        saved = state_dict["state"].get(key, {})
        missing, unknown = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected)
        if missing or unknown:
            raise ValueError(
                f"the saved state of {name} lacks {missing} and has unknown {unknown}; "
                f"accepted are exactly {sorted(expected)}"
            )
        for entry, value in expected.items():
            if isinstance(value, Tensor) and tuple(saved[entry].shape) != tuple(value.shape):
                raise ValueError(
                    f"the saved state of {name} has {entry} of shape {tuple(saved[entry].shape)}; "
                    f"accepted is {tuple(value.shape)}"
                )


def restore_dtypes(
    groups: list[Group], state: Mapping[Tensor, dict[str, Any]], state_dict: Mapping[str, Any]
) -> None:
    """Replaces loaded tensors by copies with their saved dtype, on the parameter's device."""
    capturable = {
        id(param): bool(group.get("capturable"))
        for group in groups
        for param in chain(group["params"])
    }
    for key, param, _, _ in saved_pairs(groups, state_dict):
        for entry, value in state_dict["state"].get(key, {}).items():
            if isinstance(value, Tensor):
                on_host = entry == "step" and not capturable[id(param)]
                device = torch.device("cpu") if on_host else param.device
                copy = torch.empty(value.shape, dtype=value.dtype, device=device)
                state[param][entry] = copy.copy_(value.detach())
