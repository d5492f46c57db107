"""Gradients of a step: their checks, and the count of skipped updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .devices import on_gpu
from .options import Group
from .parameters import label, names, unique_names
from .processes import Processes
from .sharding import is_dtensor, local_part
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
        if on_gpu(tensors[positions[0]]):
            for position, largest in zip(
                positions, largest_of([tensors[i] for i in positions]), strict=True
            ):
                good[position] = math.isfinite(largest)
            continue
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


def largest_of(tensors: Sequence[Tensor]) -> list[float]:
    """The largest absolute entry of each tensor on a GPU; 0 of an empty one."""
    full = [i for i, tensor in enumerate(tensors) if tensor.numel()]
    norms = list(torch._foreach_norm([tensors[i] for i in full], torch.inf)) if full else []
    if len({norm.dtype for norm in norms}) > 1:
        norms = [norm.double() for norm in norms]
    found = [0.0] * len(tensors)
    for i, largest in zip(full, torch.stack(norms).tolist() if norms else [], strict=True):
        found[i] = largest
    return found


def largest_entries(tensors_b: Tensor) -> Tensor:
    """The largest absolute entry of each of B tensors; NaN where there is one.

    Unlike their sum, it is finite if the entries are.
    """
    largest_b: Tensor = torch.linalg.vector_norm(tensors_b.flatten(1), torch.inf, dim=1)
    return largest_b


@dataclass
class Unread:
    """Skipped updates of a batch that were counted on a device.

    Attributes:
        params: the parameters.
        called: what messages call them.
        counts: int32, one each.
    """

    params: list[Tensor]
    called: list[str]
    counts: Tensor


#: Least number of steps between readings of counts on devices that nobody asked for.
READ_AFTER = 100


class SkippedUpdates:
    """Counts, by parameter, of updates skipped because the gradient was not finite.

    Parameters are held, without weak references: torch can't exchange tensors that have one, as
    `module.to` does with quantised weights. `keep_only` lets go of those that have left.
    """

    def __init__(self) -> None:
        self._total = 0
        self._counts: dict[Tensor, int] = {}
        #: Those that were counted on a device, by the parameters of a batch.
        self._unread: dict[tuple[int, ...], Unread] = {}
        self._steps = 0

    @property
    def total(self) -> int:
        """Number of skipped updates."""
        self.read()
        return self._total

    def gate(
        self, projected_b: Tensor, params: Sequence[Tensor], called: Sequence[str | None]
    ) -> Tensor:
        """Which of B tensors are finite, as flags on their device; the others become zero.

        They are counted on the device, and warned of when the counts are read.

        Args:
            projected_b: B x ..., in place.
            params: the parameters.
            called: the parameters' names.
        """
        good_b, bad_b = self._flags(largest_entries(projected_b), params, called)
        projected_b.masked_fill_(bad_b.view(-1, *[1] * (projected_b.dim() - 1)), 0.0)
        return good_b

    def flags(
        self, grads: Sequence[Tensor], params: Sequence[Tensor], called: Sequence[str | None]
    ) -> Tensor:
        """Which gradients on a GPU are finite, as flags on their device; counted as by `gate`.

        Args:
            grads: none of them empty.
            params: the parameters.
            called: the parameters' names.
        """
        norms = list(torch._foreach_norm(list(grads), torch.inf))
        if len({norm.dtype for norm in norms}) > 1:
            norms = [norm.double() for norm in norms]
        return self._flags(torch.stack(norms), params, called)[0]

    def _flags(
        self, largest_b: Tensor, params: Sequence[Tensor], called: Sequence[str | None]
    ) -> tuple[Tensor, Tensor]:
        """Which numbers are finite and which are not; the latter are counted."""
        key = tuple(map(id, params))
        found = self._unread.get(key)
        if found is None:
            counts = torch.zeros(len(params), dtype=torch.int32, device=largest_b.device)
            shown = [label(name, param) for name, param in zip(called, params, strict=True)]
            found = self._unread[key] = Unread(list(params), shown, counts)
        good_b: Tensor = largest_b < torch.inf
        bad_b = good_b.logical_not()
        found.counts.add_(bad_b)
        return good_b, bad_b

    def usable_together(
        self, projected_b: Tensor, params: Sequence[Tensor], called: Sequence[str | None]
    ) -> list[int]:
        """Positions of the finite ones of B tensors on a GPU; one synchronisation."""
        good = [largest < math.inf for largest in largest_entries(projected_b).tolist()]
        for param, name, sound in zip(params, called, good, strict=True):
            if not sound:
                self._count(param, label(name, param), 1)
        return [i for i, sound in enumerate(good) if sound]

    def read(self) -> None:
        """Reads the counts on devices; warns at the first skipped update."""
        self._steps = 0
        by_device: dict[torch.device, list[Unread]] = {}
        for unread in self._unread.values():
            by_device.setdefault(unread.counts.device, []).append(unread)
        for batches in by_device.values():
            counts = iter(torch.cat([unread.counts for unread in batches]).tolist())
            for unread in batches:
                own = [next(counts) for _ in unread.params]
                if any(own):
                    unread.counts.zero_()
                for param, shown, count in zip(unread.params, unread.called, own, strict=True):
                    if count:
                        self._count(param, shown, count)

    def keep_only(self, params: Sequence[Tensor]) -> None:
        """Lets go of other parameters; their updates stay in the total."""
        kept = set(map(id, params))
        left = {id(param) for param in self._counts} - kept
        if not left and all(kept.issuperset(key) for key in self._unread):
            return
        self.read()
        self._unread = {key: own for key, own in self._unread.items() if kept.issuperset(key)}
        self._counts = {param: own for param, own in self._counts.items() if id(param) in kept}

    def after_step(self, *, waited: bool) -> None:
        """Reads counts that nobody asked for now and then, after steps that waited anyway."""
        self._steps += 1
        if waited and self._steps >= READ_AFTER:
            self.read()

    def _count(self, param: Tensor, shown: str, count: int) -> None:
        if not self._total:
            warn_user(
                f"non-finite gradient of {shown}: this step does not update it (warned once; "
                "`skipped_by_name()` counts; skip_nonfinite=False turns the check off)"
            )
        self._total += count
        self._counts[param] = self._counts.get(param, 0) + count

    def by_name(self, groups: Sequence[Group]) -> dict[str, int]:
        """Skipped updates of each parameter that has any, most first."""
        self.read()
        params = [param for group in groups for param in group["params"]]
        found = {
            name: self._counts.get(param, 0)
            for name, param in zip(unique_names(groups), params, strict=True)
        }
        skipped = {name: count for name, count in found.items() if count}
        return dict(sorted(skipped.items(), key=lambda entry: -entry[1]))

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
            self._count(param, label(called[position], param), 1)

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


def may_read(group: Group) -> bool:
    """Whether a step may look at numbers on the host: no graph is captured.

    Under `capturable` that is on a CPU, which has no graphs, with parameters that are whole here;
    a DTensor's gradients are not checked under it.
    """
    if not group["capturable"]:
        return True
    return all(own.device.type == "cpu" and not is_dtensor(own) for own in group["params"])


@dataclass(frozen=True)
class Checks:
    """What a step does about gradients that are not finite.

    Attributes:
        on: `skip_nonfinite`.
        reads: flags may be read back, see `may_read`.
        skipped: counts them.
        decided: by parameter id what is known already, see `decision`.
    """

    on: bool
    reads: bool
    skipped: SkippedUpdates
    decided: Mapping[int, bool] = field(default_factory=dict)

    def usable(
        self,
        tensors: Sequence[Tensor],
        params: Sequence[Tensor],
        called: Sequence[str | None],
        spread: Sequence[Processes],
    ) -> Sequence[int]:
        """Positions of the tensors to use; see `SkippedUpdates.usable`."""
        if not (self.on and self.reads):
            return range(len(tensors))
        return self.skipped.usable(tensors, params, called, spread, self.decided)
