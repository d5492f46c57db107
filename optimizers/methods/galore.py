"""GaLore: Adam or Adafactor on the gradient's projection to its leading singular subspace.

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024
(arXiv 2403.03507). For W of m x n, P is every `update_proj_gap` steps G's leading singular vectors:

    R = P^T G  (m < n)    or    R = G P  (m >= n)
    N = Adam(R) with moments in the subspace, unchanged when P changes
    W <- W - lr scale P N    or    W <- W - lr scale N P^T,    then decay

P is the projection matrix, called the basis elsewhere. Memory per m x n matrix: min(m, n) r for P
in the parameter's precision and 2 max(m, n) r for the moments (fp32 under half-precision weights);
`GaLoreAdamW8bit` keeps the moments in 8 bits, `GaLoreAdafactor` factors the second. The defaults
are the official code's but for how P is computed: with `refresh="svd", stagger=False` so are the
numbers. By default P is exact by another way ("eigh") on a CPU, and on CUDA found by a randomized
method, with the refreshes of the matrices spread over the steps (`engine.options`).
"""

from __future__ import annotations

from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.rule_families import ADAFACTOR, ADAMW, ADAMW_8BIT

PAPER = "2403.03507"


@method("galore_adamw", paper=PAPER, summary="GaLore", state="m r + 2 n r")
class GaLoreAdamW(LowRankOptimizer):
    """GaLore with AdamW; numerically the official class with `refresh="svd"`, `stagger=False`.

    Groups with `rank` are projected; further group keys: `update_proj_gap`, `scale`, `proj_type`
    and the keywords about projection. All other groups get plain AdamW.
    """

    rule = ADAMW


@method(
    "galore_adamw_8bit",
    paper=PAPER,
    summary="GaLore with 8-bit moments",
    state="m r, and 2 n r bytes",
)
class GaLoreAdamW8bit(LowRankOptimizer):
    """GaLore with block-wise 8-bit Adam moments.

    The rule is bitsandbytes' Adam; the quantiser is our own unless `quantizer="bitsandbytes"`, so
    that bitsandbytes is not needed and matrices of any size can be trained.
    """

    rule = ADAMW_8BIT


@method("galore_adafactor", paper=PAPER, summary="GaLore with Adafactor", state="m r + n + r")
class GaLoreAdafactor(LowRankOptimizer):
    """GaLore with Adafactor; numerically the official class with `refresh="svd"`, `stagger=False`.

    The keywords are transformers' Adafactor's; an explicit `lr` implies `relative_step=False`.
    """

    rule = ADAFACTOR
