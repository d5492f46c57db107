"""Fira: GaLore whose residual is not dropped but scaled as Adam scales the subspace.

Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?" (arXiv
2410.01623). With GaLore's P, R and N (`galore`), and phi, S and L as in `residuals.norm_scaled`:

    W <- W - s_t (alpha up(N) + S),    S = phi o (G - beta up(R)) / L,    then decay

Memory: GaLore's and one fp32 number a matrix (the limiter's norm). The gradient is needed whole, so
micro-batches can't accumulate in the subspace. The default beta = alpha is the released code's;
`residual_scale=1.0` is the paper's, where the residual has no part in the subspace.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..engine.projected import ProjectedAdamW


class FiraAdamW(ProjectedAdamW):
    """Fira with AdamW; with `refresh="svd"` numerically `fira.FiraAdamW`.

    Group keys as `GaLoreAdamW`'s; `alpha` is another name of `scale`. Further: `residual_scale` and
    `limiter`. Where a left projection keeps the whole long axis (r = n <= m) factors belong to
    columns here, to rows in the released code.
    """

    projection_defaults: ClassVar[Mapping[str, Any]] = {"residual": "norm_scaled"}
    aliases: ClassVar[Mapping[str, str]] = {"alpha": "scale"}
