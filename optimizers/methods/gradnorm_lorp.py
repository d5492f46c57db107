"""GradNormLoRP: GaLore on the directions of a weight's rows, Adam on their lengths.

Huang et al., "Gradient Weight-Normalized Low-Rank Projection for Efficient LLM Training" (arXiv
2412.19616). Rows are w_i = g_i v_i / ||v_i||; with P, R = P^T G, M and V as in GaLore and s the
step size with bias corrections:

    v <- W - s scale P M / (sqrt(V) + eps)
    g <- ||w|| - s magnitude_scale M_g / (sqrt(V_g) + eps)
    w_i <- g_i v_i / ||v_i||,    then decay

where M_g and V_g are of d_i = <G_i, w_i> / ||w_i|| (`residuals.weight_normalised`). Memory per
m x n matrix: GaLore's m r + 2 n r (m <= n), and two numbers for each row.

By the class for pretraining of the released code (LowRankWeightNormAdamW), which has the row as the
unit, projects G itself, not its part orthogonal to w_i, and begins each step with g_i = ||v_i||. It
stores a copy v of every weight, m n entries more, which goes on from v where we go on from W: v and
W have the same rows up to their lengths. It normalises vectors too; here all that isn't projected
gets AdamW. The paper's form for fine-tuning, W = M (W_0 + I J) / ||W_0 + I J||, isn't here. The
paper's text was not at hand: its constants and results are unverified. `magnitude_scale` is ours:
on a LLaMA of 1M parameters (200 steps of the standard library's text, one seed) perplexity was
103.6 with 0.1, 104.7 with 0.5, and 103.7 with GaLore.
"""

from __future__ import annotations

from typing import ClassVar

from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.rule_families import ADAMW


@method(
    "gradnorm_lorp_adamw",
    paper="2412.19616",
    summary="GradNormLoRP: GaLore on directions of rows, Adam on their lengths",
    state="m r + 2 n r + 2 m",
)
class GradNormLoRPAdamW(LowRankOptimizer):
    """GradNormLoRP with AdamW.

    Group keys as `GaLoreAdamW`'s; further `magnitude_scale`.
    """

    rule = ADAMW.but(capturable=False)
    projection_defaults: ClassVar = {"residual": "weight_normalised"}
