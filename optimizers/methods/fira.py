"""Fira: GaLore with the residual scaled like Adam's update in the subspace, not dropped.

Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?" (arXiv
2410.01623). With GaLore's P, R and N (`galore`), and phi, S and L as in `residuals.norm_scaled`:

    W <- W - s_t (alpha P N + S),    S = phi o (G - beta P R) / L,    then decay

Memory: GaLore's and one fp32 number a matrix (the limiter's norm). The full gradient is needed, so
micro-batches can't be accumulated in the subspace. The default beta = alpha is the released code's;
`residual_scale=1.0` is the paper's, with a residual orthogonal to the subspace.
"""

from __future__ import annotations

from typing import ClassVar

from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.rule_families import ADAMW


@method(
    "fira_adamw",
    paper="2410.01623",
    summary="Fira: GaLore and the scaled residual",
    state="m r + 2 n r",
)
class FiraAdamW(LowRankOptimizer):
    """Fira with AdamW; numerically `fira.FiraAdamW` with `refresh="svd"`, `stagger=False`.

    Group keys as `GaLoreAdamW`'s; `alpha` is another name of `scale`. Further: `residual_scale` and
    `limiter`. Where a left projection keeps the whole long axis (r = n <= m) factors belong to
    columns here, to rows in the released code.
    """

    rule = ADAMW
    projection_defaults: ClassVar = {"residual": "norm_scaled"}
    aliases: ClassVar = {"alpha": "scale"}
