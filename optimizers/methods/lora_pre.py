"""LoRA-Pre: Adam whose moments are kept as low-rank factors, of the whole gradient.

"LoRA-Pre" (arXiv 2602.24283): an exponential average is a regression that learns online, so its
result may be learnt in a factored form. With M ~ B A and sqrt(V) ~ B' A' (m x r and r x n each):

    M = b1 B A + (1 - b1) G,    V = b2 (B' A')^2 + (1 - b2) G^2
    B <- (1 - g1) B + g1 G A^T (A A^T)^-1,    A <- (1 - g1) A + g1 (B^T B)^-1 B^T G
    W <- (1 - lr wd) W - lr M / c1 / (sqrt(V) / c2 + eps)

with sqrt(b1) = 1 - g1; B' and A' alike from |G|, with b2^(1/4) = 1 - g2. Details, ridge and start
are in `rules.factored_moments`. There is no projection, no basis and no refresh. All but hidden
matrices gets AdamW.

Memory: 2 r (m + n) for an m x n matrix. A step costs 12 m n r flops, three times GaLore's at equal
rank; the paper's ranks are an eighth of GaLore's and less. As published, both factors follow from
the former ones, and M and V are formed from these, so that the first step is Adam's.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import Group
from ..engine.rule_families import LORA_PRE
from ..param_groups import DEFAULT_RANK, hidden_apart


def factored_moment_groups(
    model: nn.Module, rank: int = DEFAULT_RANK, **options: Any
) -> list[Group]:
    """`plain_groups`, the hidden matrices with a rank; all else gets AdamW."""
    hidden, others = hidden_apart(model, "under LoRA-Pre", **options)
    return [{**hidden, "rank": rank}, *others]


@method(
    "lora_pre_adamw",
    paper="2602.24283",
    summary="LoRA-Pre: Adam whose moments are low-rank factors",
    state="2 r (m + n)",
    groups=factored_moment_groups,
)
class LoRAPreAdamW(LowRankOptimizer):
    """AdamW with moments as factors in groups with `rank`, plain AdamW in the others.

    `build` gives hidden matrices a rank (128 by default; `patterns` chooses them).
    """

    projects: ClassVar[bool] = False
    marked_by: ClassVar[str | None] = "rank"
    hidden_keys: ClassVar[tuple[str, ...]] = ("rank",)
    rule = LORA_PRE
