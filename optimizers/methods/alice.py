"""Alice: Adam in a subspace of leading and random directions, and a scaled residual.

Gong et al., "Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a
Low-Rank Extension" (arXiv 2502.07752). With U the basis of `projectors.switched`, s = U^T G, and S
the compensation of `residuals.column_scaled`:

    M <- b1 M + (1 - b1) s,    V <- b2 V + (1 - b2) s o s,    no bias correction
    W <- W - lr scale (U M / (sqrt(V) + eps) + compensation_scale S),    then decay

U is renewed every `update_proj_gap` steps, and M and V are kept. `tracking=False` is Alice-0, which
doesn't average the covariance of s.

Memory per m x n matrix: min(m, n) r for U, 2 max(m, n) r for the moments, r^2 for the covariance (0
for Alice-0), and one number for each column of the projected gradient. All but attention and MLP
gets AdamW.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import Group
from ..engine.rule_families import ADAMW
from ..param_groups import is_sized, param_groups


def alice_groups(model: nn.Module, **options: Any) -> list[Group]:
    """`param_groups`, with Adam's usual decay rates and bias correction where nothing is projected.

    An explicit `betas` or `correct_bias` of the optimizer is that of the projected matrices.
    """
    usual = {"betas": (0.9, 0.999), "correct_bias": True}
    groups = param_groups(model, **options)
    return [group if is_sized(group) else {**group, **usual} for group in groups]


@method(
    "alice_adamw",
    paper="2502.07752",
    summary="Alice: leading and random directions, and a scaled residual",
    state="m r + 2 n r + r r + n",
    groups=alice_groups,
)
class AliceAdamW(LowRankOptimizer):
    """Alice with AdamW; `tracking=False` is Alice-0.

    Group keys as `GaLoreAdamW`'s; further `leading_share`, `tracking`, `tracking_beta`,
    `compensation_scale`, `compensation_beta` and `limiter`. `build` gives all but the projected
    matrices AdamW with betas (0.9, 0.999) and bias correction.
    """

    rule = ADAMW.but(betas=(0.9, 0.9), correct_bias=False)
    projection_defaults: ClassVar = {
        "projector": "switched",
        "residual": "column_scaled",
        "scale": 0.3,
    }
