"""Plain low-rank factors, W = c B A, and the refactorisation that keeps them balanced.

The baseline of SLTrain and others ("Low-Rank" in GaLore's table 2; Kamalakara et al., 2022).
With `refactor_gap` the factors are refactorised every `refactor_gap` steps,

    B A = U D V^T,   B <- U sqrt(D),   A <- sqrt(D) V^T

and their moments and bias corrections are reset: weight refactorisation and momentum reset of
Glentis et al., "Scalable Parameter and Memory Efficient Pretraining for LLM" (arXiv 2505.22922).

Memory per m x n matrix with b-byte parameters: b r (m + n) for weights, twice that for moments.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.chunks import wide_dtype
from ..engine.composition import Composition
from ..engine.keywords import Keyword
from ..engine.method import Conversion, method
from ..engine.options import Group
from ..layers import FactoredLinear, LowRankLinear
from ..layers.events import LayerEvent
from ..layers.optimizer import FactoredAdamW
from ..layers.spread import held_rows
from ..rules import UpdateRule


@method(
    "low_rank_adamw",
    summary="plain low-rank factors, the baseline of the methods that replace layers",
    state="2 r (m + n)",
    weights="r (m + n)",
    conversion=Conversion.to_layers(LowRankLinear, "alpha", alpha=32.0, keep_frozen=False),
)
class LowRankAdamW(FactoredAdamW):
    """AdamW on plain low-rank factors; all other parameters get plain AdamW."""

    layer_type: ClassVar[type[FactoredLinear]] = LowRankLinear
    event_options: ClassVar[tuple[str, ...]] = ("refactor_gap",)
    own_keywords: ClassVar[tuple[Keyword, ...]] = (
        Keyword(
            "refactor_gap",
            None,
            "steps between refactorisations (200 in the paper), None for none.",
        ),
    )

    def compose(self, group: Group) -> Composition:
        """The rules, and the checked schedule."""
        if group["refactor_gap"] is not None:
            checks.integer("refactor_gap", group["refactor_gap"], low=1)
        return super().compose(group)

    def factor_rule(self, group: Group) -> UpdateRule:
        """Adam whose bias corrections restart at each refactorisation."""
        return self.rule.make(group, restarts=True)

    def _needs_layers(self, group: Group) -> bool:
        return group["refactor_gap"] is not None

    def _patience(self, group: Group) -> float:
        return float(group["refactor_gap"])

    def _after(self) -> None:
        due = [link for link in self._links if link.group["refactor_gap"] is not None]
        due = [link for link in due if self._passed(link, "refactor_gap") > self._events(link)]
        for link in due:
            count = self._passed(link, "refactor_gap")
            refactor_(link.layer.lora_b, link.layer.lora_a)  # type: ignore[arg-type]
            for param in link.factors():
                self.state[param]["events"] = count
            for param in link.factors()[:2]:
                self._renew(param, self.factor_rule(link.group))
        if due:
            self._call_event_hooks(LayerEvent("refactor", self._steps(due[0]), len(due)))


@torch.no_grad()
def refactor_(b_mr: Tensor, a_rn: Tensor) -> None:
    """In place: B <- U sqrt(D), A <- sqrt(D) V^T from the SVD of B A, which is unchanged.

    Factors that are not finite are left unchanged.

    Args:
        b_mr: B, m x r; as A it may be spread over processes, which gather both.
        a_rn: A, r x n.
    """
    wide, b, a = wide_dtype(b_mr), held_rows(b_mr), held_rows(a_rn)
    q_b, r_b = torch.linalg.qr(b.whole().to(wide))
    q_a, r_a = torch.linalg.qr(a.whole().to(wide).mT)
    core = r_b @ r_a.mT
    if not bool(core.isfinite().all()):
        return
    u, d, vh = torch.linalg.svd(core)
    root = d.sqrt()
    b.fill((q_b @ u) * root)
    a.fill(root.unsqueeze(1) * (vh @ q_a.mT))
