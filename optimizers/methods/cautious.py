"""Cautious Adafactor: factored second moments, a 4-bit momentum, cautious updates.

A composition of this package's own from published parts: the second moment of Adafactor (Shazeer
and Stern, 2018), the mask of the cautious optimizers (Liang et al., 2024, arXiv 2411.16085), and a
momentum in four bits (Li et al., 2023, arXiv 2309.01507). For a hidden matrix of m x n
(`rules.cautious`):

    R <- b2 R + (1 - b2) mean_columns(G o G),    C <- b2 C + (1 - b2) mean_rows(G o G)
    M <- b1 M + (1 - b1) G
    D_ij = M_ij / (1 - b1^t) / (sqrt(R_i C_j / mean(R) / (1 - b2^t)) + eps)
    W <- (1 - lr wd) W - lr D o K / max(mean of K in the row, 1e-3),    K = [D o G > 0]

All else (embeddings, head, norms, biases) gets Adafactor without momentum at its own rate
`plain_lr`: a factored second moment with decay 1 - t^-0.8, updates of RMS 1 at most.

Memory: for a hidden matrix m (ceil(n / 2) + 4 ceil(n / 128)) + 4 (m + n) bytes in four bits, a
fifteenth of AdamW's 8 m n; 4 (m + n) for an embedding or head, of a vector its own size.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import Group
from ..engine.rule_families import CAUTIOUS
from ..param_groups import hidden_apart


def cautious_groups(model: nn.Module, **options: Any) -> list[Group]:
    """`plain_groups`, the hidden matrices with momentum and the others without."""
    hidden, others = hidden_apart(model, "under cautious Adafactor", **options)
    return [hidden, *({**group, "momentum_bits": None} for group in others)]


@method(
    "cautious_adafactor",
    summary="Cautious Adafactor: factored second moments, 4-bit momentum",
    state="m + n, and 17 m n / 32 bytes",
    groups=cautious_groups,
)
class CautiousAdafactor(LowRankOptimizer):
    """Cautious Adam with factored second moments, Adafactor in groups with `momentum_bits=None`.

    `build` gives hidden matrices momentum (`patterns` chooses them), and all else none: then
    `plain_lr` matters, which is best some ten to thirty times `lr`. Only matrices belong in a group
    with momentum.
    """

    projects: ClassVar[bool] = False
    marked_by: ClassVar[str | None] = "momentum_bits"
    rule = CAUTIOUS
