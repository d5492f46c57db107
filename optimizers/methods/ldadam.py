"""LDAdam: Adam in a subspace that moves at every step, with error feedback.

Robert et al., "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics" (arXiv
2410.16103). At each step k, with E the error of the one before (`residuals.error_feedback`):

    A = G + E
    P <- one block power iteration of rho P M / (1 - b1^(k-1)) + (1 - rho) A  (`block_power`)
    M, V follow P, V as a variance (`moments="rotate"`);  then R = P^T A
    M <- b1 M + (1 - b1) R,    V <- b2 V + (1 - b2) R o R
    W <- (1 - lr wd) W - lr P (M / c1) / (sqrt(V) / c2 + eps)
    E <- what the projections of gradient and moment lost

Memory per m x n matrix: min(m, n) r for P, 2 max(m, n) r for the moments, and m n for E: a gradient
more than GaLore. `residual="dropped"` turns the error feedback off. The released code keeps E in
the gradients themselves; here they may be clipped, scaled and set to None as usual. It projects
square matrices on the left, here they are on the right.
"""

from __future__ import annotations

from typing import ClassVar

from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.rule_families import TORCH_ADAMW


@method(
    "ldadam_adamw",
    paper="2410.16103",
    summary="LDAdam: the subspace moves at every step, errors are fed back",
    state="m r + 2 n r + m n",
)
class LDAdamW(LowRankOptimizer):
    """LDAdam with AdamW in torch's form.

    Group keys as `GaLoreAdamW`'s, `update_proj_gap` 1; further `rho`.
    """

    rule = TORCH_ADAMW.but(betas=(0.908, 0.99), weight_decay=0.0, capturable=False)
    projection_defaults: ClassVar = {
        "projector": "block_power",
        "residual": "error_feedback",
        "moments": "rotate",
        "update_proj_gap": 1,
        "scale": 1.0,
    }
