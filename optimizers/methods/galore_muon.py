"""Muon in GaLore's subspace: the projected momentum is orthogonalised.

With GaLore's P and R (`galore`) and Muon's momentum and Newton-Schulz iteration (`rules.muon`):

    M <- momentum M + (1 - momentum) R,    X = orthogonalize(M or its Nesterov look-ahead)
    W <- (1 - lr wd) W - lr s scale up(X)

X has r singular values near 1, so all r directions of the subspace move alike, whatever the share
of the gradient that each carries. Muon: Jordan et al., 2024; the projection: Zhao et al., arXiv
2403.03507. Memory per m x n matrix: min(m, n) r for P and max(m, n) r for M.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine.composition import Composition
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import Group, ProjectionKeywords
from ..engine.rule_factories import adam_rule, muon_rule
from ..engine.strategies import projection_of


class GaLoreMuon(LowRankOptimizer):
    """Muon on the projected gradient of groups with `rank`, AdamW on all other groups."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        adjust_lr: str = "original",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        **options: Unpack[ProjectionKeywords],
    ) -> None:
        """Makes the optimizer.

        Args:
            params: parameters or groups, see `param_groups`.
            lr: learning rate of both rules (give groups their own `lr` to part them).
            momentum: Muon's momentum.
            nesterov: Nesterov momentum.
            ns_steps: Newton-Schulz iterations, at least 1.
            weight_decay: decoupled, before the update.
            adjust_lr: as in `Muon`, by the projected gradient's shape.
            betas: AdamW's decay rates.
            eps: AdamW's eps.
            **options: see `ProjectionKeywords`.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "weight_decay": weight_decay,
            "adjust_lr": adjust_lr,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults, options)

    def compose(self, group: Group) -> Composition:
        """Muon in the subspace, AdamW elsewhere."""
        projection = projection_of(group)
        rule = muon_rule(group)
        return Composition(adam_rule(group) if projection is None else rule, projection)
