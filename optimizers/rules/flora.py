"""Flora's rule: Adafactor on whole matrices with a first moment compressed at random.

See `methods.flora` for the paper and the equations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowrank.cuda.noise import mix

from ..engine.chunks import wide_dtype
from ..engine.fp32 import exact_fp32
from ..engine.geometry import Geometry, Side
from ..engine.options import ProjectionOptions
from ..engine.sharding import Part, part_of
from ..projectors.operand import cast_product
from ..projectors.random import gaussian
from .adafactor import Adafactor
from .base import RowUpdates, State, Update, UpdateRule
from .precision import moments_itemsize


def moment_growth(d: int, r: int, beta1: float, kappa: int) -> float:
    """What a move and kappa steps multiply the moment's mean square by; unstable from 1 on."""
    return float((1 + (d + 1) / r) * beta1 ** (2 * kappa))


def smallest_gap(d: int, r: int, beta1: float) -> int:
    """The smallest kappa for which `moment_growth` is below 1."""
    if beta1 == 0.0:
        return 1
    gap = max(1, math.floor(math.log(1 + (d + 1) / r) / (-2 * math.log(beta1))))
    while moment_growth(d, r, beta1, gap) >= 1.0:
        gap += 1
    return gap


@dataclass(frozen=True)
class FloraRule(Adafactor):
    """Adafactor on whole matrices with a compressed first moment.

    Attributes:
        options: rank, side, kappa (`update_proj_gap`), scale and seed.
    """

    matrices_only: ClassVar[bool] = True

    options: ProjectionOptions = field(default_factory=ProjectionOptions)

    def _geometry(self, shape: Sequence[int]) -> Geometry:
        rows, columns = shape
        rank = self.options.rank_of((rows, columns))
        return Geometry.of((rows, columns), rank, self.options.proj_type)

    def basis_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """(d, r) of the random matrix for a weight of this shape."""
        (size,) = self._geometry(shape).basis_shapes.values()
        return size

    def _shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        rows, columns = shape
        shapes: dict[str, tuple[int, ...]] = {
            "exp_avg_sq_row": (rows,),
            "exp_avg_sq_col": (columns,),
        }
        if self.beta1 is not None:
            shapes["exp_avg"] = self._geometry(shape).projected_shape()
        return shapes

    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """Zero factors and moment, and a hash of the matrix's name, for its seeds."""
        return super().init(shape, like) | {"matrix": 0}

    def part_bytes(self, part: Part, itemsize: int) -> int:
        """See `UpdateRule.part_bytes`: sides are the whole matrix's."""
        size, held = part.shape, part.local_shape
        saved = sum(size) - sum(held)
        if self.beta1 is not None and self._geometry(size).side is Side.RIGHT:
            saved_moment = (size[0] - held[0]) * self._geometry(size).rank
        else:
            saved_moment = 0
        whole = self.state_bytes(size, itemsize)
        moment = moments_itemsize(self.moments_dtype, itemsize)
        return whole - saved * max(itemsize, 4) - saved_moment * moment

    def step_traffic(self, part: Part, itemsize: int) -> int:
        """See `UpdateRule.step_traffic`: further a left moment's projection, n x r."""
        total = super().step_traffic(part, itemsize)
        geometry = self._geometry(part.shape)
        if self.beta1 is not None and geometry.side is Side.LEFT:
            total += part.shape[1] * geometry.rank * max(itemsize, 4)
        return total

    def spread(self, key: str, axis: int, shape: Sequence[int]) -> int | None:
        """See `UpdateRule.spread`: a moment without the spread axis is whole on each process."""
        if key == "exp_avg":
            own = 1 if self._geometry(shape).side is Side.LEFT else 0
            return axis if axis == own else None
        return super().spread(key, axis, shape)

    def basis(self, state: State, geometry: Geometry, period: int, like: Tensor) -> Tensor:
        """A, d x r, of a matrix in its `period`-th interval of kappa steps."""
        (shape,) = geometry.basis_shapes.values()
        return gaussian(shape, mix(self.options.seed, state["matrix"], period), like)

    def carry(self, previous: UpdateRule, old: State, new: State) -> bool:
        """See `UpdateRule.carry`: changed bases transform the moment as every kappa steps."""
        if not isinstance(previous, FloraRule):
            return False
        if "exp_avg" not in old or "exp_avg" not in new or self._draws_as(previous):
            return super().carry(previous, old, new)
        shape = (len(old["exp_avg_sq_row"]), len(old["exp_avg_sq_col"]))
        moment, step, pair = old["exp_avg"], int(old["step"]), []
        for rule in (previous, self):
            geometry = rule._geometry(shape)
            period = step // rule.options.update_proj_gap
            pair.append((geometry.side, rule.basis(old, geometry, period, moment)))
        new["exp_avg"].copy_(_between(moment, *pair[0], *pair[1]))
        others = {key: value for key, value in old.items() if key != "exp_avg"}
        return super().carry(previous, others, new)

    def _draws_as(self, other: FloraRule) -> bool:
        """Whether another rule has the same bases."""
        names = ("rank", "rank_ratio_matrix", "proj_type", "seed", "update_proj_gap")
        return all(getattr(self.options, n) == getattr(other.options, n) for n in names)

    def _moment(
        self, grad_mn: Tensor, state: State, by_row: Tensor, by_col: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor, Geometry]:
        """Advances the compressed moment; returns its previous value, basis and geometry.

        Of the basis only the rows of this process's part, if the left side is compressed.
        """
        assert self.beta1 is not None
        part = part_of(state)
        geometry = self._geometry(grad_mn.shape if part is None else part.original_shape)
        if part is not None and part.transposed:
            geometry = geometry.mirror()
        stored: Tensor = state["exp_avg"]
        moment = stored.to(wide_dtype(grad_mn))
        step, kappa = int(state["step"]), self.options.update_proj_gap
        basis = self.basis(state, geometry, step // kappa, moment)
        left = geometry.side is Side.LEFT
        if step % kappa == 0:
            old = self.basis(state, geometry, step // kappa - 1, moment)
            with exact_fp32():
                between = basis.mT @ old
                moment.copy_(between @ moment if left else moment @ between.mT)
        before = moment.clone()
        if left and part is not None:
            basis = basis[part.start : part.stop]
        scaled = basis * (by_row if left else by_col)[:, None]
        # In the gradient's precision, as every projection; fp16 doesn't hold the factors of small
        # gradients, 1e15 for those that are zero.
        if grad_mn.dtype != torch.float16:
            scaled = scaled.to(grad_mn.dtype)
        product = cast_product(grad_mn, scaled, left).to(moment.dtype)
        if left and part is not None:
            product = part.spread.sum(product)
        projected = product.mT * by_col if left else product * by_row[:, None]
        moment.lerp_(projected.mul_(size), 1 - self.beta1)
        if moment is not stored:
            stored.copy_(moment)
        return before, basis, geometry

    def by_rows(self, grad: Tensor, state: State, weight: Tensor) -> RowUpdates:
        """See `UpdateRule.by_rows`: first factors and moment, then single rows."""
        rate = self._rate(state, weight)
        by_row, by_col, clip = self._factors(grad, state, self._decay(state))
        size = rate * clip
        moment = None
        if self.beta1 is not None:
            moment = self._moment(grad, state, by_row, by_col, size)

        def update(rows: slice) -> Update:
            chunk = grad[rows].to(by_row.dtype) * by_row[rows, None]
            chunk.mul_(by_col).mul_(size)
            if moment is not None:
                assert self.beta1 is not None
                projected, basis, geometry = moment
                left = geometry.side is Side.LEFT
                pair = (basis[rows], projected) if left else (projected[rows], basis.mT)
                chunk.addmm_(*pair, beta=1 - self.beta1, alpha=self.beta1)
            direction = chunk.mul_(self.options.scale)
            return Update(direction, 1.0, 1.0 - rate * self.weight_decay, rate, rate)

        return update


@exact_fp32()
def _between(moment: Tensor, side: Side, basis: Tensor, new_side: Side, new: Tensor) -> Tensor:
    """A compressed moment, decompressed and compressed again with another basis."""
    if side is Side.LEFT:
        return (new.mT @ basis) @ moment if new_side is Side.LEFT else basis @ (moment @ new)
    return (new.mT @ moment) @ basis.mT if new_side is Side.LEFT else moment @ (basis.mT @ new)
