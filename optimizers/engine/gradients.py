"""What a step may be given: checks of parameters and gradients, with names for messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .composition import Composition
from .options import Group


def names(group: Group) -> Sequence[str | None]:
    """The recorded name of each of a group's parameters, or None for each."""
    return group.get("param_names") or [None] * len(group["params"])


def label(name: str | None, param: Tensor) -> str:
    """How a message calls a parameter."""
    return name or f"the parameter of shape {tuple(param.shape)}"


def check_param(param: Tensor, name: str | None, composition: Composition) -> None:
    """Raises `ValueError` for a parameter that can't be optimized by this composition."""
    called = label(name, param)
    if not param.is_floating_point():
        raise ValueError(f"{called} has dtype {param.dtype}: accepted are real floating dtypes")
    if composition.projection is None:
        if composition.rule.matrices_only and param.dim() != 2:
            raise ValueError(
                f"{called} is {param.dim()}-dimensional: accepted are matrices, by "
                f"{type(composition.rule).__name__}"
            )
        return
    projector = composition.projection.projector
    if param.dim() not in projector.DIMENSIONS:
        raise ValueError(
            f"{called} is {param.dim()}-dimensional in a group with rank: accepted are matrices. "
            "ZeRO and FSDP1 flatten parameters to one dimension, use DDP or ZeRO stage 0; biases, "
            "norms and convolutions belong in a group without rank (param_groups(model) sorts them)"
        )
    if hasattr(param, "placements"):
        raise ValueError(f"{called} is a DTensor in a group with rank: accepted are unsharded ones")
    if param.numel():
        geometry = composition.projection.geometry(param.shape)
        residual = type(composition.projection.residual)
        if param.dim() not in residual.DIMENSIONS:
            raise ValueError(
                f"{called} is {param.dim()}-dimensional: accepted with {residual.__name__} are "
                "matrices, with residual='dropped' convolutions too"
            )
        composition.projection.residual.check(geometry, projector)


def descent_gradient(param: Tensor, name: str | None, group: Group) -> Tensor | None:
    """The gradient to descend along, in the parameter's dtype; None where there is none.

    Raises:
        ValueError: the gradient is sparse.
    """
    grad = param.grad
    if grad is None or param.numel() == 0:
        return None
    if grad.is_sparse:
        raise ValueError(
            f"{label(name, param)} has a sparse gradient: accepted are dense ones "
            "(sparse=False in nn.Embedding)"
        )
    if grad.dtype != param.dtype:
        grad = grad.to(param.dtype)
    return grad.neg() if group["maximize"] else grad


def finite(tensors: Sequence[Tensor], complain: Callable[[int], None]) -> list[bool]:
    """Which tensors hold only finite numbers; calls `complain` with the position of each other."""
    if not tensors:
        return []
    # A sum in another dtype would copy the tensor; bfloat16 has fp32's range, float16 has not.
    sums = torch.stack(
        [
            tensor.sum(dtype=torch.float32 if tensor.dtype == torch.float16 else None).float().cpu()
            for tensor in tensors
        ]
    )
    good: list[bool] = sums.isfinite().tolist()
    for position, known in enumerate(good):
        if not known:
            # the sum of finite numbers may overflow
            good[position] = bool(tensors[position].isfinite().all())
            if not good[position]:
                complain(position)
    return good
