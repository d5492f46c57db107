"""Applying a `WeightUpdate` to a weight: by a fused kernel, or by rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank.cuda.arguments import usable
from lowrank.cuda.noise import Seed

from ..projectors import ProjectedParam
from ..residuals import WeightUpdate
from ..weights import QuantizedWeight, editable_rows, fused_rows, rounding_seed, rounds
from .chunks import row_chunks, wide_dtype
from .composition import Projection
from .geometry import RowRange


def apply_update(update: WeightUpdate, param: ProjectedParam, projection: Projection) -> None:
    """Applies an update to a weight, in chunks of rows if it is quantised."""
    options = projection.options
    stochastic = options.stochastic_rounding
    seed, turn = param.noise or (0, 0)
    if param.noise is None and rounds(param.weight, stochastic=stochastic):
        seed, turn = rounding_seed(param.weight, options.seed, param.seed_name, param.steps_done)
    direction, alpha, decay_factor = update.direction, update.alpha, update.decay_factor
    if isinstance(alpha, Tensor):
        direction, alpha = (None if direction is None else direction.mul_(alpha)), 1.0
        update = WeightUpdate(direction, alpha, decay_factor, update.scaled, update.edit)
    if _fused(update, param, projection, seed, turn, stochastic=stochastic):
        return
    for weight_kn, rows in editable_rows(
        param.weight, param.rows, seed, turn, stochastic=stochastic
    ):
        scalar_decay = decay_factor
        if isinstance(scalar_decay, Tensor) or (direction is None and scalar_decay != 1.0):
            weight_kn.mul_(scalar_decay)
            scalar_decay = 1.0
        if direction is not None:
            projection.projector.write_back(
                param, weight_kn, rows, direction, alpha=alpha, decay_factor=scalar_decay
            )
        if update.scaled is not None:
            factors = update.scaled.of(rows, param.rows)
            grad_kn, size = param.grad[_span(rows, param.rows)], update.scaled.alpha
            if update.scaled.gated:
                factors = factors if size == 1.0 else factors * size
                torch.ops.lowrank.write_back(
                    weight_kn, None, grad_kn, factors.to(wide_dtype(factors)), 1.0, 0.0, None, 0
                )
            else:
                _take_off(weight_kn, grad_kn, factors, size)
        if update.edit is not None:
            update.edit(weight_kn, rows)


def apply_updates(
    updates: Sequence[WeightUpdate], params: Sequence[ProjectedParam], projection: Projection
) -> None:
    """`apply_update` of matrices of one shape; in one launch where no direction is subtracted."""
    if not _fused_together(updates, params, projection):
        for update, param in zip(updates, params, strict=True):
            apply_update(update, param, projection)


def _fused_together(
    updates: Sequence[WeightUpdate], params: Sequence[ProjectedParam], projection: Projection
) -> bool:
    first, weights = updates[0], [param.weight.detach() for param in params]
    if projection.options.stochastic_rounding or isinstance(params[0].weight, QuantizedWeight):
        return False
    factors: list[Tensor] = []
    for update in updates:
        other = update.direction is not None or update.edit is not None
        if other or update.scaled is None or update.decay_factor != first.decay_factor:
            return False
        scaled = update.scaled
        factors.append(scaled.factors if scaled.alpha == 1.0 else scaled.factors * scaled.alpha)
    grads = [param.grad for param in params]
    if isinstance(first.decay_factor, Tensor) or usable(*weights, *grads, *factors) is None:
        return False
    torch.ops.lowrank.write_back_list(weights, grads, factors, first.decay_factor)
    return True


def _take_off(weight_kn: Tensor, grad_kn: Tensor, factors: Tensor, alpha: float) -> None:
    """In place: weight <- weight - alpha factors o grad."""
    if weight_kn.dtype != torch.float16:
        weight_kn.addcmul_(grad_kn, factors.to(weight_kn.dtype), value=-alpha)
        return
    # fp16 doesn't hold large factors; their products with small gradients it does.
    for span in row_chunks(weight_kn):
        own = factors if len(factors) == 1 else factors[span]
        wide = weight_kn[span].float().addcmul_(grad_kn[span].float(), own, value=-alpha)
        weight_kn[span] = wide


def _span(rows: RowRange, held: RowRange) -> slice:
    return slice(rows.start - held.start, rows.stop - held.start)


def _fused(
    update: WeightUpdate,
    param: ProjectedParam,
    projection: Projection,
    seed: Seed,
    turn: Seed,
    *,
    stochastic: bool,
) -> bool:
    """One pass over the weight by a kernel; False if there is none for this weight and update."""
    if update.edit is not None or param.weight.dim() != 2:
        return False
    grad, factors, direction = None, None, update.direction
    if update.scaled is not None:
        grad = param.grad
        factors, size = update.scaled.factors, update.scaled.alpha
        factors = (factors if size == 1.0 else factors * size).float()
    chunks = fused_rows(
        param.weight, grad, seed, turn, stochastic=stochastic, first_row=param.rows.start
    )
    if chunks is None:
        return False
    for chunk in chunks:
        rows = param.rows.part(slice(chunk.start, chunk.start + chunk.rows))
        step = None
        if direction is not None:
            step = projection.projector.back_project(param, rows, direction)
            if step is None:
                step = torch.zeros(chunk.shape, dtype=torch.float32, device=param.weight.device)
                projection.projector.write_back(
                    param, step, rows, direction, alpha=-1.0, decay_factor=0.0
                )
        own = factors
        if factors is not None and factors.shape[0] > 1:
            own = factors[chunk.start : chunk.start + chunk.rows]
        chunk.write(step, own, decay_factor=update.decay_factor, alpha=update.alpha)
    return True
