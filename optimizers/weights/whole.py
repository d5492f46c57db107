"""Updates of parameters that are not projected, however they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lowrank.cuda.noise import Seed

from ..engine.geometry import RowRange
from ..rules import UpdateRule
from ..rules.base import State
from ..rules.updates import add_update_, left_out, masked, picked
from .fused import fused_rows
from .rows import editable_rows, rounds


def apply_rule(
    rule: UpdateRule,
    grads: Sequence[Tensor],
    states: Sequence[State],
    weights: Sequence[Tensor],
    noise: Sequence[tuple[Seed, Seed]],
    good_b: Tensor | None = None,
    *,
    stochastic: bool = False,
) -> None:
    """Updates plain parameters in place, by rows if they are rounded stochastically.

    Args:
        rule: the update rule.
        grads: descent gradients.
        states: the parameters' states; `step` already counts this step.
        weights: the parameters.
        noise: for each weight that `rounds`, `rounding_seed` of this step.
        good_b: see `UpdateRule.apply`.
        stochastic: as in `editable_rows`.
    """
    by_rows = [rounds(weight, stochastic=stochastic) for weight in weights]
    plain = [i for i, slow in enumerate(by_rows) if not slow]
    if plain:
        rule.apply(*picked(plain, grads, states, weights, good_b))
    flags = [None] * len(weights) if good_b is None else good_b.unbind()
    for i, weight in enumerate(weights):
        if by_rows[i]:
            own = grads[i], states[i], weight, flags[i]
            _write(rule, *own, *noise[i], stochastic=stochastic)


def _write(
    rule: UpdateRule,
    grad: Tensor,
    state: State,
    weight: Tensor,
    good: Tensor | None,
    seed: Seed,
    turn: Seed,
    *,
    stochastic: bool,
) -> None:
    """By chunks of rows: computes the rule's update and writes the rounded weight."""
    if weight.dim() != 2:
        update = left_out(rule.update([masked(grad, good)], [state], [weight])[0], good)
        whole = RowRange.whole(weight.shape[0] if weight.dim() else 1)
        for chunk, rows in editable_rows(weight, whole, seed, turn, stochastic=stochastic):
            direction = (
                update.direction[rows.start : rows.stop] if weight.dim() else update.direction
            )
            add_update_(chunk, replace(update, direction=direction))
        return
    updates = rule.gated_rows(grad, state, weight, good)
    chunks = fused_rows(weight, None, seed, turn, stochastic=stochastic)
    if chunks is None:
        whole = RowRange.whole(weight.shape[0])
        for chunk, rows in editable_rows(weight, whole, seed, turn, stochastic=stochastic):
            add_update_(chunk, updates(slice(rows.start, rows.stop)))
        return
    for piece in chunks:
        update = updates(slice(piece.start, piece.start + piece.rows))
        piece.write(update.direction, None, decay_factor=update.decay_factor, alpha=update.alpha)
