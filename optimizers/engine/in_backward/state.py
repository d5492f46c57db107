"""Gradients of an unfinished accumulation in a `state_dict`, so that training resumes exactly.

They are further entries of their parameters' state, and the number of backward passes so far is one
of the first group: plain tensors and numbers. Loading takes them out again, before all else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..composition import Composition
from ..options import Group
from ..parameters import label, names
from ..sharding import is_dtensor

if TYPE_CHECKING:
    from .handle import InBackward

#: Keys of the first group.
PASSES, NORM = "in_backward_passes", "in_backward_norm"
#: Entries of a parameter's state.
PROJECTED, GRADIENT, LENGTH = "pending_projected", "pending_gradient", "pending_norm"


@dataclass
class Pending:
    """What is kept of an unfinished step.

    Attributes:
        passes: backward passes so far.
        norm: of the last step's gradient, if it is known.
        projected: sums of projected gradients, by parameter.
        gradients: whole gradients, by parameter.
        norms: of whole gradients of which only a projection is kept, by parameter.
    """

    passes: int = 0
    norm: Tensor | None = None
    projected: dict[Tensor, Tensor] = field(default_factory=dict)
    gradients: dict[Tensor, Tensor] = field(default_factory=dict)
    norms: dict[Tensor, Tensor] = field(default_factory=dict)

    def entries(self) -> dict[str, dict[Tensor, Tensor]]:
        """By the names that they have in a file."""
        return {PROJECTED: self.projected, GRADIENT: self.gradients, LENGTH: self.norms}


def save_pending(handle: InBackward | None, groups: Sequence[Group], saved: dict[str, Any]) -> None:
    """In place: adds what is pending to a `state_dict`.

    Raises:
        ValueError: weights were updated in a backward pass that no `step()` has followed yet; or
            parameters are sharded, and there is something pending.
    """
    if handle is None:
        return
    handle.check_unapplied("state_dict()")
    pending = handle.pending()
    own: dict[str, Any] = {}
    if pending.passes:
        own[PASSES] = pending.passes
    if pending.norm is not None:
        own[NORM] = pending.norm.cpu()
    if not own:
        return
    saved["param_groups"][0] = {**saved["param_groups"][0], **own}
    for group, packed in zip(groups, saved["param_groups"], strict=True):
        for param, name, key in zip(group["params"], names(group), packed["params"], strict=True):
            found = {e: held[param] for e, held in pending.entries().items() if param in held}
            if found and is_dtensor(param):
                raise ValueError(
                    f"state_dict() after {pending.passes} of {handle.accumulation} backward passes "
                    f"with {label(name, param)} sharded: accepted is state_dict() after step()"
                )
            if found:
                saved["state"][key] = {**saved["state"][key], **found}


def take_pending(
    handle: InBackward | None, groups: Sequence[Group], loaded: dict[str, Any]
) -> tuple[dict[str, Any], Pending]:
    """Divides a `state_dict` into one without pending gradients, and these.

    Raises:
        ValueError: there are some and no handle, or they don't fit; or the present step is
            unfinished.
    """
    pending = Pending()
    if handle is not None:
        handle.check_idle("load_state_dict()")
    state, saved_groups = loaded.get("state"), loaded.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(saved_groups, list) or not saved_groups:
        return loaded, pending  # refused by others
    first = saved_groups[0]
    if not isinstance(first, Mapping) or not {PASSES, NORM} & first.keys():
        return loaded, pending
    pending.passes, pending.norm = first.get(PASSES, 0), first.get(NORM)
    cleared = {key: value for key, value in first.items() if key not in (PASSES, NORM)}
    saved_groups = [cleared, *saved_groups[1:]]
    if pending.norm is not None and not isinstance(pending.norm, Tensor):
        raise ValueError(f"the saved state has {NORM}={pending.norm!r}; accepted is a tensor")
    most = 0 if handle is None else handle.accumulation
    if type(pending.passes) is not int or not 0 <= pending.passes <= most:
        accepted = "update_in_backward(optimizer, accumulation) before load_state_dict"
        if handle is not None:
            accepted = f"at most {most}, the accumulation of update_in_backward"
        raise ValueError(
            f"the state was saved after {pending.passes!r} backward passes of an unfinished step: "
            f"accepted is {accepted}"
        )
    params = {
        key: param
        for group, saved in zip(groups, saved_groups, strict=False)
        for key, param in zip(saved["params"], group["params"], strict=False)
    }
    made = {}
    for key, own in state.items():
        made[key] = own
        if not isinstance(own, Mapping) or key not in params:
            continue
        made[key] = {entry: v for entry, v in own.items() if entry not in pending.entries()}
        for entry, held in pending.entries().items():
            if entry in own:
                held[params[key]] = own[entry]
    if handle is not None:
        if pending.projected and handle.whole_norm:
            raise ValueError(
                f"the state was saved after {pending.passes} backward passes of an unfinished step "
                "of which projections are left, and norm='exact' with accumulation needs whole "
                "gradients: accepted is norm='projected' or 'previous', or a state after step()"
            )
        _check(groups, saved_groups, pending, handle.meaning)
    return {**loaded, "state": made, "param_groups": saved_groups}, pending


def _check(
    groups: Sequence[Group],
    saved_groups: Sequence[Group],
    pending: Pending,
    meaning: Callable[[Group], Composition],
) -> None:
    """Raises `ValueError` if a pending tensor has another shape than the parameter's."""
    for group, saved in zip(groups, saved_groups, strict=False):
        for param, name in zip(group["params"], names(group), strict=True):
            expected = {GRADIENT: tuple(param.shape), LENGTH: ()}
            if param in pending.projected:
                projection = meaning(saved).projection
                expected[PROJECTED] = ()
                if projection is not None:
                    expected[PROJECTED] = projection.geometry(param.shape).projected_shape()
            for entry, held in pending.entries().items():
                value = held.get(param)
                if param not in held:
                    continue
                if not isinstance(value, Tensor) or tuple(value.shape) != tuple(expected[entry]):
                    shown = tuple(value.shape) if isinstance(value, Tensor) else value
                    raise ValueError(
                        f"the saved state of {label(name, param)} has {entry} of shape {shown}; "
                        f"accepted is {tuple(expected[entry])}"
                    )
