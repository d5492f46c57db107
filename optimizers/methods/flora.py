"""Flora: Adafactor whose first moment lives in a random projection that is moved now and then.

Hao et al., "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", ICML 2024 (arXiv
2402.03293). With U_t Adafactor's update (normalised, clipped, times lr_t; `rules.adafactor`), and A
of d x r with entries N(0, 1/r), drawn from a seed of each matrix; for m < n (else on the right):

    W <- (1 - lr_t wd) W - scale ((1 - b1) U + b1 A C)
    C <- b1 C + (1 - b1) A^T U
    every kappa steps, first:  C <- A_new^T (A C),  A <- A_new

Only the moment is compressed, the update itself is not. U = D_r G D_c has factors by row and by
column, so that A^T U = (D_r A)^T G D_c is one GEMM with G; all else works in row chunks, and
nothing of size m x n is made. Memory per m x n matrix, in fp32: max(m, n) r for C, m + n for the
factors; A costs nothing.

Unlike the released code there is no rule that decides which matrices are compressed: groups with
`rank` are, all others get plain Adafactor with the same `beta1`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import count
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank.cuda.noise import mix

from ..engine.composition import Composition
from ..engine.geometry import Geometry, Side
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import PROJECTION_DEFAULTS, Group, ProjectionKeywords, ProjectionOptions
from ..engine.rule_factories import adafactor_defaults, adafactor_rule
from ..projectors.norms import axis_norms
from ..projectors.random import gaussian
from ..rules import Adafactor, Update, UpdateRule
from ..rules.base import State, numel

CHUNK_ELEMENTS = 1 << 18
#: Options of `ProjectionKeywords` that mean nothing to a moment that is compressed at random.
FIXED = ("projector", "schedule", "stagger", "basis", "residual", "moments", "projection_dtype")


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
        """Zero factors and moment, and the matrix's number, which its seeds are made from."""
        return super().init(shape, like) | {"matrix": 0}

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Factors and compressed moment."""
        return max(itemsize, 4) * sum(numel(size) for size in self._shapes(shape).values())

    def basis(self, state: State, geometry: Geometry, period: int, like: Tensor) -> Tensor:
        """A, d x r, of a matrix in its `period`-th run of kappa steps."""
        (shape,) = geometry.basis_shapes.values()
        return gaussian(shape, mix(self.options.seed, state["matrix"], period), like)

    def carry(self, previous: UpdateRule, old: State, new: State) -> bool:
        """See `UpdateRule.carry`: under other options the moment moves as at each kappa-th step."""
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
        """Whether bases are the same under other options."""
        names = ("rank", "rank_ratio_matrix", "proj_type", "seed", "update_proj_gap")
        return all(getattr(self.options, n) == getattr(other.options, n) for n in names)

    def _weight_rms(self, weight: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(axis_norms(weight, 1))
        return norm.div(weight.numel() ** 0.5)

    def _factors(
        self, grad_mn: Tensor, state: State, decay: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Advances the second moment; the factors of rows and columns, and the clipping's."""
        m, n = grad_mn.shape
        row_m, col_n = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        row_sums, col_sums = torch.empty_like(row_m), torch.zeros_like(col_n)
        for span in _spans(m, n):
            square = grad_mn[span].to(row_m.dtype).square()
            row_sums[span] = square.sum(1)
            col_sums += square.sum(0)
        row_m.lerp_(row_sums.div_(n).add_(self.eps[0]), 1 - decay)
        col_n.lerp_(col_sums.div_(m).add_(self.eps[0]), 1 - decay)
        by_row, by_col = (row_m / row_m.mean()).rsqrt_(), col_n.rsqrt()
        total = torch.zeros((), dtype=row_m.dtype, device=row_m.device)
        for span in _spans(m, n):
            chunk = (grad_mn[span].to(row_m.dtype) * by_row[span, None]).mul_(by_col)
            total += chunk.square_().sum()
        size = total.div_(m * n).sqrt_()
        return by_row, by_col, size.div_(self.clip_threshold).clamp_(min=1.0).reciprocal_()

    def _moment(
        self, grad_mn: Tensor, state: State, by_row: Tensor, by_col: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor, Geometry]:
        """Advances the compressed moment; gives it as it was before, its basis and geometry."""
        assert self.beta1 is not None
        geometry = self._geometry(grad_mn.shape)
        moment: Tensor = state["exp_avg"]
        step, kappa = int(state["step"]), self.options.update_proj_gap
        basis = self.basis(state, geometry, step // kappa, moment)
        left = geometry.side is Side.LEFT
        if step % kappa == 0:
            old = self.basis(state, geometry, step // kappa - 1, moment)
            between = basis.mT @ old
            moment.copy_(between @ moment if left else moment @ between.mT)
        before = moment.clone()
        # In the gradient's precision, as every projection.
        if left:
            scaled = (basis * by_row[:, None]).to(grad_mn.dtype)
            projected = (scaled.mT @ grad_mn).to(moment.dtype).mul_(by_col)
        else:
            scaled = (basis * by_col[:, None]).to(grad_mn.dtype)
            projected = (grad_mn @ scaled).to(moment.dtype).mul_(by_row[:, None])
        moment.lerp_(projected.mul_(size), 1 - self.beta1)
        return before, basis, geometry

    def _advance(
        self, grad_mn: Tensor, state: State, rate: float | Tensor
    ) -> Callable[[slice], Tensor]:
        """Advances the state; what it gives makes the update of some rows."""
        decay = 1.0 - float(state["step"]) ** self.decay_rate
        by_row, by_col, clip = self._factors(grad_mn, state, decay)
        size = rate * clip
        moment = None
        if self.beta1 is not None:
            moment = self._moment(grad_mn, state, by_row, by_col, size)

        def direction(span: slice) -> Tensor:
            chunk = grad_mn[span].to(by_row.dtype) * by_row[span, None]
            chunk.mul_(by_col).mul_(size)
            if moment is not None:
                assert self.beta1 is not None
                projected, basis, geometry = moment
                left = geometry.side is Side.LEFT
                pair = (basis[span], projected) if left else (projected[span], basis.mT)
                chunk.addmm_(*pair, beta=1 - self.beta1, alpha=self.beta1)
            return chunk.mul_(self.options.scale)

        return direction

    def apply(
        self, grads: Sequence[Tensor], states: Sequence[State], weights: Sequence[Tensor]
    ) -> None:
        """Updates weights in place, in chunks of rows."""
        for grad, state, weight in zip(grads, states, weights, strict=True):
            rate = self._rate(state["step"], weight)
            direction = self._advance(grad, state, rate)
            if self.weight_decay:
                weight.mul_(1.0 - rate * self.weight_decay)
            for span in _spans(*weight.shape):
                weight[span].sub_(direction(span))

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], weights: Sequence[Tensor]
    ) -> list[Update]:
        """The whole update as a tensor of the gradient's size; `apply` needs none."""
        updates = []
        for grad, state, weight in zip(grads, states, weights, strict=True):
            rate = self._rate(state["step"], weight)
            direction = self._advance(grad, state, rate)(slice(0, len(grad)))
            updates.append(Update(direction, 1.0, 1.0 - rate * self.weight_decay, rate, rate))
        return updates


def _between(moment: Tensor, side: Side, basis: Tensor, new_side: Side, new: Tensor) -> Tensor:
    """What a compressed moment stands for, compressed by another basis."""
    if side is Side.LEFT:
        return (new.mT @ basis) @ moment if new_side is Side.LEFT else basis @ (moment @ new)
    return (new.mT @ moment) @ basis.mT if new_side is Side.LEFT else moment @ (basis.mT @ new)


def _spans(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class FloraAdafactor(LowRankOptimizer):
    """Flora with Adafactor.

    Group keys: `rank` (or `rank_ratio_matrix`), `kappa` (another name of `update_proj_gap`; the
    paper's is 1000), `proj_type` ("std", "reverse_std", "left" or "right"), `scale` (1), `seed`.
    """

    projection_defaults: ClassVar[Mapping[str, Any]] = {"projector": "random", "scale": 1.0}
    aliases: ClassVar[Mapping[str, str]] = {"kappa": "update_proj_gap"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = 0.9,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool | None = None,
        warmup_init: bool = False,
        **options: Unpack[ProjectionKeywords],
    ) -> None:
        """Makes the optimizer; arguments as in `GaLoreAdafactor`, but for `beta1` 0.9.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        defaults = adafactor_defaults(
            lr,
            eps,
            clip_threshold,
            decay_rate,
            beta1,
            weight_decay,
            scale_parameter,
            relative_step,
            warmup_init,
        )
        super().__init__(params, defaults, options)

    def make_state(self, param: Tensor, composition: Composition, group: Group) -> State:
        """A new state; a matrix without a number gets the first free one, for its seeds."""
        state = super().make_state(param, composition, group)
        if "matrix" in state:
            own = self.state.get(param, {}).get("matrix")
            taken = {known.get("matrix") for known in self.state.values()}
            free = next(number for number in count(1) if number not in taken)
            state["matrix"] = free if own is None else own
        return state

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
