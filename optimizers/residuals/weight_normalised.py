"""Weight normalisation: rows of a weight have a trained length, and a direction that is projected.

Huang et al., "Gradient Weight-Normalized Low-Rank Projection for Efficient LLM Training" (arXiv
2412.19616). A row of W is w_i = g_i v_i / ||v_i||. At the beginning of each step v_i = w_i and
g_i = ||w_i||, so that W is all that is stored; with a the step size and N the update of the
projected gradient:

    d_i = <G_i, w_i> / ||w_i||                   the gradient of g_i
    M_g <- b1 M_g + (1 - b1) d,    V_g <- b2 V_g + (1 - b2) d^2
    v  <- W - a scale P N,    g <- ||w|| - a magnitude_scale M_g / (sqrt(V_g) + eps)
    w_i <- g_i v_i / ||v_i||

and weight decay of both. A length at most halves in a step: lengths below 0 would turn rows round,
against their moments, and those of an initial 0.02 sqrt(n) are a few steps from it. A row of zeros,
which has no direction, takes the step of v alone. Rows are the weight's, one for each output,
whichever axis is projected.

Memory: 2 m numbers in fp32 (fp64), whole on every process. No m x n temporary is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.chunks import row_chunks, wide_dtype
from ..engine.geometry import Geometry, RowRange
from ..engine.processes import chunk_range
from ..projectors import ProjectedParam, Projector
from ..rules import Update
from .base import Residual, WeightUpdate

#: Least length after a step, as a share of the one before.
SHRINKS = 0.5
MEAN, SQUARES = "magnitude_avg", "magnitude_avg_sq"


@dataclass(frozen=True)
class WeightNormalised(Residual):
    """Trains the lengths of a weight's rows apart from their directions.

    Attributes:
        magnitude_scale: factor on the lengths' updates; `scale` is the directions'.
        betas: decay rates of the lengths' moments; `for_group` fills them in.
        eps: their constant, added before bias correction; the same.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("magnitude_scale",)
    GATES: ClassVar[bool] = True

    magnitude_scale: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        checks.number("magnitude_scale", self.magnitude_scale, low=0.0)

    def for_group(self, group: Mapping[str, Any]) -> WeightNormalised:
        """With the group's decay rates.

        Raises:
            ValueError: the group's rule has no `betas`, or a captured step count.
        """
        betas, eps = group.get("betas"), group.get("eps")
        if betas is None or not isinstance(eps, int | float):
            raise ValueError(
                "residual='weight_normalised': accepted are rules with betas and eps (AdamW)"
            )
        if group.get("capturable"):
            raise ValueError(
                "residual='weight_normalised' with capturable=True: accepted is one of them"
            )
        checks.betas(betas)
        return replace(self, betas=(float(betas[0]), float(betas[1])), eps=float(eps))

    def init(self, geometry: Geometry, like: Tensor) -> dict[str, Any]:
        """Zero moments."""
        rows, wide = geometry.shape[0], wide_dtype(like)
        return {key: torch.zeros(rows, dtype=wide, device=like.device) for key in (MEAN, SQUARES)}

    def state_bytes(self, geometry: Geometry, itemsize: int, world: int = 1) -> int:
        """Two numbers for each row."""
        return 2 * max(itemsize, 4) * geometry.shape[0]

    def step_traffic(self, geometry: Geometry, itemsize: int, world: int) -> int:
        """See `Residual.step_traffic`: the lengths' gradients."""
        return len(chunk_range(geometry.shape[0], world, 0)) * max(itemsize, 4)

    def compute_update(
        self, param: ProjectedParam, projected: Tensor, update: Update, projector: Projector
    ) -> WeightUpdate:
        """See the module."""
        return self._made(param, update, projector, None)

    def compute_gated(
        self,
        param: ProjectedParam,
        projected: Tensor,
        update: Update,
        projector: Projector,
        good: Tensor,
    ) -> WeightUpdate:
        """See `Residual.compute_gated`: lengths without a finite gradient stay."""
        return self._made(param, update, projector, good)

    def _made(
        self, param: ProjectedParam, update: Update, projector: Projector, good: Tensor | None
    ) -> WeightUpdate:
        alpha, decay_factor = float(update.alpha), float(update.decay_factor)
        made = WeightUpdate(update.direction, alpha * self.scale, decay_factor)
        norms, slopes = self._norms(param)
        if good is not None:
            slopes = torch.where(good, slopes, 0.0)
        moved = self._advance(param, slopes) * (alpha * float(update.factor))
        wanted = torch.maximum(
            norms * decay_factor - moved * self.magnitude_scale, norms * (decay_factor * SHRINKS)
        )
        if param.geometry.mirrored:
            new = self._new_norms(param, made, projector)
            factors = torch.where((new > 0) & (norms > 0), wanted / new, 1.0)
            return replace(made, edit=lambda weight_kn, _: _multiply(weight_kn, factors))
        first = param.rows.start

        def edit(weight_kn: Tensor, rows: RowRange) -> None:
            for span in row_chunks(weight_kn):
                part = rows.part(span)
                held = slice(part.start - first, part.stop - first)
                wide = weight_kn[span].to(norms.dtype)
                new = wide.square().sum(1).sqrt()  # as `_norms`: equal rows have equal lengths
                live = (new > 0) & (norms[held] > 0)
                if good is not None:
                    live &= good
                factors = torch.where(live, wanted[held] / new, 1.0)
                weight_kn[span] = (wide * factors.unsqueeze(1)).to(weight_kn.dtype)

        return replace(made, edit=edit)

    def _norms(self, param: ProjectedParam) -> tuple[Tensor, Tensor]:
        """Lengths of the weight's rows and their gradients: of the rows here, or mirrored of all.

        A matrix whose columns are spread over processes is seen as its transpose.
        """
        axis = 0 if param.geometry.mirrored else 1
        size = param.grad.shape[1 - axis]
        wide = wide_dtype(param.grad)
        sums = torch.zeros(2, size, dtype=wide, device=param.grad.device)
        for span, weight in _chunks(param.weight, wide):
            grad = param.grad[span].to(wide)
            own = sums if axis == 0 else sums[:, span]
            own[0] += weight.square().sum(axis)
            own[1] += (grad * weight).sum(axis)
        if axis == 0:
            sums = param.rows.processes.sum(sums)
        norms = sums[0].sqrt()
        return norms, torch.where(norms > 0, sums[1] / norms, 0.0)

    def _advance(self, param: ProjectedParam, slopes: Tensor) -> Tensor:
        """Advances the lengths' moments, all of them, and returns M / (sqrt(V) + eps) of those."""
        mirrored = param.geometry.mirrored
        whole = slopes if mirrored else param.rows.assemble(slopes)
        mean, squares = param.state[MEAN], param.state[SQUARES]
        mean.lerp_(whole.to(mean.dtype), 1 - self.betas[0])
        squares.mul_(self.betas[1]).addcmul_(whole, whole, value=1 - self.betas[1])
        made: Tensor = mean / (squares.sqrt() + self.eps)
        return made if mirrored else made[param.rows.start : param.rows.stop]

    def _new_norms(
        self, param: ProjectedParam, update: WeightUpdate, projector: Projector
    ) -> Tensor:
        """Lengths of the rows of v, whose parts are spread over processes."""
        wide = wide_dtype(param.grad)
        squares = torch.zeros(param.grad.shape[1], dtype=wide, device=param.grad.device)
        for span, weight in _chunks(param.weight, wide):
            moved = weight.clone()
            assert update.direction is not None
            projector.write_back(
                *(param, moved, param.rows.part(span), update.direction),
                alpha=float(update.alpha),
                decay_factor=float(update.decay_factor),
            )
            squares += moved.square().sum(0)
        return param.rows.processes.sum(squares).sqrt()


def _chunks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of a weight at a time, however it is stored."""
    # These need the engine, which needs the residuals.
    from ..weights.quantized import QuantizedWeight
    from ..weights.rows import weight_chunks

    width = weight.shape[1]
    for span in weight_chunks(weight):
        if isinstance(weight, QuantizedWeight):
            part = weight.entries(span.start * width, span.stop * width).load(dtype)
            yield span, part.view(span.stop - span.start, width)
        else:
            yield span, weight[span].to(dtype)


def _multiply(weight_kn: Tensor, factors: Tensor) -> None:
    for span in row_chunks(weight_kn):
        weight_kn[span] = (weight_kn[span].to(factors.dtype) * factors).to(weight_kn.dtype)
