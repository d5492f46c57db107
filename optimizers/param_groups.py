"""Sorting a model's parameters into groups: projected, plain with decay, plain without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

Group = dict[str, Any]

#: A linear layer is projected when one of these occurs in its name (GaLore's targets).
PATTERNS = ("attn", "attention", "mlp")


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Every trainable parameter once, under its first name, with the module that owns it."""
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if param.requires_grad and param not in seen:
                seen.add(param)
                yield (f"{prefix}.{name}" if prefix else name), param, module


def _tied(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that more than one module owns."""
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners[param] = owners.get(param, 0) + 1
    return {param for param, count in owners.items() if count > 1}


def param_groups(
    model: nn.Module,
    *,
    patterns: Sequence[str] = PATTERNS,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: str = "std",
    weight_decay: float | None = None,
    **method_options: Any,
) -> list[Group]:
    """Makes parameter groups for a projecting optimizer.

    The weight of each `nn.Linear` whose name contains one of `patterns` is projected; everything
    else is plain, split into matrices (decayed) and vectors such as biases and norms (not
    decayed). Tied weights appear once and are never projected. Parameter names are recorded.

    Args:
        model: the model, before any wrapping that flattens parameters.
        patterns: parts of module names to project.
        rank: r of the projection, clamped to each matrix.
        update_proj_gap: steps between refreshes.
        scale: factor on the back-projected update.
        proj_type: which axis is projected.
        weight_decay: of the first two groups; the optimizer's own when None.
        **method_options: further keys of the projected group, the method's own.

    Returns:
        Up to three groups, projected first; empty ones are left out.

    Raises:
        ValueError: no linear layer matches the patterns.
    """
    options = {
        "rank": rank,
        "update_proj_gap": update_proj_gap,
        "scale": scale,
        "proj_type": proj_type,
        **method_options,
    }
    projected, decayed, undecayed = split(model, patterns)
    if not projected:
        raise ValueError(
            f"no nn.Linear of {type(model).__name__} has one of {tuple(patterns)} in its name; "
            "accepted are patterns that match one"
        )
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups = [
        _group(projected, {**decay, **options}),
        _group(decayed, decay),
        _group(undecayed, {"weight_decay": 0.0}),
    ]
    return [group for group in groups if group["params"]]


def plain_groups(model: nn.Module, weight_decay: float | None = None) -> list[Group]:
    """Groups without projection: matrices (decayed), then vectors (not decayed)."""
    projected, decayed, undecayed = split(model, PATTERNS)
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups = [_group(projected + decayed, decay), _group(undecayed, {"weight_decay": 0.0})]
    return [group for group in groups if group["params"]]


def split(model: nn.Module, patterns: Sequence[str]) -> tuple[list[tuple[str, nn.Parameter]], ...]:
    """Named parameters as (to project, other matrices, vectors)."""
    tied = _tied(model)
    lists: tuple[list[tuple[str, nn.Parameter]], ...] = ([], [], [])
    for name, param, module in _parameters(model):
        target = (
            isinstance(module, nn.Linear)
            and param is module.weight
            and param not in tied
            and any(pattern in name for pattern in patterns)
        )
        lists[0 if target else 1 if param.dim() > 1 else 2].append((name, param))
    return lists


def _group(named: Sequence[tuple[str, torch.Tensor]], options: Group) -> Group:
    return {
        "params": [param for _, param in named],
        "param_names": [name for name, _ in named],
        **options,
    }
