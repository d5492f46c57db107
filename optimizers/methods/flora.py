"""Flora: Adafactor with a first moment compressed by a random projection, redrawn at intervals.

Hao et al., "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", ICML 2024 (arXiv
2402.03293). With U_t Adafactor's update (normalised, clipped, times lr_t; `rules.adafactor`), and A
of d x r with entries N(0, 1/r), drawn from a seed of each matrix; for m < n (else on the right):

    W <- (1 - lr_t wd) W - scale ((1 - b1) U + b1 A C)
    C <- b1 C + (1 - b1) A^T U
    every kappa steps, first:  C <- A_new^T (A C),  A <- A_new

Only the moment is compressed, not the update itself. U = D_r G D_c has factors by row and by
column, so that A^T U = (D_r A)^T G D_c is one GEMM with G; the rest works in row chunks, without
a temporary of size m x n. Memory per m x n matrix, in fp32: max(m, n) r for C, m + n for the
factors; A is not stored.

A move adds noise. Let y = A C be what the moment stands for, of one column; A_new is independent of
it. With ||y|| = 1 along the first axis, a = A_new^T y is A_new's first row, of entries N(0, 1/r),
and the other d - 1 rows are independent of it:

    E||A_new a||^2 = E||a||^4 + (d - 1) E||a||^2 / r = (1 + 2 / r) + (d - 1) / r = 1 + (d + 1) / r

Between two moves y decays by b1^kappa, and what gradients add is bounded. So the moment's mean
square is bounded exactly where (1 + (d + 1) / r) b1^(2 kappa) < 1, and grows like that number to
the power of the moves elsewhere (`moment_growth`); there the optimizer warns.

Unlike in the released code, the groups decide which matrices are compressed: those with `rank`
are, all others get plain Adafactor with the same `beta1`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank.cuda.noise import mix

from ..engine.chunks import wide_dtype
from ..engine.composition import Composition
from ..engine.fp32 import exact_fp32
from ..engine.geometry import Geometry, Side
from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import PROJECTION_DEFAULTS, Group, ProjectionOptions
from ..engine.rule_factories import adafactor_rule
from ..engine.rule_families import ADAFACTOR
from ..engine.seeds import seed_names
from ..engine.warn import warn_user
from ..projectors.operand import cast_product
from ..projectors.random import gaussian
from ..rules import Adafactor, Update, UpdateRule
from ..rules.base import RowUpdates, State

#: Projection options that don't apply to a randomly compressed moment.
FIXED = ("projector", "schedule", "stagger", "basis", "residual", "moments", "projection_dtype")


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
        """Advances the compressed moment; returns its previous value, basis and geometry."""
        assert self.beta1 is not None
        geometry = self._geometry(grad_mn.shape)
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
        scaled = basis * (by_row if left else by_col)[:, None]
        # In the gradient's precision, as every projection; fp16 doesn't hold the factors of small
        # gradients, 1e15 for those that are zero.
        if grad_mn.dtype != torch.float16:
            scaled = scaled.to(grad_mn.dtype)
        product = cast_product(grad_mn, scaled, left).to(moment.dtype)
        projected = product.mT * by_col if left else product * by_row[:, None]
        moment.lerp_(projected.mul_(size), 1 - self.beta1)
        if moment is not stored:
            stored.copy_(moment)
        return before, basis, geometry

    def by_rows(self, grad: Tensor, state: State, weight: Tensor) -> RowUpdates:
        """See `UpdateRule.by_rows`: first factors and moment, then single rows."""
        rate = self._rate(state["step"], weight)
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


@method(
    "flora_adafactor",
    paper="2402.03293",
    summary="Flora: Adafactor, first moment in a random projection",
    state="n r + m + n",
)
class FloraAdafactor(LowRankOptimizer):
    """Flora with Adafactor.

    Group keys: `rank` (or `rank_ratio_matrix`), `kappa` (another name of `update_proj_gap`; the
    paper's is 1000), `proj_type` ("std", "reverse_std", "left" or "right"), `scale` (1), `seed`.
    """

    rule = ADAFACTOR.but(beta1=0.9)
    projection_defaults: ClassVar = {"projector": "random", "scale": 1.0}
    aliases: ClassVar = {"kappa": "update_proj_gap"}

    def make_state(self, param: Tensor, composition: Composition, group: Group) -> State:
        """A new state; a matrix's contains a hash of its name, for its seeds."""
        state = super().make_state(param, composition, group)
        if "matrix" in state:
            index = next(i for i, own in enumerate(group["params"]) if own is param)
            name = seed_names(self.param_groups)[self._index_of(group)][index]
            # 63 bits, which an int64 holds. States of 0.1.0 keep their 1, 2, 3.
            own = self.state.get(param, {}).get("matrix")
            state["matrix"] = mix(0, name) >> 1 if own is None else own
            assert isinstance(composition.rule, FloraRule)
            self._warn_of_growth(composition.rule, group)
        return state

    def _warn_of_growth(self, rule: FloraRule, group: Group) -> None:
        """Warns once for each choice of options under which the moment of a matrix grows."""
        kappa, beta1 = rule.options.update_proj_gap, rule.beta1
        known: set[Any] = self.__dict__.setdefault("_warned_of_growth", set())
        if beta1 is None or (rule.options, beta1) in known:
            return
        known.add((rule.options, beta1))
        sizes = [rule.basis_shape(param.shape) for param in group["params"] if param.numel()]
        growth, (d, r) = max((moment_growth(d, r, beta1, kappa), (d, r)) for d, r in sizes)
        if growth >= 1.0:
            warn_user(
                f"update_proj_gap={kappa} with beta1={beta1} and random matrices of {d} x {r}: "
                f"each move of the moment multiplies its mean square by {growth:.3g}, so that it "
                f"grows without bound; accepted are update_proj_gap={smallest_gap(d, r, beta1)} or "
                "more, a higher rank, a lower beta1 or none"
            )

    def compose(self, group: Group) -> Composition:
        """Flora's rule where the group has a rank, else Adafactor."""
        plain = adafactor_rule(group)
        options = ProjectionOptions.of(group)
        if options is None:
            return Composition(plain)
        defaults = {**PROJECTION_DEFAULTS, **self.projection_defaults}
        for name in FIXED:
            if getattr(options, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(options, name)!r}: {type(self).__name__} accepts "
                    f"{defaults[name]!r}; it compresses the moment, not the gradient"
                )
        if options.proj_type == "full":
            raise ValueError("proj_type='full': FloraAdafactor accepts one projected axis")
        form = {f.name: getattr(plain, f.name) for f in fields(plain)}
        return Composition(FloraRule(**form, options=options))
