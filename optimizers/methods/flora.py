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
the power of the moves elsewhere (`rules.flora.moment_growth`); there the optimizer warns.

Unlike in the released code, the groups decide which matrices are compressed: those with `rank`
are, all others get plain Adafactor with the same `beta1`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor

from lowrank.cuda.noise import mix

from ..engine.composition import Composition
from ..engine.experts import by_place, expert_name, matrix_shape
from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import PROJECTION_DEFAULTS, Group, ProjectionOptions
from ..engine.rule_families import ADAFACTOR
from ..engine.seeds import seed_names
from ..engine.warn import warn_user
from ..rules.adafactor import Adafactor
from ..rules.base import State
from ..rules.flora import FloraRule, moment_growth, smallest_gap

#: Projection options that don't apply to a randomly compressed moment.
FIXED = ("projector", "schedule", "stagger", "basis", "residual", "moments", "projection_dtype")


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
    projection_defaults: ClassVar = {"projector": "random", "scale": 1.0, "stagger": False}
    aliases: ClassVar = {"kappa": "update_proj_gap"}

    def make_state(self, param: Tensor, composition: Composition, group: Group) -> State:
        """A new state; a matrix's contains a hash of its name, for its seeds."""
        state = super().make_state(param, composition, group)
        if "matrix" in state:
            index = next(i for i, own in enumerate(group["params"]) if own is param)
            name = seed_names(self.param_groups)[self._index_of(group)][index]
            # 63 bits, which an int64 holds. States of 0.1.0 keep their 1, 2, 3.
            own = self.state.get(param, {}).get("matrix")
            if composition.by_expert(param.shape):
                for place, seeds in by_place(param, state["matrix"]):
                    seeds.fill_(mix(0, expert_name(name, place)) >> 1)
            else:
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
        shapes = [matrix_shape(param.shape) for param in group["params"] if param.numel()]
        sizes = [rule.basis_shape(shape) for shape in shapes]
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
        plain = self.rule.make(group)
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
        assert isinstance(plain, Adafactor)
        form = {f.name: getattr(plain, f.name) for f in fields(plain)}
        return Composition(FloraRule(**form, options=options))
