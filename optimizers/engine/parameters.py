"""Which parameters a group may hold, and their names in messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .composition import Composition
from .experts import DIMENSIONS, SMALLEST_SIDE, matrix_shape
from .options import Group
from .sharding import is_dtensor, local_part, shard_of

_ACCEPTED = (
    "accepted are plain tensors, as under DistributedDataParallel or DeepSpeed's ZeRO stage 0, and "
    "FSDP2's (fully_shard)"
)


def is_cut(param: Tensor) -> bool:
    """Whether ZeRO's stage 3, or `deepspeed.zero.Init`, has left this process a piece alone."""
    return hasattr(param, "ds_id") and not param.numel() and bool(getattr(param, "ds_numel", 0))


def whole_shape(param: Tensor) -> torch.Size:
    """The shape of a parameter, of which ZeRO's stage 3 leaves nothing in the parameter itself."""
    return torch.Size(getattr(param, "ds_shape", param.shape))


def names(group: Group) -> Sequence[str | None]:
    """The recorded name of each of a group's parameters, or None for each."""
    return group.get("param_names") or [None] * len(group["params"])


def label(name: str | None, param: Tensor) -> str:
    """A parameter's name in messages."""
    return name or f"the parameter of shape {tuple(param.shape)}"


def unique_names(groups: Sequence[Group]) -> list[str]:
    """A name for each parameter, group by group: the recorded one, or its place ("group0.3")."""
    return [
        name or f"group{index}.{position}"
        for index, group in enumerate(groups)
        for position, name in enumerate(names(group))
    ]


def name_alike(group: Group, others: Sequence[Group]) -> list[Group]:
    """In place: if only the new group or only the others have names, generates the missing ones.

    Args:
        group: a new group as the user gave it.
        others: the groups before it, all with or all without names.

    Returns:
        The others if they were given names, else an empty list.
    """
    if not isinstance(group["params"], Tensor | set):
        group["params"] = list(group["params"])
    params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
    named = "param_names" in group or any(isinstance(param, tuple) for param in params)
    if not others or named == ("param_names" in others[-1]):
        return []
    if not named:
        taken = {name for other in others for name in other["param_names"]}
        group["param_names"] = _placed(len(others), len(params), taken)
        return []
    taken = {param[0] for param in params if isinstance(param, tuple)}
    taken.update(group.get("param_names", ()))
    for index, other in enumerate(others):
        other["param_names"] = _placed(index, len(other["params"]), taken)
    return list(others)


def _placed(index: int, count: int, taken: Iterable[str]) -> list[str]:
    taken, made = set(taken), []
    for position in range(count):
        name = f"group{index}.{position}"
        while name in taken:
            name += "_"
        made.append(name)
    return made


def check_names(group: Group) -> None:
    """Raises `ValueError` unless a group has as many names as parameters, if it has any."""
    given = group.get("param_names")
    if given is not None and len(given) != len(group["params"]):
        raise ValueError(
            f"a group has {len(group['params'])} parameters and {len(given)} param_names: accepted "
            "is a name for each (a wrapper that flattens or shards parameters is not supported)"
        )


def check_placement(param: Tensor, called: str) -> None:
    """Raises `ValueError` for a flattened parameter, or a DTensor that isn't spread by rows."""
    shard_of(param, called)
    held = local_part(param.detach())
    if is_dtensor(param) and type(held) is not Tensor:
        raise ValueError(
            f"{called} is a DTensor of {type(held).__name__}: accepted are DTensors of dense "
            "tensors (weight_bits=None)"
        )
    kind = None
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        kind = "flattened by FSDP1 (FullyShardedDataParallel)"
    if kind is not None:
        raise ValueError(f"{called} is {kind}: {_ACCEPTED}")


def check_exchanged(
    group: Group,
    before: Sequence[Tensor],
    called: Sequence[str | None],
    trained: Callable[[Tensor], bool],
) -> None:
    """Raises `ValueError` if a parameter was replaced by one that can't follow it.

    Wrappers put flat partitions (ZeRO stages 1 and 2) into groups that were made for matrices, or
    shards (FSDP2) in the place of whole parameters, which loses their state.

    Args:
        group: its parameters now.
        before: its parameters at the last check.
        called: their names.
        trained: whether a parameter's state has taken a step.
    """
    params = group["params"]
    known, kept = set(map(id, before)), set(map(id, params))
    gone = [(p, name) for p, name in zip(before, called, strict=True) if id(p) not in kept]
    left = [tuple(param.shape) for param, _ in gone]
    new = [param for param in params if id(param) not in known]
    for param in new if gone else ():
        shape = tuple(param.shape)
        first = label(gone[0][1], gone[0][0])
        others = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        check_placement(param, f"what took the place of {first}{others}")
        lost = next((name for p, name in gone if not is_dtensor(p) and trained(p)), None)
        if is_dtensor(param) and lost is not None:
            raise ValueError(
                f"a DTensor took the place of {first}{others} after a step: accepted is to build "
                "the optimizer after fully_shard(model), then load_state_dict"
            )
        if shape not in left:
            kind = "a flat partition" if len(shape) == 1 else "a tensor"
            raise ValueError(
                f"{kind} of shape {shape} took the place of {first}{others} in a group: {_ACCEPTED}"
            )
        left.remove(shape)


def _check_experts(shape: torch.Size, name: str | None) -> None:
    """Raises `ValueError` for what is hardly E matrices: a convolution's kernels."""
    if min(shape[1:]) < SMALLEST_SIDE and shape.numel():
        raise ValueError(
            f"{name or 'the parameter'} of shape {tuple(shape)} would be {shape[0]} matrices: "
            f"accepted are matrices with sides of at least {SMALLEST_SIDE}; convolutions belong in "
            "a group without rank (param_groups(model) sorts them)"
        )


def check_param(param: Tensor, name: str | None, composition: Composition) -> None:
    """Raises `ValueError` for a parameter that can't be optimized by this composition."""
    called = label(name, param)
    check_placement(param, called)
    if not param.is_floating_point():
        raise ValueError(f"{called} has dtype {param.dtype}: accepted are real floating dtypes")
    shape = whole_shape(param)
    if composition.projection is None:
        if composition.rule.matrices_only and len(shape) not in (2, DIMENSIONS):
            raise ValueError(
                f"{called} is {len(shape)}-dimensional: accepted are matrices, by "
                f"{type(composition.rule).__name__}"
            )
        if composition.by_expert(shape):
            _check_experts(shape, name)
        elif param.numel():
            composition.rule.check_part(shard_of(param, called).part(None), called)
        return
    projector = composition.projection.projector
    dim = len(matrix_shape(shape))
    if dim not in projector.DIMENSIONS:
        raise ValueError(
            f"{called} is {len(shape)}-dimensional in a group with rank: accepted are matrices. "
            "ZeRO and FSDP1 flatten parameters to one dimension, use DDP or ZeRO stage 0; biases, "
            "norms and convolutions belong in a group without rank (param_groups(model) sorts them)"
        )
    if composition.by_expert(shape):
        _check_experts(shape, name)
    if shape.numel():
        spread = dim == len(shape) and not shard_of(param).rows.processes.alone
        if spread and not (projector.SPREADS and dim == 2):
            raise ValueError(
                f"{called} is spread over processes: accepted with {type(projector).__name__} are "
                "whole parameters where heads share a basis, or of more than two dimensions"
            )
        geometry = composition.projection.geometry(shape)
        residual = type(composition.projection.residual)
        if dim not in residual.DIMENSIONS:
            raise ValueError(
                f"{called} is {len(shape)}-dimensional: accepted with {residual.__name__} are "
                "matrices, with residual='dropped' convolutions too"
            )
        composition.projection.residual.check(geometry, projector)
