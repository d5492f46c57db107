"""COAP's re-projection: singular vectors of gradients restricted to a range; see `correlation`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.chunks import wide_dtype
from ..engine.geometry import RowRange, Side
from . import decompositions
from .operand import cast_product


def reprojected(
    grads_mn: Sequence[Tensor],
    sketches_dr: Sequence[Tensor],
    side: Side,
    mode: str,
    rows: RowRange | None = None,
) -> list[Tensor]:
    """Singular vectors of gradients restricted to the ranges found by sketches, d x r each.

    Args:
        grads_mn: gradients of one shape.
        sketches_dr: Gaussian or the previous basis, n x r on the right, m x r on the left.
        side: the projected axis.
        mode: "svd" decomposes with `torch.linalg.svd`, signs untouched; anything else by `eigh`.
        rows: the rows of the gradients that are here, if others are on other processes.

    Raises:
        NotConverged: the solver doesn't converge.
    """
    left = side is Side.LEFT
    held = RowRange.whole(len(grads_mn[0])) if rows is None else rows

    def product(grad_mn: Tensor, factor: Tensor, transposed: bool) -> Tensor:
        if transposed:
            part = cast_product(grad_mn, factor[held.start : held.stop], transposed)
            return held.processes.sum(part)
        return held.assemble(cast_product(grad_mn, factor, transposed))

    small = []
    for grad_mn, sketch_dr in zip(grads_mn, sketches_dr, strict=True):
        sketch = sketch_dr.to(wide_dtype(grad_mn))
        range_lr = torch.linalg.qr(product(grad_mn, sketch, left)).Q
        small.append(product(grad_mn, range_lr, not left).mT)
    largest = [torch.linalg.vector_norm(small_rd, torch.inf) for small_rd in small]
    scales = torch.stack(largest).tolist()
    solver, rank = "svd" if mode == "svd" else "eigh", sketches_dr[0].shape[1]
    unknown: list[Tensor | None] = [None] * len(small)
    found = decompositions.bases(small, scales, rank, Side.RIGHT, solver, unknown, 0)
    return [basis for (basis,) in found]
