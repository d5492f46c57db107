"""GaLore: Adam or Adafactor on the gradient's projection to its leading singular subspace.

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024
(arXiv 2403.03507). For W of m x n, P is every `update_proj_gap` steps G's leading singular vectors:

    R = P^T G  (m < n)    or    R = G P  (m >= n)
    N = Adam(R) with moments in the subspace, kept as they are when P changes
    W <- W - lr scale P N    or    W <- W - lr scale N P^T,    then decay

Memory per m x n matrix: min(m, n) r for P and 2 max(m, n) r for the moments, in the parameter's
precision; `GaLoreAdamW8bit` keeps the moments in 8 bits, `GaLoreAdafactor` factors the second.
The defaults are the official code's; with `refresh="svd"` so are the numbers.
"""

from __future__ import annotations

from ..engine.projected import ProjectedAdafactor, ProjectedAdamW, ProjectedAdamW8bit


class GaLoreAdamW(ProjectedAdamW):
    """GaLore with AdamW; with `refresh="svd"` numerically `galore_torch.GaLoreAdamW`.

    Groups with `rank` are projected; further group keys: `update_proj_gap`, `scale`, `proj_type`
    and those of `ProjectionKeywords`. All other groups get plain AdamW.
    """


class GaLoreAdamW8bit(ProjectedAdamW8bit):
    """GaLore with block-wise 8-bit Adam moments."""


class GaLoreAdafactor(ProjectedAdafactor):
    """GaLore with Adafactor; with `refresh="svd"` numerically the official class.

    Constructor keywords are transformers' Adafactor's; an explicit `lr` implies
    `relative_step=False`.
    """
