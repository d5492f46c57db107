"""Plain low-rank factors, W = c B A, and the refactorisation that keeps them balanced.

What SLTrain and others are compared with ("Low-Rank" in GaLore's table 2; Kamalakara et al., 2022).
With `refactor_gap` the factors are, at the end of every so many steps,

    B A = U D V^T,   B <- U sqrt(D),   A <- sqrt(D) V^T

and their moments and bias corrections start anew: weight refactorisation and momentum reset of
Glentis et al., "Scalable Parameter and Memory Efficient Pretraining for LLM" (arXiv 2505.22922).

Memory per m x n matrix with b-byte parameters: b r (m + n) for weights, twice that for moments.
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine import checks
from ..engine.composition import Composition
from ..engine.options import CommonOptions, Group
from ..engine.rule_factories import adam_rule
from ..layers import FactoredLinear, LowRankLinear
from ..layers.base import wide_dtype
from ..layers.events import LayerEvent
from ..layers.optimizer import FactoredAdamW
from ..rules import UpdateRule


class LowRankAdamW(FactoredAdamW):
    """AdamW on plain low-rank factors; all other parameters get plain AdamW."""

    layer_type: ClassVar[type[FactoredLinear]] = LowRankLinear
    event_options: ClassVar[tuple[str, ...]] = ("refactor_gap",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        refactor_gap: int | None = None,
        own: dict[str, Any] | None = None,
        **options: Unpack[CommonOptions],
    ) -> None:
        """Makes the optimizer.

        Args:
            params: `param_groups(model)` of a converted model.
            lr: learning rate, float or 0-d tensor, read at each step.
            betas: decay rates of the moments.
            eps: added to sqrt(V) after bias correction.
            weight_decay: decoupled, before the update.
            refactor_gap: steps between refactorisations (200 in the paper), None for none.
            own: further options, set by subclasses.
            **options: see `CommonOptions`.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        own = {"refactor_gap": refactor_gap, **(own or {})}
        super().__init__(params, lr, betas, eps, weight_decay, own, **options)

    def compose(self, group: Group) -> Composition:
        """The rules, and the checked schedule."""
        if group["refactor_gap"] is not None:
            checks.integer("refactor_gap", group["refactor_gap"], low=1)
        return super().compose(group)

    def factor_rule(self, group: Group) -> UpdateRule:
        """Adam whose bias corrections start anew at each refactorisation."""
        return adam_rule(group, restarts=True)

    def _needs_layers(self, group: Group) -> bool:
        return group["refactor_gap"] is not None

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
    """In place: B <- U sqrt(D), A <- sqrt(D) V^T from the SVD of B A, which stays.

    Factors that are not finite stay as they are.

    Args:
        b_mr: B, m x r.
        a_rn: A, r x n.
    """
    wide = wide_dtype(b_mr)
    q_b, r_b = torch.linalg.qr(b_mr.to(wide))
    q_a, r_a = torch.linalg.qr(a_rn.to(wide).mT)
    core = r_b @ r_a.mT
    if not bool(core.isfinite().all()):
        return
    u, d, vh = torch.linalg.svd(core)
    root = d.sqrt()
    b_mr.copy_((q_b @ u) * root)
    a_rn.copy_(root.unsqueeze(1) * (vh @ q_a.mT))
