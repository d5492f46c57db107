"""Gradients of a step: their checks, and the count of skipped updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .options import Group
from .parameters import label, names, unique_names
from .processes import Processes
from .sharding import local_part
from .warn import warn_user


def check_gradients(groups: Iterable[Group]) -> None:
    """Raises `ValueError` for a sparse gradient."""
    for group in groups:
        for position, param in enumerate(group["params"]):
            check_dense(param, names(group)[position])


def check_dense(param: Tensor, name: str | None) -> None:
    """Raises `ValueError` for a sparse gradient."""
    if param.grad is not None and param.grad.is_sparse:
        raise ValueError(
            f"{label(name, param)} has a sparse gradient: accepted are dense ones (sparse=False in "
            "nn.Embedding)"
        )


def descent_gradient(param: Tensor, group: Group) -> Tensor | None:
    """This process's part of a parameter's gradient, in the parameter's dtype.

    It is negated under `maximize`; None if there is none.
    """
    if param.grad is None or param.numel() == 0:
        return None
    grad: Tensor = local_part(param.grad)
    if grad.dtype != param.dtype:
        grad = grad.to(param.dtype)
    return grad.neg() if group["maximize"] else grad


def finite(
    tensors: Sequence[Tensor],
    complain: Callable[[int], None],
    spread: Sequence[Processes] | None = None,
) -> list[bool]:
    """Whether each tensor is finite; calls `complain` with the position of each that is not.

    One synchronisation per device, and one small reduction for each group of processes.

    Args:
        tensors: of which each process may have a part.
        complain: called with a position.
        spread: the processes that have the other parts, for each tensor.
    """
    good = [True] * len(tensors)
    by_device: dict[torch.device, list[int]] = {}
    for position, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(position)
    for positions in by_device.values():
        # A sum in another dtype would copy the tensor; bfloat16 has fp32's range, float16 has not.
        sums = [
            tensors[i].sum(dtype=torch.float32 if tensors[i].dtype == torch.float16 else None)
            for i in positions
        ]
        known = torch.stack([total.float() for total in sums]).isfinite().tolist()
        for position, sound in zip(positions, known, strict=True):
            # The sum of finite numbers may overflow.
            good[position] = sound or bool(tensors[position].isfinite().all())
    good = _agreed(good, tensors, spread or ())
    for position, sound in enumerate(good):
        if not sound:
            complain(position)
    return good


def _agreed(good: list[bool], tensors: Sequence[Tensor], spread: Sequence[Processes]) -> list[bool]:
    """Flags that are set on all processes of each tensor."""
    groups: dict[Processes, list[int]] = {}
    for position, processes in enumerate(spread):
        if not processes.alone:
            groups.setdefault(processes, []).append(position)
    agreed = list(good)
    for processes, positions in groups.items():
        flags = processes.all_agree([good[i] for i in positions], tensors[positions[0]].device)
        for position, flag in zip(positions, flags, strict=True):
            agreed[position] = flag
    return agreed


_NOTHING: Mapping[int, bool] = {}


class SkippedUpdates:
    """Counts, by parameter, of updates skipped because the gradient was not finite."""

    def __init__(self) -> None:
        self._counts: dict[Tensor, int] = {}

    @property
    def total(self) -> int:
        """Number of skipped updates."""
        return sum(self._counts.values())

    def by_name(self, groups: Sequence[Group]) -> dict[str, int]:
        """Skipped updates of each parameter that has any, most first."""
        params = [param for group in groups for param in group["params"]]
        found = {
            name: self._counts[param]
            for name, param in zip(unique_names(groups), params, strict=True)
            if param in self._counts
        }
        return dict(sorted(found.items(), key=lambda entry: -entry[1]))

    def usable(
        self,
        tensors: Sequence[Tensor],
        params: Sequence[Tensor],
        called: Sequence[str | None],
        spread: Sequence[Processes],
        decided: Mapping[int, bool] = _NOTHING,
    ) -> list[int]:
        """Positions of the finite tensors; counts the others and warns at the first one.

        Args:
            tensors: gradients or their projections, or this process's parts of them.
            params: the parameters.
            called: the parameters' names.
            spread: the processes that have the other parts.
            decided: by parameter id what is known already, see `decision`.
        """

        def count(position: int) -> None:
            param = params[position]
            if not self._counts:
                warn_user(
                    f"non-finite gradient of {label(called[position], param)}: this step does not "
                    "update it (warned once; `skipped_by_name()` counts; skip_nonfinite=False "
                    "turns the check off)"
                )
            self._counts[param] = self._counts.get(param, 0) + 1

        known = [decided.get(id(param)) for param in params]
        rest = [i for i, good in enumerate(known) if good is None]
        found = iter(finite([tensors[i] for i in rest], _ignore, [spread[i] for i in rest]))
        usable = []
        for position, good in enumerate(known):
            if next(found) if good is None else good:
                usable.append(position)
            else:
                count(position)
        return usable


def _ignore(position: int) -> None:
    """Counts nothing."""
