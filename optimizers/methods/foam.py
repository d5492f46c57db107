"""FOAM: Adam with one entry of moments for each block of neighbours in a row.

"FOAM: Blocked State Folding for Memory-Efficient LLM Training" (arXiv 2512.07112). With blocks of
2^l neighbours in a row, F the mean of a block and E its repetition, D = G - E F(G):

    M <- b1 M + (1 - b1) F(G),    V <- b2 V + (1 - b2) F(G o G)
    W <- (1 - lr wd) W - lr scale (E M / c1 + c D) / (sqrt(E V / c2^2 + c^2 D o D) + eps)

with Adam's bias corrections c1, c2. `fold="haar"` is GWT ("Gradient Wavelet Transform", arXiv
2501.07237): Adam on the Haar approximations, details divided by their block's sqrt(V), and a limit
on the update's growth (`rules.folded`).

Memory: 2 m n / 2^l for a hidden matrix, l = `fold_level` (2), all else gets AdamW. Blocks lie in
rows, so a matrix that is spread by rows needs no communication. The last block of a row whose
length isn't a multiple of 2^l is shorter. Under `fold="haar"` a block whose approximation happens
to be near zero magnifies its details in the first steps, before V averages several of them, and the
limit has nothing to compare the first step with: begin with a warm-up.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import Group
from ..engine.rule_families import FOAM
from ..param_groups import hidden_apart


def foam_groups(model: nn.Module, **options: Any) -> list[Group]:
    """`plain_groups`, the hidden matrices with folded moments and the others under AdamW."""
    hidden, others = hidden_apart(model, "under FOAM", **options)
    return [hidden, *({**group, "fold": None} for group in others)]


@method(
    "foam_adamw",
    paper="2512.07112",
    summary="FOAM: Adam with moments folded by blocks of 2^l entries (l = 2)",
    state="2 m n / 4",
    groups=foam_groups,
)
class FoamAdamW(LowRankOptimizer):
    """AdamW with folded moments, plain AdamW in groups with `fold=None`.

    `build` folds hidden matrices (`patterns` chooses them) and gives all else to AdamW. Group keys:
    `fold` and the other keywords. The paper's learning rate is 0.01.
    """

    projects: ClassVar[bool] = False
    marked_by: ClassVar[str | None] = "fold"
    rule = FOAM
