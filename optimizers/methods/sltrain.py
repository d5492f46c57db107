"""SLTrain: low-rank plus sparse weights, without a stored dense weight.

Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient
pretraining" (arXiv 2406.02214). Each matched layer is W = c B A + S with c = alpha / r and S of a
fixed random support (`layers.sparse_low_rank`); A, B and the values of S are trained by AdamW, or
AdamW with 8-bit moments. `refactor_gap` as in `low_rank`.

Memory per m x n matrix with b-byte parameters and density d: b (r (m + n) + d m n) for weights,
twice that for moments (2 bytes an entry and 8 a block of 256 with 8-bit moments), nothing for the
support, or 4 d m n with `support="stored"`.
"""

from __future__ import annotations

from typing import ClassVar

from ..engine.method import Conversion, method
from ..engine.rule_families import ADAMW_8BIT
from ..layers import FactoredLinear
from ..layers.sparse_low_rank import SparseLowRankLinear
from .low_rank import LowRankAdamW

PAPER = "2406.02214"
LAYERS = Conversion.to_layers(SparseLowRankLinear, "alpha", "density", "support", "init")


@method(
    "sltrain_adamw",
    paper=PAPER,
    summary="SLTrain: low-rank plus sparse weights of density d, no dense weight",
    state="2 (r (m + n) + d m n)",
    weights="r (m + n) + d m n",
    conversion=LAYERS,
)
class SLTrainAdamW(LowRankAdamW):
    """SLTrain with AdamW; all other parameters get plain AdamW."""

    layer_type: ClassVar[type[FactoredLinear]] = SparseLowRankLinear


@method(
    "sltrain_adamw_8bit",
    paper=PAPER,
    summary="SLTrain with 8-bit moments",
    state="2 (r (m + n) + d m n) bytes",
    weights="r (m + n) + d m n",
    conversion=LAYERS,
)
class SLTrainAdamW8bit(SLTrainAdamW):
    """SLTrain with block-wise 8-bit moments; all other parameters get plain 8-bit AdamW."""

    rule = ADAMW_8BIT.but(weight_decay=0.0, capturable=False)
