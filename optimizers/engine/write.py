"""Writing a planned update into a weight: by a fused kernel, or by rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..projectors import Slot
from ..residuals import Write
from ..weights import editable_rows, fused_rows, rounding_seed
from .composition import Projection
from .geometry import RowRange


def carry_out(write: Write, slot: Slot, projection: Projection) -> None:
    """Does to a weight what its residual planned, row chunk by row chunk where it is quantised."""
    options = projection.options
    seed = rounding_seed(options.seed, slot.taken, slot.index)
    rounds = options.stochastic_rounding
    delta, alpha, keep = write.delta, write.alpha, write.keep
    if isinstance(alpha, Tensor):
        delta, alpha = (None if delta is None else delta.mul_(alpha)), 1.0
    plain = Write(delta, alpha, keep, write.scaled, write.edit)
    if _fused(plain, slot, projection, seed, stochastic=rounds):
        return
    for weight_kn, rows in editable_rows(slot.param, slot.rows, seed, stochastic=rounds):
        scalar_keep = keep
        if isinstance(scalar_keep, Tensor) or (delta is None and scalar_keep != 1.0):
            weight_kn.mul_(scalar_keep)
            scalar_keep = 1.0
        if delta is not None:
            projection.projector.write_back(
                slot, weight_kn, rows, delta, alpha=alpha, keep=scalar_keep
            )
        if write.scaled is not None:
            factors = write.scaled.of(rows, slot.rows).to(weight_kn.dtype)
            grad = slot.grad[_span(rows, slot.rows)]
            weight_kn.addcmul_(grad, factors, value=-write.scaled.alpha)
        if write.edit is not None:
            write.edit(weight_kn, rows)


def _span(rows: RowRange, held: RowRange) -> slice:
    return slice(rows.start - held.start, rows.stop - held.start)


def _fused(
    write: Write, slot: Slot, projection: Projection, seed: int, *, stochastic: bool
) -> bool:
    """One pass over the weight, if its kind, the plan and the kernels allow it."""
    if write.edit is not None or isinstance(write.keep, Tensor) or slot.param.dim() != 2:
        return False
    grad, factors, delta = None, None, write.delta
    if write.scaled is not None:
        grad = slot.grad
        factors = (write.scaled.factors * write.scaled.alpha).float()
    chunks = fused_rows(slot.param, grad, seed, stochastic=stochastic, first_row=slot.rows.start)
    if chunks is None:
        return False
    assert not isinstance(write.alpha, Tensor)
    for chunk in chunks:
        start = slot.rows.start + chunk.start
        rows = RowRange(start, start + chunk.rows, slot.rows.reduce)
        step = None
        if delta is not None:
            step = projection.projector.back_project(slot, rows, delta)
            if step is None:
                step = torch.zeros(chunk.shape, dtype=torch.float32, device=slot.param.device)
                projection.projector.write_back(slot, step, rows, delta, alpha=-1.0, keep=0.0)
        own = factors
        if factors is not None and factors.shape[0] > 1:
            own = factors[chunk.start : chunk.start + chunk.rows]
        chunk.write(step, own, keep=write.keep, alpha=write.alpha)
    return True
