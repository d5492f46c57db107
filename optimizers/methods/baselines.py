"""Full-rank baselines under the same contract: AdamW, 8-bit AdamW, Adafactor and Muon.

They ignore the projection keys (`rank`, `update_proj_gap`, ...), so that a comparison only has to
change the name.
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
from ..engine.rule_families import ADAFACTOR, ADAMW_8BIT, MUON, TORCH_ADAMW
from ..param_groups import hidden_apart


@method("adamw", summary="AdamW, full rank", state="2 m n")
class AdamW(LowRankOptimizer):
    """AdamW, numerically `torch.optim.AdamW` (Loshchilov and Hutter, 2019).

    Memory: 2 m n entries of `moments_dtype` (fp32 under half-precision weights by default).
    """

    projects: ClassVar[bool] = False
    rule = TORCH_ADAMW


@method("adamw_8bit", summary="AdamW with 8-bit moments, full rank", state="2 m n bytes")
class AdamW8bit(LowRankOptimizer):
    """AdamW with block-wise 8-bit moments (Dettmers et al., 2022).

    Memory: 2 (m n + 4 ceil(m n / 256)) bytes.
    """

    projects: ClassVar[bool] = False
    rule = ADAMW_8BIT


@method("adafactor", summary="Adafactor, full rank", state="m + n")
class Adafactor(LowRankOptimizer):
    """Adafactor, numerically transformers' (Shazeer and Stern, 2018).

    Memory: m + n fp32 entries, plus m n with `beta1`.
    """

    projects: ClassVar[bool] = False
    rule = ADAFACTOR


def muon_groups(model: nn.Module, **options: Any) -> list[Group]:
    """`plain_groups`, the hidden matrices under Muon and the others under AdamW.

    Raises:
        ValueError: there is no such matrix that is trained.
    """
    hidden, others = hidden_apart(model, "under Muon", **options)
    return [{**hidden, "use_muon": True}, *({**group, "use_muon": False} for group in others)]


@method("muon", summary="Muon on hidden matrices, AdamW elsewhere", state="m n", groups=muon_groups)
class Muon(LowRankOptimizer):
    """Muon on groups with `use_muon`, AdamW on the others (Jordan et al., 2024).

    Only hidden matrices belong in a group with `use_muon`. Memory: m n entries for a matrix under
    Muon, 2 m n under AdamW.
    """

    projects: ClassVar[bool] = False
    marked_by: ClassVar[str | None] = "use_muon"
    rule = MUON
    own_keywords = (Keyword("use_muon", False, "default of the group key."),)

    def compose(self, group: Group) -> Composition:
        """Muon or AdamW, by the group's `use_muon`."""
        checks.choice("use_muon", group["use_muon"], (True, False))
        return super().compose(group)
