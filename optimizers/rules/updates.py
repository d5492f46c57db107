"""Updates that rules give: joined, left out where a flag says so, and applied to weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


@dataclass(frozen=True)
class Update:
    """A rule's update: weight <- decay_factor * weight - alpha * (back-projected) direction.

    Attributes:
        direction: a tensor of the (projected) gradient's shape.
        alpha: step size that is not in `direction` yet; a 0-d tensor where it is only known on the
            device.
        decay_factor: 1 less this step's decoupled weight decay; a 0-d tensor as above.
        factor: the factor that `direction` contains besides M / (sqrt(V) + eps) or its equivalent
            (bias corrections, Adafactor's learning rate): residuals compare norms without it.
        rate: the learning rate, for updates without moments; `alpha` when None.
        norms: fp32 norms of the gradient and of `direction` along the requested axis (kept with
            length 1), if the rule computed them at no cost.
    """

    direction: Tensor
    alpha: float | Tensor
    decay_factor: float | Tensor
    factor: float | Tensor = 1.0
    rate: float | Tensor | None = None
    norms: tuple[Tensor, Tensor] | None = None


def together(updates: Sequence[Update]) -> Update:
    """Updates of one shape as one, see `UpdateRule.update_together`."""
    first = updates[0]

    def joint(name: str) -> Any:
        values = [getattr(update, name) for update in updates]
        if not any(isinstance(value, Tensor) for value in values):
            if any(value != values[0] for value in values):
                raise ValueError(f"updates of one batch have several {name}: {values}")
            return values[0]
        return torch.stack([torch.as_tensor(value) for value in values]).view(-1, 1, 1)

    norms = None
    if first.norms is not None:
        pairs = zip(*(update.norms for update in updates if update.norms), strict=True)
        gradient, direction = (torch.stack(side) for side in pairs)
        norms = gradient, direction
    return Update(
        torch.stack([update.direction for update in updates]),
        *(joint("alpha"), joint("decay_factor"), joint("factor"), joint("rate"), norms),
    )


def picked(
    positions: Sequence[int],
    grads: Sequence[Tensor],
    states: Sequence[State],
    weights: Sequence[Tensor],
    good_b: Tensor | None,
) -> tuple[list[Tensor], list[State], list[Tensor], Tensor | None]:
    """Some of the arguments of `UpdateRule.apply`."""
    if good_b is not None and len(positions) < len(good_b):
        flags = good_b.unbind()  # an index would be a copy from the host
        good_b = torch.stack([flags[i] for i in positions])
    return (
        [grads[i] for i in positions],
        [states[i] for i in positions],
        [weights[i] for i in positions],
        good_b,
    )


def left_out(update: Update, good: Tensor | None) -> Update:
    """An update without direction unless a flag on the device is set; None is set."""
    if good is None:
        return update
    return replace(update, direction=torch.where(good, update.direction, 0.0))


def masked(grad: Tensor, good: Tensor | None) -> Tensor:
    """The gradient, or a copy of zeros unless a flag on the device is set; None is set."""
    return grad if good is None else torch.where(good, grad, 0.0)


def zeroed(grads: Sequence[Tensor], good_b: Tensor) -> list[Tensor]:
    """Copies of small gradients, zero where flags on the device aren't set; few launches.

    Args:
        grads: of one dtype and device.
        good_b: a flag for each.
    """
    shapes: dict[torch.Size, list[int]] = defaultdict(list)
    for i, grad in enumerate(grads):
        shapes[grad.shape].append(i)
    flags, found = good_b.logical_not().unbind(), list(grads)
    for positions in shapes.values():
        copies = torch.stack([grads[i] for i in positions])
        bad_b = torch.stack([flags[i] for i in positions])
        copies.masked_fill_(bad_b.view(-1, *[1] * (copies.dim() - 1)), 0.0)
        for i, copied in zip(positions, copies.unbind(), strict=True):
            found[i] = copied
    return found


def add_update_(weight: Tensor, update: Update) -> None:
    """In place: weight <- decay_factor weight - alpha direction."""
    if isinstance(update.decay_factor, Tensor) or update.decay_factor != 1.0:
        weight.mul_(update.decay_factor)
    direction, alpha = update.direction.to(weight.dtype), update.alpha
    if isinstance(alpha, Tensor):
        weight.sub_(direction * alpha)
    else:
        weight.add_(direction, alpha=-alpha)


def add_updates_(weights: Sequence[Tensor], updates: Sequence[Update]) -> None:
    """`add_update_` of each weight; by list operations where decay and step size are numbers."""
    alpha, decay_factor = updates[0].alpha, updates[0].decay_factor
    kind = weights[0].dtype
    alike = all(weight.dtype == kind for weight in weights) and all(
        not isinstance(own.alpha, Tensor)
        and not isinstance(own.decay_factor, Tensor)
        and (own.alpha, own.decay_factor) == (alpha, decay_factor)
        for own in updates
    )
    if not alike or isinstance(alpha, Tensor):
        for weight, update in zip(weights, updates, strict=True):
            add_update_(weight, update)
        return
    if decay_factor != 1.0:
        torch._foreach_mul_(list(weights), decay_factor)
    directions = [update.direction for update in updates]
    if directions[0].dtype != kind:
        narrow = [torch.empty_like(weight) for weight in weights]
        torch._foreach_copy_(narrow, directions)
        directions = narrow
    torch._foreach_add_(list(weights), directions, alpha=-alpha)
