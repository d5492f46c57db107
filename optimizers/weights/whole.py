"""Updating parameters that are not projected, through the weight seam."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.geometry import RowRange
from ..rules import Update, UpdateRule
from ..rules.base import State
from .fused import fused_rows
from .int8 import Int8Weight
from .rows import editable_rows, rounding_seed


def apply_rule(
    rule: UpdateRule,
    grads: Sequence[Tensor],
    states: Sequence[State],
    weights: Sequence[Tensor],
    seed: int,
    indices: Sequence[int],
    *,
    stochastic: bool = False,
) -> None:
    """Updates whole parameters in place, by rows where they have to be rounded stochastically.

    Args:
        rule: gives the updates.
        grads: descent gradients.
        states: the parameters' states; `step` already counts this step.
        weights: the parameters.
        seed: of the rounding.
        indices: positions among the parameters that are updated whole.
        stochastic: as in `editable_rows`.
    """
    by_rows = [_by_rows(weight, stochastic) for weight in weights]
    plain = [i for i, slow in enumerate(by_rows) if not slow]
    if plain:
        rule.apply(
            [grads[i] for i in plain], [states[i] for i in plain], [weights[i] for i in plain]
        )
    for i, weight in enumerate(weights):
        if by_rows[i]:
            (update,) = rule.update([grads[i]], [states[i]], [weight])
            # Indices of projected matrices are not negative.
            own = rounding_seed(seed, int(states[i]["step"]), ~indices[i])
            _write(weight, update, own, stochastic)


def _write(weight: Tensor, update: Update, seed: int, stochastic: bool) -> None:
    plain = isinstance(update.decay_factor, float | int) and isinstance(update.alpha, float | int)
    chunks = None
    if plain and weight.dim() == 2:
        chunks = fused_rows(weight, None, seed, stochastic=stochastic)
    if chunks is not None:
        for part in chunks:
            direction = update.direction[part.start : part.start + part.rows]
            part.write(
                direction, None, decay_factor=float(update.decay_factor), alpha=float(update.alpha)
            )
        return
    whole = RowRange.whole(weight.shape[0] if weight.dim() else 1)
    for chunk, rows in editable_rows(weight, whole, seed, stochastic=stochastic):
        direction = update.direction[rows.start : rows.stop] if weight.dim() else update.direction
        chunk.mul_(update.decay_factor).sub_(direction.to(chunk.dtype) * update.alpha)


def _by_rows(weight: Tensor, stochastic: bool) -> bool:
    return isinstance(weight, Int8Weight) or (stochastic and weight.dtype == torch.bfloat16)
