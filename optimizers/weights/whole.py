"""Updates of parameters that are not projected, however they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..engine.geometry import RowRange
from ..rules import UpdateRule
from ..rules.base import State, add_update_
from .fused import fused_rows
from .quantized import QuantizedWeight
from .rows import editable_rows, rounding_seed


def apply_rule(
    rule: UpdateRule,
    grads: Sequence[Tensor],
    states: Sequence[State],
    weights: Sequence[Tensor],
    seed: int,
    names: Sequence[str],
    *,
    stochastic: bool = False,
) -> None:
    """Updates plain parameters in place, by rows if they are rounded stochastically.

    Args:
        rule: the update rule.
        grads: descent gradients.
        states: the parameters' states; `step` already counts this step.
        weights: the parameters.
        seed: of the rounding.
        names: the names that seed the parameters' random numbers, see `engine.seeds`.
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
            own = rounding_seed(weight, seed, names[i], int(states[i]["step"]) - 1)
            _write(rule, grads[i], states[i], weight, *own, stochastic=stochastic)


def _write(
    rule: UpdateRule,
    grad: Tensor,
    state: State,
    weight: Tensor,
    seed: int,
    turn: int,
    *,
    stochastic: bool,
) -> None:
    """By chunks of rows: computes the rule's update and writes the rounded weight."""
    if weight.dim() != 2:
        (update,) = rule.update([grad], [state], [weight])
        whole = RowRange.whole(weight.shape[0] if weight.dim() else 1)
        for chunk, rows in editable_rows(weight, whole, seed, turn, stochastic=stochastic):
            direction = (
                update.direction[rows.start : rows.stop] if weight.dim() else update.direction
            )
            add_update_(chunk, replace(update, direction=direction))
        return
    updates = rule.by_rows(grad, state, weight)
    chunks = fused_rows(weight, None, seed, stochastic=stochastic)
    if chunks is None:
        whole = RowRange.whole(weight.shape[0])
        for chunk, rows in editable_rows(weight, whole, seed, turn, stochastic=stochastic):
            add_update_(chunk, updates(slice(rows.start, rows.stop)))
        return
    for piece in chunks:
        update = updates(slice(piece.start, piece.start + piece.rows))
        alpha, direction = update.alpha, update.direction
        if isinstance(alpha, Tensor):
            alpha, direction = 1.0, direction * alpha
        # A decay that depends on the weight's RMS (Adafactor) is read back.
        piece.write(direction, None, decay_factor=float(update.decay_factor), alpha=alpha)


def _by_rows(weight: Tensor, stochastic: bool) -> bool:
    return isinstance(weight, QuantizedWeight) or (stochastic and weight.dtype == torch.bfloat16)
