"""Online Subspace Descent: GaLore whose subspace learns with every gradient, without an SVD.

Liang et al., "Memory-Efficient LLM Training with Online Subspace Descent", NeurIPS 2024 (arXiv
2408.12857). P starts as the first gradient's leading singular vectors; then at each step, with R
and N as in `galore`:

    W <- W - lr scale P N    (or N P^T),    then decay
    P <- P - lr_P OptimizerOfP(dL/dP),    L(P) = ||P P^T Ghat - Ghat||^2,    see `projectors.online`

The moments of R are kept as they are. Memory per m x n matrix: GaLore's, and 2 min(m, n) r for P's
AdamW (Lion: half of that, SGD: none).

Quirks of the released code, which are the defaults here, and what mends them: no penalty that keeps
P orthonormal, the paper's is `orthogonality=0.1`; lr_P = lr / (lr_0 update_proj_gap) has nothing to
do with the size of lr, the paper's is `online_lr=5 * lr`; weight decay 0.01 on P under AdamW
(`online_optimizer="sgd"` has none); Lion takes its sign after the back-projection, where `scale`
loses its effect (`sign="subspace"` takes it before). P's optimizer state is part of `state_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine import checks
from ..engine.composition import Composition
from ..engine.geometry import PROJ_TYPES
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import Group, ProjectionKeywords, check_lr
from ..engine.projected import ProjectedAdafactor, ProjectedAdamW, ProjectedAdamW8bit, ProjectedLion
from ..engine.rule_factories import lion_rule
from ..residuals import Dropped, SignedBack

_GALORE = {"projector": "singular", "schedule": "every"}

#: What the released code's values of `proj_type` stand for.
OFFICIAL_PROJ_TYPES: dict[str, dict[str, Any]] = {
    "continuous": {"projector": "online", "online_optimizer": "adamw", "schedule": "once"},
    "continuous_sgd": {"projector": "online", "online_optimizer": "sgd", "schedule": "once"},
    "continuous_lion": {"projector": "online", "online_optimizer": "lion", "schedule": "once"},
    "continuous_adam8bit": {
        "projector": "online",
        "online_optimizer": "adam8bit",
        "schedule": "once",
    },
    "random": {"projector": "random", "distribution": "orthonormal", "schedule": "every"},
}


class OnlineSubspace(LowRankOptimizer):
    """What the four classes share: the online projector and the released code's group keys.

    Further group keys: `online_optimizer` ("adamw", "sgd", "lion", "adam8bit"), `online_lr`,
    `orthogonality`. `proj_type` may be one of `OFFICIAL_PROJ_TYPES`; "std", "left", "right" and
    "full" mean GaLore as in the released code, unless the group names a `projector`. `names` (for
    the released code's logging) has no effect.
    """

    projection_defaults: ClassVar[Mapping[str, Any]] = {"projector": "online", "schedule": "once"}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, see `LowRankOptimizer`; its learning rate is recorded as `base_lr`."""
        if isinstance(param_group, dict):
            _translate(param_group)
            lr = param_group.get("lr", self.defaults["lr"])
            if lr is not None:
                check_lr(lr)
                param_group.setdefault("base_lr", float(lr))
        super().add_param_group(param_group)


def _translate(group: Group) -> None:
    """In place: the released code's `proj_type` in our options."""
    proj_type = group.get("proj_type")
    if proj_type in OFFICIAL_PROJ_TYPES:
        for name, value in OFFICIAL_PROJ_TYPES[proj_type].items():
            if group.setdefault(name, value) != value:
                raise ValueError(
                    f"proj_type={proj_type!r} with {name}={group[name]!r}: accepted is {value!r}"
                )
        group["proj_type"] = "std"
    elif proj_type in PROJ_TYPES and "projector" not in group:
        for name, value in _GALORE.items():
            group.setdefault(name, value)


class OnlineSubspaceAdamW(OnlineSubspace, ProjectedAdamW):
    """Online Subspace Descent with AdamW; with `refresh="svd"` numerically the released class."""


class OnlineSubspaceAdamW8bit(OnlineSubspace, ProjectedAdamW8bit):
    """Online Subspace Descent with block-wise 8-bit Adam moments; P's optimizer is as given."""


class OnlineSubspaceAdafactor(OnlineSubspace, ProjectedAdafactor):
    """Online Subspace Descent with Adafactor; keywords as `GaLoreAdafactor`'s."""


class OnlineSubspaceLion(OnlineSubspace, ProjectedLion):
    """Online Subspace Descent with Lion; weight decay acts after the update."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        sign: str = "weight",
        **options: Unpack[ProjectionKeywords],
    ) -> None:
        """Makes the optimizer.

        Args:
            params: parameters or groups, see `param_groups`.
            lr: learning rate, float or 0-d tensor, read at each step.
            betas: decay rates of the update and of the momentum.
            weight_decay: decoupled, after the update.
            sign: where projected matrices take it: "weight" is after the back-projection (the
                released code; every entry of the weight moves by lr, in all directions), "subspace"
                before it (the step stays in the subspace and is multiplied by `scale`).
            **options: see `ProjectionKeywords`.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "sign": sign}
        LowRankOptimizer.__init__(self, params, defaults, options)

    def compose(self, group: Group) -> Composition:
        """Lion and the group's projection."""
        checks.choice("sign", group["sign"], ("weight", "subspace"))
        projection = super().compose(group).projection
        late = (
            projection is not None
            and group["sign"] == "weight"
            and isinstance(projection.residual, Dropped)
        )
        rule = lion_rule(group, decay_first=False, signed=not late)
        if late:
            assert projection is not None
            residual = SignedBack(scale=projection.residual.scale)
            projection = replace(projection, residual=residual)
        return Composition(rule, projection)
