"""The gradient's norm and its clipping where gradients are not all there at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..chunks import row_chunks, wide_dtype
from ..devices import on_gpu
from ..processes import ALONE, Processes
from ..sharding import local_part

#: Which norm `max_norm` bounds.
NORMS = ("exact", "projected", "previous")
_SMALLEST = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class Length(NamedTuple):
    """The norm of one gradient.

    Attributes:
        norm: of this process's part, 0-d, fp32 (fp64 for fp64).
        processes: those that have the other parts.
    """

    norm: Tensor
    processes: Processes = ALONE


def norm_of(gradient: Tensor) -> Tensor:
    """The norm of this process's part of a gradient, without host synchronisation."""
    local: Tensor = local_part(gradient)
    wide = wide_dtype(local)
    if not local.numel():
        return local.new_zeros((), dtype=wide)
    if local.dtype == wide or local.dim() == 0 or on_gpu(local):
        return _length(local, wide)
    # A CPU makes a copy in the wider type of all that it is given.
    return _length(torch.stack([_length(local[rows], wide) for rows in row_chunks(local)]), wide)


def _length(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm


def total_norm(lengths: Sequence[Length]) -> Tensor | None:
    """The norm of all gradients together, on the first one's device; None if there are none.

    All processes that have parts call it, with equally many of them.
    """
    if not lengths:
        return None
    device, parts = lengths[0].norm.device, []
    groups: dict[Processes, list[Tensor]] = {}
    for length in lengths:
        groups.setdefault(length.processes, []).append(length.norm.to(device))
    for processes, norms in groups.items():
        dtype = max((norm.dtype for norm in norms), key=lambda kind: kind.itemsize)
        norm = torch.linalg.vector_norm(torch.stack([norm.to(dtype) for norm in norms]))
        parts.append(norm if processes.alone else processes.sum(norm.square()).sqrt())
    if len(parts) == 1:
        return parts[0]
    wide: Tensor = torch.linalg.vector_norm(torch.stack([part.double() for part in parts]))
    return wide


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by, at most 1; as in `clip_grad_norm_`."""
    if max_norm == torch.inf:
        return torch.ones_like(norm)
    return (max_norm / (norm + _SMALLEST)).clamp(max=1.0)


def scale_(gradient: Tensor, factor: Tensor, norm: Tensor, *, skip_nonfinite: bool) -> None:
    """In place: multiplies a gradient by a factor.

    Args:
        gradient: whole or projected.
        factor: 0-d.
        norm: of all gradients; if it is not finite, nothing of them is used, so that a group with
            `skip_nonfinite` skips the step.
        skip_nonfinite: the option of the gradient's group.
    """
    if skip_nonfinite:
        factor = torch.where(norm.isfinite(), factor, torch.nan)
    local: Tensor = local_part(gradient)
    local.mul_(factor.to(local.device))
