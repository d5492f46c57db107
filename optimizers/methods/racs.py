"""RACS: gradients scaled by one number for each row and column.

Gong et al., "Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a
Low-Rank Extension" (arXiv 2502.07752). For a hidden matrix, with factors q by row and s by column
of the squared gradient from five rounds of a fixed point (`rules.row_column`):

    s^ <- 0.9 s^ + 0.1 s,    q^ <- 0.9 q^ + 0.1 q
    U = G_ij / sqrt(q^_i s^_j),    U <- U / max(||U|| / (1.01 u), 1),    u <- ||U||
    W <- (1 - lr wd) W - lr scale U

All else gets AdamW, the head included, as in the paper's table. Memory: m + n + 1 entries for an
m x n matrix. As published there is no bias correction: at the first step s^ and q^ are a tenth of
s and q, the update ten times its usual size, which a warm-up of the learning rate takes care of.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..engine import checks
from ..engine.composition import Composition
from ..engine.keywords import Keyword
from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import Group
from ..engine.rule_families import RACS
from ..param_groups import hidden_apart


def racs_groups(model: nn.Module, **options: Any) -> list[Group]:
    """`plain_groups`, the hidden matrices under RACS and the others under AdamW."""
    hidden, others = hidden_apart(model, "under RACS", **options)
    return [{**hidden, "use_racs": True}, *({**group, "use_racs": False} for group in others)]


@method(
    "racs_adamw",
    paper="2502.07752",
    summary="RACS: gradients scaled by rows and columns, AdamW elsewhere",
    state="m + n",
    groups=racs_groups,
)
class RacsAdamW(LowRankOptimizer):
    """RACS on groups with `use_racs`, AdamW on the others.

    `build` gives hidden matrices to RACS (`patterns` chooses them). With `scale` 0.05 an update's
    entries are about 0.05 lr: suitable rates are some twenty times Adam's.
    """

    projects: ClassVar[bool] = False
    marked_by: ClassVar[str | None] = "use_racs"
    rule = RACS
    own_keywords = (Keyword("use_racs", False, "default of the group key."),)

    def compose(self, group: Group) -> Composition:
        """RACS or AdamW, by the group's `use_racs`."""
        checks.choice("use_racs", group["use_racs"], (True, False))
        return super().compose(group)
