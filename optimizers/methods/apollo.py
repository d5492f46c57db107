"""APOLLO: the gradient scaled by Adam's step sizes in a random subspace; SGD's memory at rank 1.

Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", MLSys 2025 (arXiv 2412.05270). With
R the projected gradient, N = Adam(R) in transformers' form (details in
`residuals.scaled_gradient`):

    phi = ||N|| / ||R|| by channel or by tensor,    S = sqrt(scale) phi o G, limited to grow by 1 %
    W <- W - s_t S,    then decay

P is redrawn every `update_proj_gap` steps and regenerated from a seed. Memory per m x n matrix:
2 max(m, n) r for the moments and one fp32 number; `projector="singular"` adds min(m, n) r for P.
APOLLO-Mini has rank 1 and one factor a tensor: 2 max(m, n) entries.

Quirk of the released code, which is the default here: `scale` acts through its square root.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine import checks
from ..engine.options import Group, ProjectionKeywords
from ..engine.projected import ProjectedAdamW

#: What the released code's values of `proj` stand for.
OFFICIAL_PROJECTORS = {"random": "random", "svd": "singular"}


class ApolloAdamW(ProjectedAdamW):
    """APOLLO with AdamW; with `proj="svd"` and `refresh="svd"` numerically the released class.

    Group keys: `rank`, `proj` ("random" or "svd", another name for `projector`), `proj_type`,
    `scale_type` ("channel" or "tensor"), `scale`, `update_proj_gap`, `scale_front`, and `limiter`
    (None is the released code's `disable_nl`).
    """

    projection_defaults: ClassVar[Mapping[str, Any]] = {
        "projector": "random",
        "residual": "scaled",
        "scale": 1.0,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        disable_nl: bool = False,
        no_deprecation_warning: bool = True,
        **options: Unpack[ProjectionKeywords],
    ) -> None:
        """Makes the optimizer.

        Args:
            params: parameters or groups, see `param_groups`.
            lr: learning rate, float or 0-d tensor, read at each step.
            betas: decay rates of the moments.
            eps: added to sqrt(V) before bias correction (transformers' AdamW).
            weight_decay: decoupled, after the update.
            correct_bias: False leaves the bias corrections out.
            disable_nl: True is `limiter=None`, no bound on the update's growth.
            no_deprecation_warning: accepted for the official signature; no effect.
            **options: see `ProjectionKeywords`; `scale_front` is one.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        keywords: dict[str, Any] = {**options}
        _translate_limiter(keywords | {"disable_nl": disable_nl}, keywords)
        super().__init__(params, lr, betas, eps, weight_decay, correct_bias, **keywords)

    @classmethod
    def group_keys(cls) -> set[str]:
        """See `LowRankOptimizer.group_keys`."""
        return {*super().group_keys(), "proj"}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, see `LowRankOptimizer`; `proj` and `disable_nl` are translated."""
        if isinstance(param_group, dict):
            if "proj" in param_group:
                proj = param_group["proj"]
                checks.choice("proj", proj, OFFICIAL_PROJECTORS)
                if "projector" in param_group:
                    raise ValueError(
                        f"proj={proj!r} with projector={param_group['projector']!r}: these are two "
                        "names of one thing, accepted is one of them"
                    )
                param_group["projector"] = OFFICIAL_PROJECTORS[param_group.pop("proj")]
            if "disable_nl" in param_group:
                _translate_limiter(param_group, param_group)
                del param_group["disable_nl"]
        super().add_param_group(param_group)


def _translate_limiter(given: Mapping[str, Any], target: Group) -> None:
    checks.choice("disable_nl", given["disable_nl"], (True, False))
    if given["disable_nl"]:
        if given.get("limiter") is not None:
            raise ValueError(
                f"disable_nl=True with limiter={given['limiter']!r}: accepted is one of them"
            )
        target["limiter"] = None


class ApolloMiniAdamW(ApolloAdamW):
    """APOLLO-Mini: one factor a tensor, `scale` 128; meant for rank 1, which `build` gives it."""

    projection_defaults: ClassVar[Mapping[str, Any]] = {
        **ApolloAdamW.projection_defaults,
        "scale": 128.0,
        "scale_type": "tensor",
    }
