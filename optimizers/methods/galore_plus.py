"""GaLore+: GaLore whose attention heads share a basis, refreshed by randomized SVD.

Liao et al., "GaLore+: Boosting Low-Rank Adaptation for LLMs with Cross-Head Projection" (arXiv
2412.19820). With G_1 ... G_h the heads' blocks of rows of a query, key or value matrix's gradient:

    P = leading left singular vectors of one G_i,    R_j = P^T G_j for every head j
    W_j <- W_j - lr scale P Adam(R_j)

All other projected matrices are GaLore's. Memory per m x n attention matrix: m r / h^2 for P and
2 n r for the moments. The paper's sparse residual is not implemented. Its code isn't public, so
this follows the paper's formulas alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..engine import checks
from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import Group
from ..engine.rule_families import ADAMW
from ..param_groups import param_groups

#: Parts of the names of matrices whose rows are divided among the heads: queries, keys and values.
QUERIES = ("q_proj", "query")
KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value")


def cross_head_groups(
    model: nn.Module, *, heads: int | None = None, fit_on: str = "one", **options: Any
) -> list[Group]:
    """Parameter groups for `GaLorePlusAdamW`, with separate groups of queries, keys and values.

    Args:
        model: as in `param_groups`.
        heads: of all three; by default `num_attention_heads` and `num_key_value_heads` of the
            model's `config`.
        fit_on: "one" head or "all".
        **options: as in `param_groups`.

    Raises:
        ValueError: no number of heads is given or known, or as `param_groups`.
    """
    groups = param_groups(model, **options)
    projected, others = groups[0], groups[1:]
    config = getattr(model, "config", None)
    queries = heads or getattr(config, "num_attention_heads", None)
    keys = heads or getattr(config, "num_key_value_heads", None) or queries
    if queries is None:
        raise ValueError(
            f"heads=None and {type(model).__name__} has no config.num_attention_heads: accepted is "
            "the number of attention heads"
        )
    checks.integer("heads", queries, low=1)
    checks.integer("heads", keys, low=1)
    parted: dict[int | None, list[int]] = {}
    for index, name in enumerate(projected["param_names"]):
        kind = None
        if any(part in name for part in QUERIES):
            kind = queries
        elif any(part in name for part in KEYS_AND_VALUES):
            kind = keys
        parted.setdefault(kind, []).append(index)
    made = []
    for kind, indices in parted.items():
        own = {"projector": "cross_head", "heads": kind, "fit_on": fit_on} if kind else {}
        picked = {key: [projected[key][i] for i in indices] for key in ("params", "param_names")}
        made.append({**projected, **own, **picked})
    return [*made, *others]


@method(
    "galore_plus_adamw",
    paper="2412.19820",
    summary="GaLore+: attention heads share a basis of m r / h^2 entries",
    state="m r + 2 n r",
    groups=cross_head_groups,
)
class GaLorePlusAdamW(LowRankOptimizer):
    """GaLore+ with AdamW; groups with `projector="cross_head"` and `heads` share bases.

    `cross_head_groups(model)` makes such groups.
    """

    rule = ADAMW
    projection_defaults: ClassVar = {"refresh": "randomized"}
