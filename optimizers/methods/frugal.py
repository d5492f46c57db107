"""FRUGAL: Adam in a subspace that is redrawn now and then, signSGD outside it.

Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable
Training" (arXiv 2411.07837). With R the projected gradient and N = Adam(R) in torch's form:

    W <- (1 - lr wd) W - lr scale (up(N) + inactive_lr_scale sign(G - up(R)))

Every `update_proj_gap` steps a subspace is chosen anew and the moments start from zero, their bias
correction too. By default it is made of random coordinates (rows or columns of the shorter axis);
`projector="singular"` takes leading singular vectors, `projector="random"` with
`distribution="orthonormal"` random directions. `density` is the subspace's share: r = density
min(m, n).

Memory per m x n matrix: 2 density m n for the moments, and 4 r bytes for coordinates or
min(m, n) r entries for a basis. The paper's choice of whole tensors (its Block mode) is not built:
every parameter's state has a fixed size here.

Quirks of the released code not taken over: its test of the gap looks at the first tensor's count of
steps since the last reset, here at each matrix's own count of all steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine import checks
from ..engine.composition import Composition
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import Group, ProjectionKeywords
from ..engine.rule_factories import adam_rule
from ..engine.strategies import projection_of


class FrugalAdamW(LowRankOptimizer):
    """FRUGAL with AdamW.

    Group keys: `density` (or `rank`; `is_proj_params=True` stands for the constructor's density),
    `update_proj_gap`, `scale` (the released code's scale of the active part, which multiplies both
    parts), `projector`, `inactive_lr_scale`, `inactive_update` ("sign" or "sgd").
    """

    supports_capturable: ClassVar[bool] = True
    # As a default it says nothing of a group; one that is given becomes a rank ratio.
    ungrouped: ClassVar[tuple[str, ...]] = ("density",)
    projection_defaults: ClassVar[Mapping[str, Any]] = {
        "projector": "coordinate",
        "residual": "sign",
        "moments": "reset",
        "scale": 1.0,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        density: float = 0.25,
        **options: Unpack[ProjectionKeywords],
    ) -> None:
        """Makes the optimizer.

        Args:
            params: parameters or groups, see `param_groups`.
            lr: learning rate, float or 0-d tensor, read at each step.
            betas: decay rates of the moments.
            eps: added to the bias-corrected sqrt(V).
            weight_decay: decoupled, before the update.
            density: of groups with `is_proj_params=True`, in (0, 1].
            **options: see `ProjectionKeywords`; `capturable` needs `moments="keep"`.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        checks.number("density", density, low=0.0, high=1.0, low_open=True)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "density": density,
        }
        super().__init__(params, defaults, options)

    @classmethod
    def group_keys(cls) -> set[str]:
        """See `LowRankOptimizer.group_keys`."""
        return {*super().group_keys(), "density"}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, see `LowRankOptimizer`; a density becomes a rank ratio, and wins."""
        if isinstance(param_group, dict):
            if param_group.pop("is_proj_params", False) and "rank" not in param_group:
                param_group.setdefault("density", self.defaults["density"])
            if "density" in param_group:
                param_group["rank_ratio_matrix"] = rank_ratio(param_group.pop("density"))
        super().add_param_group(param_group)

    def compose(self, group: Group) -> Composition:
        """AdamW in torch's form and the group's projection."""
        return Composition(adam_rule(group), projection_of(group))


def rank_ratio(density: float) -> float:
    """The `rank_ratio_matrix` of a density: min(m, n) // ratio = floor(density min(m, n)).

    Raises:
        ValueError: the density is not in (0, 1].
    """
    checks.number("density", density, low=0.0, high=1.0, low_open=True)
    # A little less than 1 / density, so that rounding never takes a whole rank away.
    return max(1.0, (1.0 - 1e-12) / density)
