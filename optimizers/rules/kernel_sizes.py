"""Step sizes and eps of Adam as its kernels take them: numbers, or a tensor for a whole list.

They are tensors where a step is captured in a graph, or where a flag on the device gates it, and
are filled there: a copy from the host can't be captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank.cuda.adam import Number

from .base import State

if TYPE_CHECKING:
    from .adam import Adam


def listed_sizes(
    rule: Adam, states: Sequence[State]
) -> tuple[tuple[float, float], Tensor | None, list[Number], Number]:
    """(eps, size) as numbers or as a tensor for all states; the size of each; lr."""
    if not rule.capturable:
        size, eps, lr = rule.sizes(states[0])
        assert isinstance(eps, float)
        assert isinstance(size, float)
        return (eps, size), None, [size] * len(states), lr
    steps = torch.stack([state["step"] for state in states])
    size, eps, lr = rule.sizes({"step": steps})
    sizes = torch.empty(len(states), 2, dtype=torch.float32, device=steps.device)
    _fill(sizes, (eps, size))
    return (0.0, 0.0), sizes, list(sizes[:, 1].unbind()), lr


def joined_sizes(
    rule: Adam, states: Sequence[State], good_b: Tensor | None
) -> tuple[tuple[float, float], Tensor | None, Number, Number]:
    """(eps, size) as numbers or as a tensor for all states; the size, B x 1 x 1; lr.

    Args:
        rule: Adam's hyper-parameters.
        states: B states.
        good_b: which of them are updated, None for all; the size of the others is zero.
    """
    if not rule.capturable:
        size, eps, lr = rule.sizes(states[0])
        assert isinstance(eps, float)
        assert isinstance(size, float)
        if good_b is None:
            return (eps, size), None, size, lr
        gated = torch.full((len(states), 2), eps, dtype=torch.float32, device=good_b.device)
        torch.mul(good_b, size, out=gated[:, 1])
        return (0.0, 0.0), gated, size, lr
    steps_b = torch.stack([state["step"] for state in states])
    corrections = torch.empty(2, len(states), dtype=torch.float32, device=steps_b.device)
    for beta, power_b in zip(rule.betas, corrections.unbind(0), strict=True):
        torch.pow(beta, steps_b, out=power_b)
    first_b, second_b = torch.rsub(corrections, 1.0).unbind(0)
    second_b.sqrt_()
    sizes = torch.empty(len(states), 2, dtype=torch.float32, device=steps_b.device)
    if rule.eps_corrected:
        torch.mul(second_b, rule.eps, out=sizes[:, 0])
    else:
        sizes[:, 0].fill_(rule.eps)
    if rule.correct_bias:
        torch.div(second_b, first_b, out=sizes[:, 1])
    else:
        sizes[:, 1].fill_(1.0)
    if good_b is not None:
        sizes[:, 1].mul_(good_b)
    return (0.0, 0.0), sizes, sizes[:, 1].view(-1, 1, 1), rule.lr


def with_rates(sizes: Tensor, rates: Sequence[Any]) -> Tensor:
    """B x 4 from B x 2 sizes, and two rates that all have in common."""
    own = torch.empty(len(sizes), 4, dtype=torch.float32, device=sizes.device)
    own[:, :2].copy_(sizes)
    _fill(own[:, 2:], rates)
    return own


def _fill(columns: Tensor, values: Sequence[Any]) -> None:
    """Writes a value, or one for each row, into each column."""
    for column, value in zip(columns.unbind(1), values, strict=True):
        if isinstance(value, Tensor) and value.device == columns.device:
            column.copy_(value)
        else:
            column.fill_(float(value))
