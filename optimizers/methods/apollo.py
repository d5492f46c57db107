"""APOLLO: the gradient scaled by Adam's step sizes in a random subspace; SGD's memory at rank 1.

Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", MLSys 2025 (arXiv 2412.05270). With
R the projected gradient, N = Adam(R) in transformers' form (details in
`residuals.scaled_gradient`):

    phi = ||N|| / ||R|| by channel or by tensor,    S = sqrt(scale) phi o G, limited to grow by 1 %
    W <- W - s_t S,    then decay

P is redrawn every `update_proj_gap` steps and regenerated from a seed. Memory per m x n matrix:
2 max(m, n) r for the moments and one fp32 number; `projector="singular"` adds min(m, n) r for P.
APOLLO-Mini has rank 1 and one factor a tensor: 2 max(m, n) entries.

Quirk of the released code, which is the default here: `scale` acts through its square root.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..engine import checks
from ..engine.keywords import Keyword
from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import Group
from ..engine.rule_families import ADAMW
from ..param_groups import param_groups

PAPER = "2412.05270"
#: Our values of the released code's `proj`.
OFFICIAL_PROJECTORS = {"random": "random", "svd": "singular"}
_LAST = "no_deprecation_warning"


@method(
    "apollo_adamw",
    paper=PAPER,
    summary="APOLLO: the gradient scaled by Adam's steps in a random subspace",
    state="2 n r",
    spellings=("APOLLOAdamW",),
)
class ApolloAdamW(LowRankOptimizer):
    """APOLLO with AdamW; numerically the released class with `proj="svd"`, `refresh="svd"` and
    `stagger=False`.

    Group keys: `rank`, `proj` ("random" or "svd", another name for `projector`), `proj_type`,
    `scale_type` ("channel" or "tensor"), `scale`, `update_proj_gap`, `scale_front`, and `limiter`
    (None is the released code's `disable_nl`).
    """

    rule = ADAMW
    projection_defaults: ClassVar = {"projector": "random", "residual": "scaled", "scale": 1.0}
    own_keywords = (
        Keyword("scale_front", False, "scale before the limiter.", "given", before=_LAST),
        Keyword(
            "disable_nl",
            False,
            "True is `limiter=None`: no bound on growth.",
            "given",
            before=_LAST,
        ),
    )
    foreign_keys = ("proj", "disable_nl")

    @classmethod
    def translate(cls, options: Group, defaults: Group | None) -> Group:
        """`proj` as `projector`, `disable_nl` as `limiter`."""
        options = dict(options)
        if "proj" in options:
            proj = options.pop("proj")
            checks.choice("proj", proj, OFFICIAL_PROJECTORS)
            if "projector" in options:
                raise ValueError(
                    f"proj={proj!r} with projector={options['projector']!r}: these are two "
                    "names of one thing, accepted is one of them"
                )
            options["projector"] = OFFICIAL_PROJECTORS[proj]
        if "disable_nl" in options:
            disabled = options.pop("disable_nl")
            checks.choice("disable_nl", disabled, (True, False))
            if disabled and options.get("limiter") is not None:
                raise ValueError(
                    f"disable_nl=True with limiter={options['limiter']!r}: accepted is one of them"
                )
            if disabled:
                options["limiter"] = None
        return options


def rank_one_groups(model: nn.Module, **options: Any) -> list[Group]:
    """`param_groups` with rank 1 unless another is given."""
    return param_groups(model, **{"rank": 1, **options})


@method(
    "apollo_mini_adamw",
    paper=PAPER,
    summary="APOLLO-Mini: rank 1 by default",
    state="2 n r",
    groups=rank_one_groups,
)
class ApolloMiniAdamW(ApolloAdamW):
    """APOLLO-Mini: one factor a tensor, `scale` 128; meant for rank 1, which `build` gives it."""

    projection_defaults: ClassVar = {
        **ApolloAdamW.projection_defaults,
        "scale": 128.0,
        "scale_type": "tensor",
    }
